"""PyTorch model of an encoder whose blocks differ from layer to layer, as kd_jax exports it.

A BERT, RoBERTa or DistilBERT some of whose layers have fewer heads and FFN columns than the others
(slim), or work in a narrower width between two projections (bottleneck). `blocks` of config.json
has the sizes of each layer, `base_model_type` says which family; all else is transformers' own
model of that family, with other layers. It needs torch and transformers alone (4.57 and 5 were
tried):

    AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)
"""

import copy

from torch import nn
from transformers.models.bert import configuration_bert, modeling_bert
from transformers.models.distilbert import configuration_distilbert, modeling_distilbert
from transformers.models.roberta import configuration_roberta, modeling_roberta


class Sized:
    """Turns a layer of transformers into one of the sizes of `shape`, a bottleneck's with `down`
    before it and `up` after it."""

    hidden_at = 0  # where the hidden states are, in versions whose layers return tuples

    def __init__(self, config, shape):
        own = copy.copy(config)
        # One head, which divides any width; `resize` has the right ones.
        own.hidden_size, own.num_attention_heads = shape["width"], 1
        setattr(own, self.ffn_width, shape["ffn_width"])
        super().__init__(own)
        self.resize(shape["width"], shape["num_heads"], shape["head_width"])
        narrow = shape["kind"] == "bottleneck"
        self.down = nn.Linear(config.hidden_size, shape["width"]) if narrow else None
        self.up = nn.Linear(shape["width"], config.hidden_size) if narrow else None

    def forward(self, hidden_states, *args, **kwargs):
        if self.down is None:
            return super().forward(hidden_states, *args, **kwargs)
        found = super().forward(self.down(hidden_states), *args, **kwargs)
        if not isinstance(found, tuple):
            return hidden_states + self.up(found)
        found = list(found)
        found[self.hidden_at] = hidden_states + self.up(found[self.hidden_at])
        return tuple(found)


def resize(attention, names, width, heads, head_width):
    """Gives an attention module heads of that number and width."""
    attention.attention_head_size, attention.scaling = head_width, head_width**-0.5
    for name in names:
        setattr(attention, name, nn.Linear(width, heads * head_width))


class SizedBert(Sized):
    ffn_width = "intermediate_size"

    def resize(self, width, heads, head_width):
        own = self.attention.self
        resize(own, ("query", "key", "value"), width, heads, head_width)
        own.num_attention_heads, own.all_head_size = heads, heads * head_width
        self.attention.output.dense = nn.Linear(heads * head_width, width)


class SizedBertLayer(SizedBert, modeling_bert.BertLayer):
    pass


class SizedRobertaLayer(SizedBert, modeling_roberta.RobertaLayer):
    pass


class SizedTransformerBlock(Sized, modeling_distilbert.TransformerBlock):
    ffn_width = "hidden_dim"
    hidden_at = -1

    def resize(self, width, heads, head_width):
        resize(self.attention, ("q_lin", "k_lin", "v_lin"), width, heads, head_width)
        self.attention.n_heads, self.attention.dim = heads, heads * head_width
        self.attention.out_lin = nn.Linear(heads * head_width, width)


class KDJaxBertConfig(configuration_bert.BertConfig):
    model_type = "kd_jax_encoder"


class KDJaxRobertaConfig(configuration_roberta.RobertaConfig):
    model_type = "kd_jax_encoder"


class KDJaxDistilBertConfig(configuration_distilbert.DistilBertConfig):
    model_type = "kd_jax_encoder"


class Unequal:
    """Puts layers of the sizes in config.blocks into a model of transformers."""

    _no_split_modules = ["SizedBertLayer", "SizedRobertaLayer", "SizedTransformerBlock"]

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        base = self.base_model
        stack = base.transformer if hasattr(base, "transformer") else base.encoder
        stack.layer = nn.ModuleList([self.layer_class(config, shape) for shape in config.blocks])
        self.post_init()


FAMILIES = {
    "Bert": (modeling_bert, KDJaxBertConfig, SizedBertLayer),
    "Roberta": (modeling_roberta, KDJaxRobertaConfig, SizedRobertaLayer),
    "DistilBert": (modeling_distilbert, KDJaxDistilBertConfig, SizedTransformerBlock),
}
HEADS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForQuestionAnswering")

# KDJaxBertModel, KDJaxBertForMaskedLM and so on: classes of transformers with other layers.
for family, (modeling, config_class, layer_class) in FAMILIES.items():
    for head in HEADS:
        name, whole = f"KDJax{family}{head}", getattr(modeling, f"{family}{head}")
        parts = {"config_class": config_class, "layer_class": layer_class}
        globals()[name] = type(name, (Unequal, whole), parts)
