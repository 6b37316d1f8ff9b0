"""Defines the term `symmetric_kl`: a weighted mean of forward and reverse KL divergence.

With equal shares it is half of the symmetric divergence of Kullback and Leibler, "On Information
and Sufficiency", Annals of Mathematical Statistics 22, 1951.
"""

import dataclasses

from kd_jax.objectives.divergence import Softened, Temperature
from kd_jax.objectives.kl import ForwardKL
from kd_jax.objectives.reverse_kl import ReverseKL
from kd_jax.ranges import Real
from kd_jax.types import Array


class BothKLs(Softened):
    """Base of w KL(q || p) + (1 - w) KL(p || q), each times T^2; no gradient goes through w."""

    needs_all_ids = True

    def forward_share(self, rows, sums, temperature: Temperature) -> float | Array:
        """Computes w, a number or (C, 1)."""
        raise NotImplementedError

    def _kls(self):
        return ForwardKL(self.t_squared), ReverseKL(self.t_squared)

    def sums(self, rows, temperature):
        forward, reverse = (kl.sums(rows, temperature) for kl in self._kls())
        return forward | reverse

    def value(self, rows, sums, temperature):
        forward, reverse = (kl.value(rows, sums, temperature) for kl in self._kls())
        share = self.forward_share(rows, sums, temperature)
        return share * forward + (1.0 - share) * reverse

    def grad(self, rows, sums, temperature):
        forward, reverse = (kl.grad(rows, sums, temperature) for kl in self._kls())
        share = self.forward_share(rows, sums, temperature)
        return share * forward + (1.0 - share) * reverse


@dataclasses.dataclass(frozen=True)
class SymmetricKL(BothKLs):
    """Symmetric KL, T^2 [w KL(q || p) + (1 - w) KL(p || q)]: p of the student, q of the teacher."""

    forward: float = 0.5

    def forward_share(self, rows, sums, temperature):
        return self.forward


def make(forward: float = 0.5, t_squared: bool = True) -> SymmetricKL:
    """Makes the term: `forward` is the share w of forward KL."""
    Real(least=0, most=1).check(forward, "objective symmetric_kl: forward")
    return SymmetricKL(t_squared, forward=forward)
