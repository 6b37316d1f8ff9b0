"""Tests of kd_jax; what several of them share stands beside them."""

# For jax.jit, where two programs must round alike: the program's own flags (conftest.py) let the
# compiler add up in another order in each.
IN_ORDER = {"xla_cpu_enable_fast_math": False}
