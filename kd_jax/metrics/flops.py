"""Counts the FLOPs of transformers' matrix products, from the shapes of their parameters.

A kernel is multiplied with every token that it sees, so a parameter tree determines a model's
FLOPs, also if its blocks differ in width. Elementwise work, lookups and recomputation do not count;
the backward pass is two products for each one of the forward pass. Attention counts all pairs of
tokens, causal or not, as is usual (Chowdhery et al., "PaLM", arXiv:2204.02311, appendix B); with a
sliding window, as many for each token as the window has.
"""

import math
import re
from collections.abc import Sequence

import jax

from kd_jax.types import Counted, Params


def forward(model: Counted, rows: int, tokens: int, positions: int, vocabulary: bool = True) -> int:
    """Counts the FLOPs of one forward pass.

    Args:
        model: the model.
        rows: number of rows of the batch.
        tokens: number of tokens of a row.
        positions: tokens of a row that reach a language model's head. A classifier's head sees
            one token, a span's all.
        vocabulary: whether a language model's head ends in an unembedding.
    """
    params, windows, unembeds = model
    products = 0  # multiplications for one row
    head = params.get("head", {})
    if "classifier" in head or "span" in head:
        positions, unembeds = 1 if "classifier" in head else tokens, False
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/kernel"):
            seen = positions if name.startswith("head/") else tokens
            products += seen * math.prod(leaf.shape)
        if name.endswith("attention/q/kernel"):
            window = windows and windows[int(re.search(r"/(\d+)/", name)[1])]
            seen = min(tokens, window or tokens)
            products += 2 * tokens * seen * leaf.shape[1]  # scores, and weights times values
    if vocabulary and unembeds:
        embedding_VD = params["backbone"]["tokens"]["embedding"]
        tables = [head.get("unembed", embedding_VD)]
        tables += [head["rest"]["embedding"]] if "rest" in head else []
        products += positions * sum(math.prod(table.shape) for table in tables)
    return 2 * rows * products


def train_step(
    student: Counted,
    teachers: Sequence[Counted],
    objective: Params,
    rows: int,
    tokens: int,
    positions: int,
    vocabulary: bool = True,
) -> int:
    """Counts the FLOPs of one training step: the forward pass of each teacher, and three times that
    of the student and of the objective's kernels, which see every token."""
    own = 2 * rows * tokens * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(objective))
    total = 3 * (forward(student, rows, tokens, positions, vocabulary) + own)
    return total + sum(forward(each, rows, tokens, positions, vocabulary) for each in teachers)
