"""Where the logits of a row come from, chunk by chunk: a model's head, several models' heads, what
is left of logits on disk; and the mixture of a student with others beside it.

A source has row-wise arrays (`rows`, the rows on the first axis), of which the engine hands a chunk
to `logits`; all else is the same for every chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from kd_jax.precision import Policy, exact
from kd_jax.types import Array, ModelOutput, Signal


class Source(Protocol):
    """What logits are computed from, a chunk of rows at a time: V logits for each of N rows."""

    num_classes: int

    @property
    def rows(self) -> Any: ...

    def logits(self, rows: Any, policy: Policy) -> Array:
        """Computes the float32 logits (C, V) of one chunk of C rows."""

    def cut(self, num_classes: int) -> Source:
        """Drops all but the first `num_classes` logits of each row."""


class Head(struct.PyTreeNode):
    """Features and the unembedding that turns them into logits; without one they are the logits."""

    features_ND: Array
    unembed_VD: Array | None
    bias_V: Array | None

    @property
    def num_classes(self) -> int:
        """V: how many logits a row has."""
        if self.unembed_VD is None:
            return self.features_ND.shape[1]
        return self.unembed_VD.shape[0]

    @property
    def rows(self) -> Array:
        return self.features_ND

    def logits(self, rows: Array, policy: Policy) -> Array:
        """Computes the float32 logits (C, V) of one chunk of C rows."""
        if self.unembed_VD is None:
            return rows.astype(jnp.float32)
        return _product(rows, self.unembed_VD, self.bias_V, policy)

    def cut(self, num_classes: int) -> Head:
        """Drops all but the first `num_classes` logits of each row."""
        if self.unembed_VD is None:
            return self.replace(features_ND=self.features_ND[:, :num_classes])
        bias_V = None if self.bias_V is None else self.bias_V[:num_classes]
        return self.replace(unembed_VD=self.unembed_VD[:num_classes], bias_V=bias_V)


class Members(struct.PyTreeNode):
    """The weighted mean of the logits of E models of one shape, or the logarithm of that of their
    probabilities (`Mixture`)."""

    features_NED: Array
    unembed_EVD: Array
    bias_EV: Array | None
    weights_E: Array  # they sum to 1
    space: str = struct.field(pytree_node=False, default="logits")

    @property
    def num_classes(self) -> int:
        """V."""
        return self.unembed_EVD.shape[1]

    @property
    def rows(self) -> Array:
        return self.features_NED

    def logits(self, rows: Array, policy: Policy) -> Array:
        """Computes the mean's float32 logits (C, V), one member after the other."""
        join = SPACES[self.space]

        def add(sofar_CV, member):
            x_CD, unembed_VD, bias_V, weight = member
            return join(sofar_CV, _product(x_CD, unembed_VD, bias_V, policy), weight), None

        start = join(None, jnp.zeros((rows.shape[0], self.num_classes), jnp.float32), None)
        members = rows.swapaxes(0, 1), self.unembed_EVD, self.bias_EV, self.weights_E
        return jax.lax.scan(add, start, members)[0]

    def cut(self, num_classes: int) -> Members:
        """Drops all but the first `num_classes` logits of each row."""
        bias_EV = None if self.bias_EV is None else self.bias_EV[:, :num_classes]
        return self.replace(unembed_EVD=self.unembed_EVD[:, :num_classes], bias_EV=bias_EV)


class Sparse(struct.PyTreeNode):
    """Logits of which K a row are known; all others of a row share one."""

    ids_NK: Array  # int32
    values_NK: Array  # float32
    rest_N: Array  # float32
    num_classes: int = struct.field(pytree_node=False)

    @property
    def rows(self) -> tuple[Array, Array, Array]:
        return self.ids_NK, self.values_NK, self.rest_N

    def logits(self, rows: tuple[Array, Array, Array], policy: Policy) -> Array:
        """Computes the float32 logits (C, V) of one chunk of C rows."""
        ids_CK, values_CK, rest_C = rows
        numbers_C1 = jnp.arange(len(ids_CK))[:, None]
        whole_CV = jnp.broadcast_to(rest_C[:, None], (len(ids_CK), self.num_classes))
        return whole_CV.at[numbers_C1, ids_CK].set(values_CK)

    def cut(self, num_classes: int) -> Sparse:
        """Returns itself; ValueError for another number of logits, which it cannot give."""
        if num_classes != self.num_classes:
            raise ValueError(f"sparse logits of {self.num_classes} ids cannot be cut")
        return self


def in_chunks(rows: Any, size: int) -> Any:
    """Cuts arrays (N, ...), or a pytree of them, into (chunks, size, ...), filled up with zeros: so
    what is computed of a row exists for one chunk at a time."""

    def cut(array):
        padding = [(0, -len(array) % size)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])

    return jax.tree.map(cut, rows)


def head_of(output: ModelOutput) -> Head:
    """Flattens a language model's output (B, T, ...) into a source of N = B x T rows of logits."""
    features_ND = output.features.reshape(-1, output.features.shape[-1])
    return Head(features_ND, output.unembed_VD, output.bias_V)


def stored(signal: Signal, num_classes: int) -> Source:
    """Flattens logits that came with a batch, (B, T, ...), into a source of N = B x T rows."""
    values_NK = signal.values_BTK.reshape(-1, signal.values_BTK.shape[-1])
    if signal.ids_BTK is None:
        return Head(values_NK, None, None)
    ids_NK = signal.ids_BTK.reshape(values_NK.shape)
    return Sparse(ids_NK, values_NK, signal.rest_BT.reshape(-1), num_classes)


def sparse(logits_CV: Array, k: int) -> Sparse:
    """Keeps the k largest logits of each row; the others share one that keeps their total mass.

    Logits are normalised, so that they are log-probabilities.
    """
    logs_CV = jax.nn.log_softmax(logits_CV, axis=1)
    values_CK, ids_CK = jax.lax.top_k(logs_CV, k)
    numbers_C1 = jnp.arange(len(logs_CV))[:, None]
    others_CV = logs_CV.at[numbers_C1, ids_CK].set(-jnp.inf)
    count = logs_CV.shape[1] - k
    rest_C = jax.nn.logsumexp(others_CV, axis=1) - jnp.log(jnp.float32(max(count, 1)))
    return Sparse(ids_CK.astype(jnp.int32), values_CK, rest_C, logs_CV.shape[1])


class Beside(struct.PyTreeNode):
    """Others whose mean with the student is what the teacher is compared with: `share` (float32
    scalar) of the mean is the student's own, in the space that `others` are averaged in."""

    others: Source
    share: Array
    space: str = struct.field(pytree_node=False, default="logits")


class Guidance(struct.PyTreeNode):
    """What a teacher returns where the student is one of several: its logits, and the others."""

    teacher: Source
    beside: Beside | None


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A chunk's mixture of the student's logits with others'."""

    own_CV: Array
    others_CV: Array
    share: Array
    space: str

    @property
    def logits_CV(self) -> Array:
        """Computes the logits of the mixture, (C, V), float32."""
        if self.space == "logits":
            return self.share * self.own_CV + (1.0 - self.share) * self.others_CV
        logs = [jax.nn.log_softmax(x, axis=1) for x in (self.own_CV, self.others_CV)]
        return jnp.logaddexp(jnp.log(self.share) + logs[0], jnp.log1p(-self.share) + logs[1])

    def pulled_back(self, slope_CV: Array) -> Array:
        """Turns the gradient with respect to the mixture's logits into that of the student's."""
        if self.space == "logits":
            return self.share * slope_CV
        # Of log p = log(share q + ...): d log p_v / d own_u = share q_v / p_v (1[u = v] - q_u).
        own_CV = jax.nn.log_softmax(self.own_CV, axis=1)
        part_CV = slope_CV * jnp.exp(jnp.log(self.share) + own_CV - self.logits_CV)
        return part_CV - jnp.exp(own_CV) * part_CV.sum(axis=1, keepdims=True)


def _product(x_CD: Array, unembed_VD: Array, bias_V: Array | None, policy: Policy) -> Array:
    operand = jnp.dtype(policy.operand)
    logits_CV = jnp.einsum(
        "cd,vd->cv",
        x_CD.astype(operand),
        unembed_VD.astype(operand),
        precision=exact(operand),
        preferred_element_type=jnp.float32,
    )
    return logits_CV if bias_V is None else logits_CV + bias_V.astype(jnp.float32)[None, :]


def _add_logits(sofar_CV, logits_CV, weight):
    return logits_CV if sofar_CV is None else sofar_CV + weight * logits_CV


def _add_probabilities(sofar_CV, logits_CV, weight):
    if sofar_CV is None:
        return logits_CV - jnp.inf
    return jnp.logaddexp(sofar_CV, jnp.log(weight) + jax.nn.log_softmax(logits_CV, axis=1))


SPACES = {"logits": _add_logits, "probabilities": _add_probabilities}
