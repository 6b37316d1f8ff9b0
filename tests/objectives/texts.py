"""Batches of texts and their vectors, made of random numbers, and terms run over them on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from kd_jax import axes
from kd_jax.train import sharding
from kd_jax.types import Batch, ModelOutput


def batch(examples: int = 6, texts: int = 4, filling: int = 2) -> Batch:
    """Examples of so many texts each, of which the last ones fill the batch up."""
    rows = examples * texts
    real = np.arange(rows) < rows - filling * texts
    return Batch(
        ids_B=jnp.asarray(np.where(real, np.arange(rows), -1), jnp.int32),
        tokens_BT=jnp.zeros((rows, 2), jnp.int32),
        mask_BT=jnp.asarray(np.repeat(real[:, None], 2, axis=1), jnp.float32),
        labels=jnp.asarray(np.arange(rows)[:, None] % texts, jnp.int32),
        weights=jnp.asarray(real[:, None], jnp.float32),
    )


def vectors(like: Batch, width: int, seed: int) -> ModelOutput:
    shape = len(like.ids_B), 1, width
    numbers = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return ModelOutput(jnp.asarray(numbers), None, None)


def run(terms, params, student, teacher, rows, temperature=0.5, devices: int = 1):
    """(total, slopes by parameters, slopes by the student's vectors, weight) of each of the terms,
    on a mesh of devices."""
    mesh = sharding.make_mesh(min(devices, 2), jax.devices()[:devices])

    def local(params, student, teacher, rows):
        found = {}
        for name, term in terms.items():

            def total(params, student, term=term):
                return term.total(params, student, teacher, rows, jnp.float32(temperature))

            slopes = jax.value_and_grad(total, argnums=(0, 1))
            value, (own, moved) = slopes(params.get(name, {}), student[name])
            weight = jnp.sum(term.weights(rows))
            sums = axes.total((value, own, weight), axes.ROWS)
            found[name] = *sums[:2], moved.features, sums[2]
        return found

    alike, by_row = PartitionSpec(), sharding.BATCH
    out = dict.fromkeys(terms, (alike, alike, by_row, alike))
    given = alike, by_row, by_row, by_row
    mapped = jax.shard_map(local, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
    return jax.device_get(mapped(params, student, teacher, rows))


def value(term, student, teacher, rows, temperature: float = 0.5, params=None):
    """The mean of one term over a batch."""
    compiled = jax.jit(lambda *given: run({"": term}, *given, temperature=temperature))
    total, _, _, weight = compiled({"": params or {}}, {"": student}, teacher, rows)[""]
    return float(total / weight)
