"""A decoder as what its blocks read and write, without the last norm and the head."""

import jax
from flax import nnx

from kd_jax.types import Array, Batch, Model, ModelOutput


class BlockStates(nnx.Module):
    """The parts of a `heads.HeadedModel`, so that it takes the same parameters."""

    def __init__(self, backbone: nnx.Module, head: nnx.Module):
        self.backbone = backbone
        self.head = head

    def __call__(
        self, batch: Batch, seed: Array | None = None, replaced_L: Array | None = None
    ) -> ModelOutput:
        """`hidden` are the embedding output and each block's output, none normalised; there are no
        logits."""
        hidden, attention = self.backbone.states(batch, seed, replaced_L)
        return ModelOutput(hidden[-1], None, None, hidden, attention)


def block_states(model: Model) -> Model:
    """The same parameters, arrays or abstract, as a model that answers with its blocks' states."""

    def make(params):
        whole = nnx.merge(model.graphdef, params)
        graphdef, state = nnx.split(BlockStates(whole.backbone, whole.head))
        return Model(nnx.to_pure_dict(state), graphdef)

    return model.replace(graphdef=jax.eval_shape(make, model.params).graphdef)
