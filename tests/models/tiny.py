"""Tiny models of every family, and batches for them."""

import dataclasses

import jax
import numpy as np

from kd_jax.models import family as families
from kd_jax.precision import Policy
from kd_jax.types import Batch, Model

VOCAB = 96

_BERT = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
CONFIGS = {
    "bert": _BERT,
    "roberta": _BERT | {"model_type": "roberta", "type_vocab_size": 1},
    "xlm-roberta": _BERT | {"model_type": "xlm-roberta", "type_vocab_size": 1},
    "electra": _BERT | {"model_type": "electra", "embedding_size": 12},
    "mpnet": _BERT | {"model_type": "mpnet"},
    "mobilebert": _BERT
    | {
        "model_type": "mobilebert",
        "embedding_size": 12,
        "intra_bottleneck_size": 16,
        "num_feedforward_networks": 2,
    },
    "distilbert": {
        "model_type": "distilbert",
        "vocab_size": VOCAB,
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 40,
    },
    "modernbert": _BERT
    | {
        "model_type": "modernbert",
        "global_attn_every_n_layers": 2,
        "local_attention": 6,
        "pad_token_id": 0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "bos_token_id": 2,
        "eos_token_id": 3,
    },
    "llama": _LLAMA,
    "qwen2": _LLAMA | {"model_type": "qwen2"},
    "phi": _LLAMA | {"model_type": "phi", "num_key_value_heads": 4},
    "qwen3": _LLAMA | {"model_type": "qwen3", "head_dim": 12},
    "smollm3": _LLAMA | {"model_type": "smollm3", "no_rope_layers": [1, 0], "pad_token_id": 0},
    "mistral": _LLAMA | {"model_type": "mistral", "sliding_window": 5},
    "phi3": _LLAMA | {"model_type": "phi3", "pad_token_id": 0},
    "olmo2": _LLAMA | {"model_type": "olmo2", "pad_token_id": None},
    "gemma3_text": _LLAMA
    | {
        "model_type": "gemma3_text",
        "head_dim": 12,
        "query_pre_attn_scalar": 20,
        "sliding_window": 5,
        "sliding_window_pattern": 2,
    },
}
PAD = dict.fromkeys(CONFIGS, 0) | {"roberta": 1, "xlm-roberta": 1, "mpnet": 1}


def model(
    name: str,
    head: str | None = None,
    *,
    seed: int = 0,
    policy: Policy | None = None,
    remat: bool = False,
    blocks: tuple = (),
    **changes,
) -> Model:
    """A model with all parameters random, biases too; drawn by numpy, which compiles nothing.

    `blocks` are a decoder's, where they differ.
    """
    family, config = families.read(CONFIGS[name] | changes)
    unequal = {"blocks": blocks} if blocks else {}
    config = dataclasses.replace(config, remat=remat, **unequal)
    head = head or next(iter(family.architectures))
    shapes = families.abstract(family, config, head, policy or Policy())
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = 0.2 * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(value + (path[-1].key == "scale"))

    return shapes.replace(params=jax.tree_util.tree_map_with_path(draw, shapes.params))


def batch(name: str, rows: int = 3, length: int = 20) -> Batch:
    """Random tokens; row 1 is half padding, as wide as a row of that family may be."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(4, VOCAB, (rows, length)).astype(np.int32)
    mask = np.ones((rows, length), np.float32)
    mask[1, length // 2 :] = 0
    tokens[mask == 0] = PAD[name]
    types = np.zeros_like(tokens)
    if name in ("bert", "mobilebert", "electra"):
        types[:, length // 4 :] = 1
    return Batch(
        ids_B=jax.device_put(np.arange(rows, dtype=np.int32)),
        tokens_BT=jax.device_put(tokens),
        mask_BT=jax.device_put(mask),
        labels=jax.device_put(tokens),
        weights=jax.device_put(mask),
        types_BT=jax.device_put(types),
    )
