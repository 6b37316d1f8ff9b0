"""One process of a distributed run: `distributed_worker.py FLAGS`; prints a sum over processes."""

import sys

import jax
from absl import flags
from jax.experimental import multihost_utils

from kd_jax.errors import UserError
from kd_jax.train import distributed

flags.FLAGS(sys.argv)
try:
    distributed.initialize()
except UserError as error:
    sys.exit(f"error: {error}")
total = multihost_utils.process_allgather(jax.numpy.ones(()) * (1 + jax.process_index())).sum()
print(f"process {jax.process_index()} of {jax.process_count()}: sum {total:.0f}", flush=True)
