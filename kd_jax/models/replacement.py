"""Defines blocks that run, at random in every step, either a new block or those that it replaces.

Xu et al. 2020, "BERT-of-Theseus" (arXiv:2002.02925), section 3: while a group of predecessor blocks
is replaced by a successor with a probability, the successor learns to work among predecessors,
which stay as they are. Afterwards the successors are the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from kd_jax.types import Array, Heads, Model, Params


class Either:
    """A block that runs its successor if `replaced` (a bool scalar) is True, else the predecessors
    one after the other; only one of the two is computed. Predecessors get no gradient.

    Uses the dropout sites of one block; predecessors after the first use sites from SITES on.
    """

    SITES = 1 << 10

    def __init__(self, successor: nnx.Module, predecessors: nnx.List, replaced: Array):
        self.successor, self.predecessors, self.replaced = successor, predecessors, replaced

    def __call__(
        self, x_BTD: Array, mask: Array, seed: Array | None, site: int
    ) -> tuple[Array, Heads | None]:
        """Returns (x_BTD, None): no attention heads, since they differ from step to step."""
        graphdef, state = nnx.split(self.predecessors)
        frozen = nnx.merge(graphdef, jax.lax.stop_gradient(state))

        def successor(x_BTD):
            return self.successor(x_BTD, mask, seed, site)[0]

        def predecessors(x_BTD):
            for i, block in enumerate(frozen):
                x_BTD, _ = block(x_BTD, mask, seed, site + i * self.SITES)
            return x_BTD

        return jax.lax.cond(self.replaced, successor, predecessors, x_BTD), None


def joined(successor: Model, predecessor: Model, groups: Sequence[Sequence[int]]) -> Model:
    """Makes a model with the blocks of the successor and of its predecessor.

    `groups`: for each of the successor's blocks the predecessor's blocks that it replaces, () for
    none. The parameters, arrays or abstract, are the successor's and, under
    backbone/predecessors/BLOCK/NUMBER, the predecessor's. In evaluation only the successor runs.
    """

    def make(ours: Params, theirs: Params) -> Model:
        whole = nnx.merge(successor.graphdef, ours)
        blocks = nnx.merge(predecessor.graphdef, theirs).backbone.blocks
        replaced = [nnx.List([blocks[layer] for layer in group]) for group in groups]
        whole.backbone.predecessors = nnx.data(nnx.List(replaced))
        graphdef, state = nnx.split(whole)
        return Model(nnx.to_pure_dict(state), graphdef)

    shapes = jax.eval_shape(make, successor.params, predecessor.params)
    blocks = predecessor.params["backbone"]["blocks"]
    replaced = {
        i: {j: blocks[layer] for j, layer in enumerate(group)}
        for i, group in enumerate(groups)
        if group
    }
    backbone = successor.params["backbone"] | {"predecessors": replaced}
    return shapes.replace(params=successor.params | {"backbone": backbone})


def successors(params: Params) -> Params:
    """Removes the predecessors from the parameters of a joined model."""
    backbone = {key: part for key, part in params["backbone"].items() if key != "predecessors"}
    return params | {"backbone": backbone}
