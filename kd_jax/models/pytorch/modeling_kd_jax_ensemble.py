"""PyTorch model of an ensemble of causal language models of one shape, as kd_jax exports it.

The logits are the weighted mean of the members' logits, or the logarithm of that of their
probabilities (`space` of config.json). It needs torch and transformers alone:

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

`generate` keeps each member's keys and values; beams are not supported.
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
from transformers.modeling_outputs import CausalLMOutputWithPast


class KDJaxEnsembleConfig(PretrainedConfig):
    """`member`: config.json of every member; `weights`: one a member, which sum to 1; `space`:
    logits | probabilities."""

    model_type = "kd_jax_ensemble"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, member=None, weights=(1.0,), space="logits", **kwargs):
        self.member = dict(member or {"model_type": "gpt2"})
        self.weights, self.space = list(weights), space
        own = self.of_member()
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            setattr(self, name, getattr(own, name))
        kwargs["tie_word_embeddings"] = False  # members do that themselves
        super().__init__(**kwargs)

    def of_member(self):
        """The members' own config."""
        keys = dict(self.member)
        return AutoConfig.for_model(keys.pop("model_type"), **keys)


class MembersCache(DynamicCache):
    """The members' caches; as a cache of its own it counts tokens."""

    def __init__(self, count):
        super().__init__()
        self.members = [DynamicCache() for _ in range(count)]

    def count(self, tokens):
        """Notes tokens (B, T) that all members have read."""
        nothing = torch.zeros(tokens.shape[0], 1, tokens.shape[1], 1, device=tokens.device)
        self.update(nothing, nothing, 0)


class KDJaxEnsembleForCausalLM(PreTrainedModel, GenerationMixin):
    """The mean of the members."""

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
        **kwargs,
    ):
        """Logits of the mean; with labels also the loss, shifted as in every HF model."""
        cache = past_key_values
        if use_cache and not isinstance(cache, MembersCache):
            if cache is not None and cache.get_seq_length():
                raise ValueError("past_key_values is of another model")
            cache = MembersCache(len(self.members))
        logits = None
        for number, (member, weight) in enumerate(
            zip(self.members, self.config.weights, strict=True)
        ):
            found = member(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache.members[number] if cache is not None else None,
                use_cache=bool(use_cache),
            ).logits.float()
            logits = self._add(logits, found, weight)
        if cache is not None:
            cache.count(input_ids)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _add(self, sofar, logits, weight):
        if self.config.space == "logits":
            return weight * logits if sofar is None else sofar + weight * logits
        logs = torch.log_softmax(logits, dim=-1) + torch.log(torch.tensor(weight))
        return logs if sofar is None else torch.logaddexp(sofar, logs)

    def tie_weights(self, *args, **kwargs):
        """Members share tensors within themselves, not with each other."""
        for member in self.members:
            member.tie_weights()

    def get_input_embeddings(self):
        return self.members[0].get_input_embeddings()
