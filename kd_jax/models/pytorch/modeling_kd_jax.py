"""PyTorch model of a transformer whose blocks differ from layer to layer, as kd_jax exports it.

A GPT-2, Llama, Mistral, SmolLM3, Qwen2, Qwen3, Phi, Phi-3, OLMo 2, Gemma 3, BERT, RoBERTa, XLM-R,
ELECTRA or DistilBERT some of whose layers have fewer heads and FFN columns than the others (slim),
or work in a narrower width between two projections (bottleneck). `blocks` of config.json has the
sizes of each layer, `base_model_type` says which family; all else is transformers' own model of
that family, with other layers. It needs torch and transformers alone (5 was tried, and 4.57 but for
Gemma 3):

    AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
"""

import copy

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.bert import modeling_bert
from transformers.models.distilbert import modeling_distilbert
from transformers.models.electra import modeling_electra
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi import modeling_phi
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.roberta import modeling_roberta
from transformers.models.smollm3 import modeling_smollm3
from transformers.models.xlm_roberta import modeling_xlm_roberta
from transformers.pytorch_utils import Conv1D

# transformers 5.24 calls past_key_values cache. Either is taken.
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"


class Sized:
    """Turns a layer of transformers into one of the sizes of `shape`, a bottleneck's with `down`
    before it and `up` after it."""

    place = "encoder.layer"  # of the layers, in the base model
    sizes = {"intermediate_size": "ffn_width"}  # keys of the config -> of `shape`
    numbered = True  # whether it is made with its number
    hidden_at = 0  # where the hidden states are, in versions whose layers return tuples

    def __init__(self, config, shape, number):
        own = copy.copy(config)
        # One head, which divides any width, where `resize` makes the right ones.
        own.hidden_size, own.num_attention_heads = shape["width"], 1
        for key, size in self.sizes.items():
            setattr(own, key, shape[size])
        super().__init__(own, *[number] if self.numbered else [])
        self.resize(own, shape)
        for module in self.modules():
            if hasattr(module, "is_causal"):  # attends as the model's config says, now and later
                module.config = self.seen(config, shape)
        self.inner = self.down = None
        if shape["kind"] == "bottleneck":
            self.wrap()
            self.down = nn.Linear(config.hidden_size, shape["width"])
            self.up = nn.Linear(shape["width"], config.hidden_size)

    def seen(self, config, shape):
        """Returns the config that attention reads when it runs."""
        return config

    def wrap(self):
        """Puts the layer's modules where kd_jax names those of a bottleneck."""

    def forward(self, hidden_states, *args, **kwargs):
        if self.down is None:
            return super().forward(hidden_states, *args, **kwargs)
        forward = super().forward.__func__
        found = forward(self.inner or self, self.down(hidden_states), *args, **kwargs)
        if not isinstance(found, tuple):
            return hidden_states + self.up(found)
        found = list(found)
        found[self.hidden_at] = hidden_states + self.up(found[self.hidden_at])
        return tuple(found)


class SizedDecoder(Sized):
    """A layer that has its modules in `inner`, if it is a bottleneck. That is no layer itself:
    transformers would take what it returns for another hidden state."""

    def wrap(self):
        inner = nn.Module()
        inner.__dict__.update(self.__dict__, gradient_checkpointing=False)
        self._modules = {}
        self.inner = inner


class SizedGPT2Block(SizedDecoder, modeling_gpt2.GPT2Block):
    place = "h"
    sizes = {"n_inner": "ffn_width"}

    def resize(self, own, shape):
        self.attn = SizedGPT2Attention(own, shape, self.attn.layer_idx)


class SizedGPT2Attention(modeling_gpt2.GPT2Attention):
    def __init__(self, config, shape, number):
        super().__init__(config, layer_idx=number)
        self.num_heads, self.head_dim = shape["num_heads"], shape["head_width"]
        self.split_size = self.num_heads * self.head_dim
        self.c_attn = Conv1D(3 * self.split_size, shape["width"])
        self.c_proj = Conv1D(shape["width"], self.split_size)
        scaling = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            scaling /= number + 1
        # transformers 4 scales in its eager attention alone; others take it as an argument.
        self.scaled = {} if hasattr(self, "scaling") else {"scaling": scaling}
        self.scaling = scaling

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs, **self.scaled)


class SizedRotary(SizedDecoder):
    """A layer that turns its heads by their own width."""

    place = "layers"
    sizes = {
        "intermediate_size": "ffn_width",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_width",
    }

    def resize(self, own, shape):
        self.rotary_emb = self.rotary_class(own)

    def turns(self, rotary_emb, hidden_states, position_ids):
        return rotary_emb(hidden_states, position_ids)

    def forward(self, hidden_states, *args, position_ids, **kwargs):
        turns = self.turns((self.inner or self).rotary_emb, hidden_states, position_ids)
        kwargs |= {"position_ids": position_ids, "position_embeddings": turns}
        return super().forward(hidden_states, *args, **kwargs)


class WithHeads:
    """The model's config, but for the number of heads."""

    def __init__(self, config, shape):
        self.config, self.num_attention_heads = config, shape["num_heads"]

    def __getattr__(self, name):
        return getattr(self.__dict__["config"], name)


class SizedPhi3(SizedRotary):
    def seen(self, config, shape):
        return WithHeads(config, shape)


class SizedGemma3(SizedRotary):
    def resize(self, own, shape):
        super().resize(own, shape)
        self.kind = own.layer_types[self.layer_idx]

    def turns(self, rotary_emb, hidden_states, position_ids):
        return rotary_emb(hidden_states, position_ids, self.kind)


def rotary_layer(modeling, family, kind=SizedRotary):
    """Makes the class Sized...Layer of a family of transformers whose heads are turned."""
    own = {"rotary_class": getattr(modeling, f"{family}RotaryEmbedding")}
    layer = getattr(modeling, f"{family}DecoderLayer")
    return type(f"Sized{family}Layer", (kind, layer), own | {"__module__": __name__})


def resize(attention, names, shape):
    """Gives an encoder's attention heads of the number and width in `shape`; returns the width of
    them all."""
    attention.attention_head_size = shape["head_width"]
    attention.scaling = shape["head_width"] ** -0.5
    width = shape["num_heads"] * shape["head_width"]
    for name in names:
        setattr(attention, name, nn.Linear(shape["width"], width))
    return width


class SizedBert(Sized):
    def resize(self, own, shape):
        heads = self.attention.self
        heads.all_head_size = resize(heads, ("query", "key", "value"), shape)
        heads.num_attention_heads = shape["num_heads"]
        self.attention.output.dense = nn.Linear(heads.all_head_size, shape["width"])


class SizedBertLayer(SizedBert, modeling_bert.BertLayer):
    pass


class SizedRobertaLayer(SizedBert, modeling_roberta.RobertaLayer):
    pass


class SizedXLMRobertaLayer(SizedBert, modeling_xlm_roberta.XLMRobertaLayer):
    pass


class SizedElectraLayer(SizedBert, modeling_electra.ElectraLayer):
    pass


class SizedTransformerBlock(Sized, modeling_distilbert.TransformerBlock):
    place = "transformer.layer"
    sizes = {"hidden_dim": "ffn_width"}
    numbered = False
    hidden_at = -1

    def resize(self, own, shape):
        self.attention.dim = resize(self.attention, ("q_lin", "k_lin", "v_lin"), shape)
        self.attention.n_heads = shape["num_heads"]
        self.attention.out_lin = nn.Linear(self.attention.dim, shape["width"])


class Unequal:
    """Puts layers of the sizes in config.blocks into a model of transformers."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        layers = [self.layer_class(config, shape, i) for i, shape in enumerate(config.blocks)]
        owner, _, name = self.layer_class.place.rpartition(".")
        setattr(self.base_model.get_submodule(owner), name, nn.ModuleList(layers))
        self.post_init()


class Decoder(Unequal):
    """Takes a model's arguments by the names of either version of transformers, and refuses those
    that its classes would pass over in silence."""

    known = ("output_hidden_states", "return_dict", "cache_position")
    of_head = ("labels", "logits_to_keep", "num_items_in_batch", "ignore_index", "shift_labels")

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=None,
        cache=None,
        **kwargs,
    ):
        given = kwargs | dict(labels=labels, logits_to_keep=logits_to_keep)
        known = self.known + (() if self.base_model is self else self.of_head)
        odd = [k for k, v in given.items() if k not in known and v is not None and v is not False]
        if odd:
            raise TypeError(f"this model has no use for {', '.join(odd)}; leave that out")
        given = {k: v for k, v in given.items() if k in known}
        if past_key_values is not None and cache is not None:
            raise ValueError("give either past_key_values or cache")
        cache = past_key_values if cache is None else cache
        given |= dict(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        given |= {"position_ids": position_ids, "inputs_embeds": inputs_embeds, CACHE: cache}
        return super().forward(**{k: v for k, v in given.items() if v is not None})


ENCODER = (Unequal, "kd_jax_encoder")
ENCODER += ("Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering")
DECODER = (Decoder, "kd_jax_decoder", "Model", "ForCausalLM")
GPT2 = (Decoder, "kd_jax_decoder", "Model", "LMHeadModel")
GEMMA3 = (Decoder, "kd_jax_decoder", "TextModel", "ForCausalLM")
FAMILIES = {
    "GPT2": (modeling_gpt2, SizedGPT2Block, GPT2),
    "Llama": (modeling_llama, rotary_layer(modeling_llama, "Llama"), DECODER),
    "Mistral": (modeling_mistral, rotary_layer(modeling_mistral, "Mistral"), DECODER),
    "SmolLM3": (modeling_smollm3, rotary_layer(modeling_smollm3, "SmolLM3"), DECODER),
    "Qwen2": (modeling_qwen2, rotary_layer(modeling_qwen2, "Qwen2"), DECODER),
    "Qwen3": (modeling_qwen3, rotary_layer(modeling_qwen3, "Qwen3"), DECODER),
    "Phi": (modeling_phi, rotary_layer(modeling_phi, "Phi"), DECODER),
    "Phi3": (modeling_phi3, rotary_layer(modeling_phi3, "Phi3", SizedPhi3), DECODER),
    "Olmo2": (modeling_olmo2, rotary_layer(modeling_olmo2, "Olmo2"), DECODER),
    "Gemma3": (modeling_gemma3, rotary_layer(modeling_gemma3, "Gemma3", SizedGemma3), GEMMA3),
    "Bert": (modeling_bert, SizedBertLayer, ENCODER),
    "Roberta": (modeling_roberta, SizedRobertaLayer, ENCODER),
    "XLMRoberta": (modeling_xlm_roberta, SizedXLMRobertaLayer, ENCODER),
    "Electra": (modeling_electra, SizedElectraLayer, ENCODER),
    "DistilBert": (modeling_distilbert, SizedTransformerBlock, ENCODER),
}

# KDJaxBertConfig, KDJaxBertModel, KDJaxBertForMaskedLM and so on: transformers' classes with other
# layers.
for family, (modeling, layer_class, (mixin, model_type, *heads)) in FAMILIES.items():
    own = family + heads[0].removesuffix("Model") + "Config"
    name, config = f"KDJax{own}", getattr(modeling, own)
    config_class = globals()[name] = type(name, (config,), {"model_type": model_type})
    own = {"config_class": config_class, "layer_class": layer_class}
    own["_no_split_modules"] = [layer_class.__name__]
    for head in heads:
        name, whole = f"KDJax{family}{head}", getattr(modeling, f"{family}{head}")
        globals()[name] = type(name, (mixin, whole), own)
