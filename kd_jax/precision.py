"""Defines mixed precision as one object, and matrix products that follow it in both directions.

`torch.autocast` keeps parameters in float32 and runs matrix products in bfloat16. Under autodiff
that takes more than casting the operands: the cotangent of a product that accumulates in float32
is float32, and XLA would multiply it with bfloat16 weights at float32 speed (on CPU: half speed).
`einsum` below casts the cotangent too, so all three products of a layer run in bfloat16.
"""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax.errors import UserError

log = logging.getLogger(__name__)

HIGHEST = jax.lax.Precision.HIGHEST


def exact(operand: Any) -> jax.lax.Precision | None:
    """Returns the precision at which a matrix product does not round operands of this type.

    By default GPUs round float32 to TF32 and TPUs to bfloat16. bfloat16 operands need no rounding:
    the default is exact for them, and fast.
    """
    return HIGHEST if jnp.dtype(operand) == jnp.float32 else None


def product(spec: str, a: Any, b: Any, operand: Any) -> Any:
    """Computes `jnp.einsum` in float32 of arrays cast to `operand`, without further rounding."""
    a, b = (x.astype(jnp.dtype(operand)) for x in (a, b))
    return jnp.einsum(spec, a, b, precision=exact(operand), preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Policy:
    """The types of one model's computations; parameters and losses are always float32."""

    operand: str = "float32"  # what matrix products multiply
    activation: str = "float32"  # what flows between layers
    attention: str = "explicit"  # whole (CPU); no T x T scores: blocks | pallas | cudnn
    reduction: str = "float32"  # of kernels' gradients that are summed over devices in parts
    least_rows: int = 8  # of a chunk of logits over a vocabulary, where none are configured

    @property
    def on_cpu(self) -> bool:
        """Tells whether this is for a CPU."""
        return self.attention == "explicit"

    @property
    def on_cpu_in_bf16(self) -> bool:
        """Tells whether bfloat16 products come out in float32, as they do on CPU only."""
        return self.operand == "bfloat16" and self.activation == "float32"


def policy_for(precision: str, platform: str, reduction: str = "float32") -> Policy:
    """Makes the policy for `fp32` or `bf16` on `cpu`, `gpu` or `tpu`; `reduction`: as in `Policy`.

    bf16 on CPU keeps activations in float32: bf16 x bf16 -> float32 products run at twice the
    float32 rate there, while everything elementwise is slower in bfloat16.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision={precision!r}: have fp32, bf16")
    if platform == "cpu":
        operand = "float32" if precision == "fp32" else "bfloat16"
        return Policy(operand, reduction=reduction)
    attention = "pallas" if platform == "tpu" else "blocks"
    # A product with fewer rows is bound by reading the unembedding.
    own = {"attention": attention, "least_rows": 1024, "reduction": reduction}
    if precision == "fp32":  # for which cuDNN has no attention
        return Policy(**own)
    if attention == "blocks" and _has_cudnn_attention():
        own["attention"] = "cudnn"
    return Policy("bfloat16", "bfloat16", **own)


@functools.cache
def _has_cudnn_attention() -> bool:
    """Tells whether cuDNN's attention runs on the GPU here, or on those that are compiled for."""
    if jax.default_backend() != "gpu":
        return True
    device = jax.local_devices()[0]
    version = getattr(device, "compute_capability", "0")  # AMD's are named otherwise: gfx90a
    if "cuda" in device.client.platform_version and float(version) >= 8.0:
        return True
    log.warning(
        "%s: no fused attention, which needs NVIDIA's Ampere or later; it is computed in blocks",
        device.device_kind,
    )
    return False


def _product(spec_a: str, a, spec_b: str, b, out: str, policy: Policy, out_dtype):
    # XLA's CPU backend has no bfloat16 product whose result would come out transposed, so the
    # operand that has the result's first own index goes first.
    first = next((i for i in out if (i in spec_a) != (i in spec_b)), "")
    if first in spec_b and first not in spec_a:
        spec_a, a, spec_b, b = spec_b, b, spec_a, a
    return product(f"{spec_a},{spec_b}->{out}", a, b, policy.operand).astype(out_dtype)


def _specs(spec: str) -> tuple[str, str, str]:
    operands, out = spec.split("->")
    return *operands.split(","), out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(spec: str, a, b, policy: Policy):
    """Computes `jnp.einsum` of two arrays in the policy's types; every index of an operand must
    occur in the other operand or in the result (no sums over an index of one operand alone)."""
    spec_a, spec_b, out = _specs(spec)
    return _product(spec_a, a, spec_b, b, out, policy, policy.activation)


def _einsum_fwd(spec, a, b, policy):
    return einsum(spec, a, b, policy), (a, b)


def _einsum_bwd(spec, policy, residual, g):
    a, b = residual
    spec_a, spec_b, out = _specs(spec)
    da = _product(out, g, spec_b, b, spec_a, policy, a.dtype)
    return da, _product(spec_a, a, out, g, spec_b, policy, b.dtype)


einsum.defvjp(_einsum_fwd, _einsum_bwd)


def rows_product(a_NA, b_NB, policy: Policy):
    """Computes a^T b in float32, (A, B): the gradient of a matrix, summed over the N rows.

    XLA's CPU backend multiplies in bfloat16 only where the sum runs along a's last axis; else it
    goes back to float32, at a third of the speed. It would also undo a plain transposition, but
    not one in two parts.
    """
    N, A = a_NA.shape
    if policy.on_cpu_in_bf16 and A % 2 == 0:
        a_NA = a_NA.astype(jnp.dtype(policy.operand))
        a_AN = a_NA.reshape(N, 2, A // 2).transpose(1, 2, 0).reshape(A, N)
        return product("an,nb->ab", a_AN, b_NB, policy.operand)
    return product("na,nb->ab", a_NA, b_NB, policy.operand)
