"""Defines the PyTorch model of an ensemble of causal language models of one shape, for exports.

The logits are the weighted mean of the members' logits, or the logarithm of that of their
probabilities (`space` of config.json). It needs torch and transformers alone (4.57 and 5 were
tried):

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

The layers of one cache are those of the first member, then those of the second, and so on.
"""

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# transformers 5.24 calls past_key_values cache. Either is taken; members and outputs have the one
# that is theirs.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


def known(arguments, *names):
    """Selects the further arguments that are read; others are refused unless None or False."""
    odd = [k for k, v in arguments.items() if k not in names and v is not None and v is not False]
    if odd:
        raise TypeError(f"this model has no use for {', '.join(odd)}; leave that out")
    return {name: arguments[name] for name in names if name in arguments}


def shares(cache, members, layers):
    """Splits a cache into one for each member, with the member's layers."""
    if type(cache) is not DynamicCache:
        raise ValueError(f"an ensemble's cache is a DynamicCache, not a {type(cache).__name__}")
    if cache.get_seq_length() and len(cache.layers) != members * layers:
        raise ValueError("the cache is of another model")
    while len(cache.layers) < members * layers:
        cache.layers.append(DynamicLayer())
    parts = [DynamicCache() for _ in range(members)]
    for number, part in enumerate(parts):
        part.layers = cache.layers[number * layers : (number + 1) * layers]
    return parts


class KDJaxEnsembleConfig(PretrainedConfig):
    """The config. `member`: config.json of every member; `weights`: one for each member, which
    sum to 1; `space`: logits | probabilities."""

    model_type = "kd_jax_ensemble"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(self, member=None, weights=(1.0,), space="logits", **kwargs):
        self.member = dict(member or {"model_type": "gpt2"})
        self.weights, self.space = list(weights), space
        own = self.of_member()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(own, name))
        kwargs["tie_word_embeddings"] = False  # members do that themselves
        super().__init__(**kwargs)

    def of_member(self):
        """Makes the config of a member."""
        keys = dict(self.member)
        return AutoConfig.for_model(keys.pop("model_type"), **keys)


class KDJaxEnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """An ensemble, which averages its members' logits."""

    config_class = KDJaxEnsembleConfig
    base_model_prefix = "members"

    def __init__(self, config):
        super().__init__(config)
        made = [AutoModelForCausalLM.from_config(config.of_member()) for _ in config.weights]
        self.members = nn.ModuleList(made)
        if made[0].config.tie_word_embeddings:
            self._keys_to_ignore_on_load_missing = [r"^members\.\d+\.lm_head\.weight$"]
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        labels=None,
        logits_to_keep=0,
        return_dict=None,
        cache=None,
        **kwargs,
    ):
        """Computes the mean's logits; with labels also the loss, shifted as in every HF model."""
        of_loss = ("num_items_in_batch", "ignore_index", "shift_labels")
        kwargs = known(kwargs, "cache_position", *of_loss)
        if past_key_values is not None and cache is not None:
            raise ValueError("give either past_key_values or cache")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = DynamicCache()
        parts = [None] * len(self.members)
        if cache is not None:
            parts = shares(cache, len(self.members), self.config.num_hidden_layers)
        given = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        given |= dict(use_cache=cache is not None, logits_to_keep=logits_to_keep)
        if "cache_position" in kwargs:
            given["cache_position"] = kwargs.pop("cache_position")
        logits = None
        for member, weight, part in zip(self.members, self.config.weights, parts, strict=True):
            found = member(**given, **{CACHE: part}).logits.float()
            logits = self._add(logits, found, weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache})
        return found.to_tuple() if return_dict is False else found

    def _add(self, sofar, logits, weight):
        if self.config.space == "logits":
            return weight * logits if sofar is None else sofar + weight * logits
        logs = torch.log_softmax(logits, dim=-1) + torch.log(torch.tensor(weight))
        return logs if sofar is None else torch.logaddexp(sofar, logs)

    def tie_weights(self, *args, **kwargs):
        """Ties weights within each member; members share none with each other."""
        for member in self.members:
            member.tie_weights()

    def get_input_embeddings(self):
        return self.members[0].get_input_embeddings()
