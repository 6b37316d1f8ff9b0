"""Computes logits chunk by chunk, from a model's head, several models' heads, or stored logits; and
mixes a student's logits with those of other models.

A source has row-wise arrays (`rows`, the rows on the first axis), of which the engine passes a
chunk to `logits`; everything else is the same for every chunk.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from kd_jax import axes
from kd_jax.errors import UserError
from kd_jax.objectives.divergence import MASKED, Columns
from kd_jax.precision import Policy, product, rows_product
from kd_jax.types import Array, ModelOutput, StoredLogits

PADDING = -1e8  # span heads give padding less than this, -1e9


class Source(Protocol):
    """Computes V logits for each of N rows, a chunk of rows at a time."""

    num_classes: int

    @property
    def rows(self) -> Any: ...

    def logits(self, rows: Any, policy: Policy, student_CV: Array | None = None) -> Array:
        """Computes the float32 logits (C, V) of one chunk of C rows, which may depend on the
        student's."""


class Head(struct.PyTreeNode):
    """Holds features and the unembedding that turns them into logits; without one, the features are
    the logits. On a mesh the unembedding may be this device's part of the ids."""

    features_ND: Array
    unembed_VD: Array | None
    bias_V: Array | None
    vocab_size: int | None = struct.field(pytree_node=False, default=None)  # as `ModelOutput`'s

    @property
    def num_classes(self) -> int:
        """Counts the logits of a row, V."""
        if self.unembed_VD is None:
            return self.features_ND.shape[1]
        return self.vocab_size or self.unembed_VD.shape[0]

    @property
    def part(self) -> int:
        """Counts the ids of this device's part of the unembedding; 0 if it has them all."""
        rows = self.num_classes if self.unembed_VD is None else self.unembed_VD.shape[0]
        return rows if rows < self.num_classes else 0

    def columns(self, policy: Policy) -> Columns:
        """Tells which ids this device has, and how `policy` sums over them."""
        start = axes.index(axes.VOCAB).astype(jnp.int32) * self.part if self.part else None
        return Columns(start, policy.on_cpu)

    def whole(self) -> Head:
        """Gathers the unembedding and bias of all ids, if they are parts."""
        output = ModelOutput(self.features_ND, self.unembed_VD, self.bias_V)
        return Head(*output.replace(vocab_size=self.vocab_size).whole())

    @property
    def rows(self) -> Array:
        return self.features_ND

    def logits(self, rows: Array, policy: Policy, student_CV: Array | None = None) -> Array:
        """Computes the float32 logits (C, V) of one chunk of C rows."""
        if self.unembed_VD is None:
            return rows.astype(jnp.float32)
        logits_CV = product("cd,vd->cv", rows, self.unembed_VD, policy.operand)
        return (
            logits_CV if self.bias_V is None else logits_CV + self.bias_V.astype(jnp.float32)[None]
        )

    def pulled_back(self, x_CD: Array, slope_CV: Array, policy: Policy) -> tuple[Array, Any, Any]:
        """Backpropagates a gradient from a chunk's logits to its features (C, D), the unembedding,
        transposed (D, V), and the bias (V,), all in float32."""
        if self.unembed_VD is None:
            return slope_CV, None, None
        slope_CV = slope_CV.astype(policy.operand)
        dx_CD = product("cv,vd->cd", slope_CV, self.unembed_VD, policy.operand)
        db_V = None
        if self.bias_V is not None:  # as a product: XLA's CPU backend sums columns as slowly as it
            # multiplies them with D others; eight rows of ones, since one would become a sum again
            ones_8C = jnp.ones((8, len(slope_CV)), slope_CV.dtype)
            db_V = product("kc,cv->kv", ones_8C, slope_CV, policy.operand)[0]
        return dx_CD, rows_product(x_CD, slope_CV, policy), db_V

    def cut(self, num_classes: int) -> Head:
        """Drops all but the first `num_classes` logits of each row."""
        if self.unembed_VD is None:
            return self.replace(features_ND=self.features_ND[:, :num_classes])
        self = self.whole()
        bias_V = None if self.bias_V is None else self.bias_V[:num_classes]
        return self.replace(unembed_VD=self.unembed_VD[:num_classes], bias_V=bias_V)


class Members(struct.PyTreeNode):
    """Averages E models of one shape with weights: their logits, or the logarithm of their mean
    probabilities."""

    heads: Head  # E on the first axis of each array
    weights_E: Array  # they sum to 1
    space: str = struct.field(pytree_node=False, default="logits")

    @property
    def num_classes(self) -> int:
        """Counts the logits of a row, V."""
        return self.heads.unembed_VD.shape[1]

    @property
    def rows(self) -> Array:
        return self.heads.features_ND.swapaxes(0, 1)

    def logits(self, rows: Array, policy: Policy, student_CV: Array | None = None) -> Array:
        """Computes the mean's float32 logits (C, V), one member after the other."""
        start, join = SPACES[self.space]

        def add(mean_CV, member):
            head, weight = member
            return join(mean_CV, head.logits(head.rows, policy), weight), None

        nothing_CV = jnp.full((len(rows), self.num_classes), start, jnp.float32)
        heads = self.heads.replace(features_ND=rows.swapaxes(0, 1))
        return jax.lax.scan(add, nothing_CV, (heads, self.weights_E))[0]

    def cut(self, num_classes: int) -> Members:
        """Drops all but the first `num_classes` logits of each row."""
        return self.replace(heads=jax.vmap(lambda head: head.cut(num_classes))(self.heads))


# The mean of no logits in each space, and how logits join a mean by their weight.
SPACES = {
    "logits": (0.0, lambda mean_CV, logits_CV, weight: mean_CV + weight * logits_CV),
    "probabilities": (
        -jnp.inf,
        lambda mean_CV, logits_CV, weight: jnp.logaddexp(
            mean_CV, jnp.log(weight) + jax.nn.log_softmax(logits_CV, axis=1)
        ),
    ),
}


class Sparse(struct.PyTreeNode):
    """Holds the K largest logits of each row, and one value for all others of the row.

    `tail` tells where the probability of the other ids, 1 - P, goes in the teacher's distribution:

    uniform: to each of them alike.
    bucket: to them as the student has it, which makes one outcome of them: KL is the sum over the
        K ids and (1 - P) (log(1 - P) - log(1 - Q)), Q the student's probability of the K, and so is
        its gradient (in every divergence; at a temperature, after the split).
    renormalised: nowhere. The K ids have all of it, and a student that matches them is too sure of
        them by 1 / P.
    """

    ids_NK: Array  # int32
    values_NK: Array  # float32
    rest_N: Array  # float32
    num_classes: int = struct.field(pytree_node=False)
    tail: str = struct.field(pytree_node=False, default="uniform")

    @property
    def rows(self) -> tuple[Array, Array, Array]:
        return self.ids_NK, self.values_NK, self.rest_N

    def logits(
        self,
        rows: tuple[Array, Array, Array],
        policy: Policy,
        student_CV: Array | None = None,
    ) -> Array:
        """Computes the float32 logits (C, V) of one chunk of C rows."""
        ids_CK, values_CK, rest_C = rows
        numbers_C1 = jnp.arange(len(ids_CK))[:, None]
        whole_CV = jnp.broadcast_to(rest_C[:, None], (len(ids_CK), self.num_classes))
        if self.tail == "renormalised":
            whole_CV = jnp.full_like(whole_CV, MASKED)
        if self.tail == "bucket" and student_CV is not None:
            student_CV = student_CV[:, : self.num_classes]
            others_CV = student_CV.at[numbers_C1, ids_CK].set(-jnp.inf)
            count = self.num_classes - ids_CK.shape[1]
            own_C1 = jax.nn.logsumexp(others_CV, axis=1, keepdims=True) - jnp.log(float(count))
            whole_CV = whole_CV + student_CV - own_C1
        return whole_CV.at[numbers_C1, ids_CK].set(values_CK)


class Drawn(struct.PyTreeNode):
    """Holds ids of each row that were drawn by the teacher's probabilities, with replacement.

    The target is the share of the draws that an id has, whose mean over draws is the teacher's
    distribution: the gradient of forward KL has no bias. Anshumann et al., "Sparse Logit Sampling:
    Accelerating Knowledge Distillation in LLMs" (RS-KD), arXiv:2503.16870, section 4, with draws
    from the distribution itself.
    """

    ids_NK: Array  # int32
    num_classes: int = struct.field(pytree_node=False)

    @property
    def rows(self) -> Array:
        return self.ids_NK

    def logits(self, rows: Array, policy: Policy, student_CV: Array | None = None) -> Array:
        """Computes the logarithms of the draws' shares (C, V); MASKED for ids without any."""
        numbers_C1 = jnp.arange(len(rows))[:, None]
        counts_CV = jnp.zeros((len(rows), self.num_classes)).at[numbers_C1, rows].add(1.0)
        shares_CV = jnp.log(jnp.maximum(counts_CV, 1.0) / rows.shape[1])
        return jnp.where(counts_CV > 0, shares_CV, MASKED)


def in_chunks(rows: Any, size: int) -> Any:
    """Cuts arrays (N, ...), or a pytree of them, into (chunks, size, ...), filled up with zeros."""

    def cut(array):
        padding = [(0, -len(array) % size)] + [(0, 0)] * (array.ndim - 1)
        return jnp.pad(array, padding).reshape(-1, size, *array.shape[1:])

    return jax.tree.map(cut, rows)


def head_of(output: ModelOutput) -> Head:
    """Flattens a language model's output (B, T, ...) into a source of N = B x T rows of logits."""
    features_ND = output.features.reshape(-1, output.features.shape[-1])
    return Head(features_ND, output.unembed_VD, output.bias_V, output.vocab_size)


def stored(logits: StoredLogits, num_classes: int, tail: str = "uniform") -> Source:
    """Flattens a batch's stored logits, (B, T, ...), into a source of N = B x T rows; `tail` is
    that of `Sparse`."""
    if logits.values_BPK is None:
        return Drawn(logits.ids_BPK.reshape(-1, logits.ids_BPK.shape[-1]), num_classes)
    values_NK = logits.values_BPK.reshape(-1, logits.values_BPK.shape[-1])
    if logits.ids_BPK is None:
        return Head(values_NK, None, None)
    ids_NK = logits.ids_BPK.reshape(values_NK.shape)
    return Sparse(ids_NK, values_NK, logits.rest_BP.reshape(-1), num_classes, tail)


def sparse(logits_CV: Array, k: int) -> Sparse:
    """Keeps the k largest logits of each row, as log-probabilities; the others share one value that
    keeps their total probability."""
    logs_CV = jax.nn.log_softmax(logits_CV, axis=1)
    values_CK, ids_CK = jax.lax.top_k(logs_CV, k)
    numbers_C1 = jnp.arange(len(logs_CV))[:, None]
    others_CV = logs_CV.at[numbers_C1, ids_CK].set(-jnp.inf)
    count = logs_CV.shape[1] - k
    rest_C = jax.nn.logsumexp(others_CV, axis=1) - jnp.log(jnp.float32(max(count, 1)))
    return Sparse(ids_CK.astype(jnp.int32), values_CK, rest_C, logs_CV.shape[1])


def draw(logits_CV: Array, count: int, seeds_C: Array) -> Array:
    """Draws ids by their probabilities, with replacement, int32 (C, count); -1 where logits are not
    finite. The draws are a function of a row's logits and seed (uint32)."""
    mass_CV = jnp.cumsum(jax.nn.softmax(logits_CV, axis=1), axis=1)
    uniform = jax.vmap(lambda seed: jax.random.uniform(jax.random.key(seed), (count,)))
    at_CK = uniform(seeds_C) * mass_CV[:, -1:]
    ids_CK = jax.vmap(lambda mass_V, at_K: jnp.searchsorted(mass_V, at_K, side="right"))
    found_CK = jnp.minimum(ids_CK(mass_CV, at_CK), logits_CV.shape[1] - 1).astype(jnp.int32)
    return jnp.where(jnp.isfinite(mass_CV[:, -1:]), found_CK, -1)


class Others(struct.PyTreeNode):
    """Holds the other members of an ensemble, whose mean with the student is compared with the
    teacher. The student's weight in the mean is `share` (float32 scalar), in the space (logits or
    probabilities) in which `source` was averaged."""

    source: Source
    share: Array
    space: str = struct.field(pytree_node=False, default="logits")

    @property
    def rows(self) -> Any:
        return self.source.rows

    def mixture(self, student_CV: Array, rows: Any, policy: Policy) -> Mixture:
        """Mixes the student's logits of a chunk with the others', over their common ids."""
        others_CV = self.source.logits(rows, policy)
        width = min(student_CV.shape[1], others_CV.shape[1])
        return Mixture(student_CV[:, :width], others_CV[:, :width], self.share, self.space)


class Targets(struct.PyTreeNode):
    """Holds the targets of a student in an ensemble: logits of the teacher and of other members."""

    teacher: Source
    others: Others | None


def sources_of(
    student: ModelOutput, teacher: ModelOutput | Targets | None
) -> tuple[Head, Source | None, Others | None]:
    """Makes the sources of the logits of student, teacher and others, each over all of its ids.

    Vocabularies may share only some ids, but classes must be the same: raises UserError if two
    classification heads differ in their number of classes.
    """
    ours, theirs, others = head_of(student), None, None
    if isinstance(teacher, Targets):
        theirs, others = jax.lax.stop_gradient((teacher.teacher, teacher.others))
    elif teacher is not None:
        theirs = head_of(jax.lax.stop_gradient(teacher))
    alike = theirs is None or (isinstance(theirs, Head) and theirs.part == ours.part)
    if not (ours.part and alike and others is None):  # only parts of the same ids can be compared
        ours = ours.whole()
        theirs = theirs.whole() if isinstance(theirs, Head) else theirs
    if theirs is None or isinstance(teacher, Targets):
        return ours, theirs, others
    if ours.unembed_VD is None and theirs.unembed_VD is None:
        if ours.num_classes != theirs.num_classes:
            raise UserError(
                f"the student's head gives {ours.num_classes} logits a row and the teacher's "
                f"{theirs.num_classes}: both need the same classes (or tokens)"
            )
        fixed_ND = jax.lax.stop_gradient(ours.features_ND)
        theirs_ND = jnp.where(fixed_ND < PADDING, fixed_ND, theirs.features_ND)
        theirs = theirs.replace(features_ND=theirs_ND)
    return ours, theirs, None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Averages a chunk's logits of the student, with weight `share`, and those of others."""

    student_CV: Array
    others_CV: Array
    share: Array
    space: str

    @property
    def logits_CV(self) -> Array:
        """Computes the logits of the mixture, (C, V), float32."""
        if self.space == "logits":
            return self.share * self.student_CV + (1.0 - self.share) * self.others_CV
        logs = [jax.nn.log_softmax(x, axis=1) for x in (self.student_CV, self.others_CV)]
        return jnp.logaddexp(jnp.log(self.share) + logs[0], jnp.log1p(-self.share) + logs[1])

    def pulled_back(self, slope_CV: Array) -> Array:
        """Backpropagates a gradient from the mixture's logits to the student's."""
        if self.space == "logits":
            return self.share * slope_CV
        # log p = log(share q + ...): d log p_v / d student_u = share q_v / p_v (1[u = v] - q_u).
        log_q_CV = jax.nn.log_softmax(self.student_CV, axis=1)
        moved_CV = slope_CV * jnp.exp(jnp.log(self.share) + log_q_CV - self.logits_CV)
        return moved_CV - jnp.exp(log_q_CV) * moved_CV.sum(axis=1, keepdims=True)
