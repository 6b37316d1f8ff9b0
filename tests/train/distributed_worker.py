"""One process of a distributed run: `distributed_worker.py FLAGS`; prints a sum over processes."""

import sys

import jax
from jax.experimental import multihost_utils

from kd_jax import flags
from kd_jax.errors import UserError
from kd_jax.train import distributed

parser = flags.Parser("worker", __doc__)
parser.add_processes()
args = vars(parser.parse())
try:
    distributed.initialize(**args)
except UserError as error:
    sys.exit(f"error: {error}")
total = multihost_utils.process_allgather(jax.numpy.ones(()) * (1 + jax.process_index())).sum()
print(f"process {jax.process_index()} of {jax.process_count()}: sum {total:.0f}", flush=True)
