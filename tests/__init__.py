"""Tests of kd_jax; what several of them share stands beside them."""

# For XLA_FLAGS of processes that test: programs compile sooner, without the fusion emitters alone
# in half the time. In parts, for many threads, small ones take longer in all, and the other core is
# the other test process's.
FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
FAST += " --xla_llvm_disable_expensive_passes=true"
FAST += " --xla_cpu_parallel_codegen_split_count=1"

# For jax.jit, where two programs must round alike: the program's own flags (conftest.py) let the
# compiler add up in another order in each.
IN_ORDER = {"xla_cpu_enable_fast_math": False}
