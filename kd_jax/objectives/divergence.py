"""Defines divergences between rows of student and teacher logits, which the engine runs in chunks.

A divergence is a pure function of each row's student logits, teacher logits and label. It works in
two phases, so that all divergences of a run share one pass over the vocabulary: first every one
names the sums over the vocabulary that it needs (`sums`), and the engine computes them together,
each once; then it turns them into values and the gradient with respect to the student's logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp

from kd_jax import axes, bisection
from kd_jax.types import Array

MASKED = -1e9  # the logit of an id that does not count
BLOCK = 64  # summands of a sum; it divides most vocabularies
Temperature = float | Array  # a float is static, an array is traced (a schedule, a sweep)
Sums = dict[Hashable, Array]


def _reduced(arrays: tuple[Array, ...], first: float, join: Any, cut: bool) -> tuple[Array, ...]:
    """Reduces arrays over their last axis in one pass; with `cut`, block by block.

    Sums of several arrays XLA's CPU backend takes number by number, which rounds those of 50,000 to
    1e-4 of their size, or to 1e-6 with fast math; where it may, it makes one sum of a sum of sums.
    On a TPU blocks of arrays would be written out, and a step would take 1.8 times as long.
    """
    width = arrays[0].shape[-1]
    starts = tuple(jnp.float32(first) for _ in arrays)
    both = lambda left, right: tuple(map(join, left, right))  # noqa: E731
    if cut and width > BLOCK:
        fill = [(0, 0)] * (arrays[0].ndim - 1) + [(0, -width % BLOCK)]
        filled = (jnp.pad(array, fill, constant_values=first) for array in arrays)
        blocks = tuple(x.reshape(*x.shape[:-1], -1, BLOCK) for x in filled)
        blocks = jax.lax.reduce(blocks, starts, both, (blocks[0].ndim - 1,))
        return _reduced(jax.lax.optimization_barrier(blocks), first, join, cut)
    return jax.lax.reduce(arrays, starts, both, (arrays[0].ndim - 1,))


@dataclasses.dataclass(frozen=True)
class Columns:
    """Tells which ids the columns of a chunk's logits belong to: all, or on a mesh this device's
    part of them, from `start` (int32 scalar) on; the rest is on other devices along `axes.VOCAB`.
    """

    start: Array | None = None
    blocks: bool = True  # whether sums over several arrays go block by block, as a CPU needs it

    @property
    def axes(self) -> tuple[str, ...]:
        """Names the mesh axes over which sums over the vocabulary go."""
        return () if self.start is None else axes.VOCAB

    def ids(self, shape: tuple[int, int]) -> Array:
        """Lists the id of each column, int32 (C, V)."""
        ids_CV = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        return ids_CV if self.start is None else ids_CV + self.start

    def below(self, logits_CV: Array, size: int) -> Array:
        """Leaves out ids from `size` on: cuts them off, or in a part masks them, so that parts of
        all models stay aligned."""
        if self.start is None:
            return logits_CV[:, :size]
        return jnp.where(self.ids(logits_CV.shape) < size, logits_CV, MASKED)

    def total(self, array_CV: Array) -> Array:
        """Sums over the vocabulary, (C, 1)."""
        return axes.summed(jnp.sum(array_CV, axis=1, keepdims=True), self.axes)

    def reduced(self, arrays: dict[Hashable, Array], join: Any) -> Sums:
        """Reduces each array over the vocabulary, (C, V) -> (C, 1), by `jax.lax.max` or `add`, in
        one pass over arrays of one width, and then over devices.

        If they were separate, XLA's CPU backend would fuse a maximum into the product that makes
        the logits, and halve that product's speed.
        """
        first, over_devices = {
            jax.lax.max: (-jnp.inf, axes.largest),
            jax.lax.add: (0.0, axes.total),
        }[join]
        found = {}
        for width in dict.fromkeys(array.shape[1] for array in arrays.values()):
            group = {key: array for key, array in arrays.items() if array.shape[1] == width}
            own = _reduced(tuple(group.values()), first, join, self.blocks)
            rows = over_devices(own, self.axes)
            found |= {key: row_C[:, None] for key, row_C in zip(group, rows, strict=True)}
        return found


class Softmax:
    """Holds one model's logits (C, V), with the shifted exponentials that several terms share."""

    def __init__(
        self,
        name: str,
        logits_CV: Array,
        max_C1: Array,
        powers: frozenset[int],
        columns: Columns = Columns(),
    ):
        self.name = name
        self.columns = columns
        self.logits_CV = logits_CV
        # The largest is 0: what depends on no offset of the logits is not rounded at its size.
        self.max_C1 = max_C1
        self.shifted_CV = logits_CV - self.max_C1
        self._powers = powers  # integer temperatures of the run; exp(x) = exp(x / k) ** k
        self._kept: dict[Hashable, Array] = {}

    def exp(self, temperature: Temperature) -> Array:
        """Computes exp((logits - max) / temperature), (C, V), cached by temperature."""
        key = key_of(temperature)
        if key not in self._kept:
            root = min((k for k in self._powers if k > 1), default=None)
            if key == 1.0 and root is not None:
                self._kept[key] = jax.lax.integer_pow(self.exp(float(root)), root)
            else:
                self._kept[key] = jnp.exp(self.shifted_CV / temperature)
        return self._kept[key]

    def normalizer(self, temperature: Temperature) -> Sums:
        """Lists the sum over the vocabulary that `probs` and `log_normalizer` need, by its key."""
        return {(self.name, key_of(temperature)): self.exp(temperature)}

    def probs(self, temperature: Temperature, sums: Sums) -> Array:
        """Computes softmax(logits / temperature), (C, V)."""
        return self.exp(temperature) / sums[self.name, key_of(temperature)]

    def log_normalizer(self, temperature: Temperature, sums: Sums) -> Array:
        """Computes logsumexp(shifted logits / temperature), (C, 1)."""
        return jnp.log(sums[self.name, key_of(temperature)])

    def log_probs(self, temperature: Temperature, sums: Sums) -> Array:
        """Computes log_softmax(logits / temperature), (C, V)."""
        return self.shifted_CV / temperature - self.log_normalizer(temperature, sums)

    def surprise(self) -> Sums:
        """Lists the sum that `entropy` needs in addition to the normalizer at temperature 1."""
        return {("surprise", self.name): self.exp(1.0) * self.shifted_CV}

    def entropy(self, sums: Sums) -> Array:
        """Computes the entropy of the distribution at temperature 1 in nats, (C, 1)."""
        mean_C1 = sums["surprise", self.name] / sums[self.name, key_of(1.0)]
        return self.log_normalizer(1.0, sums) - mean_C1

    def gap(self, other: Softmax, temperature: Temperature) -> Sums:
        """Lists the sum that `kl` needs in addition to the normalizers, over the vocabulary:
        exp(s / T) (s - o), where s and o are the shifted logits of this model and the other."""
        gap_CV = self.shifted_CV - other.shifted_CV
        return {("gap", self.name, other.name, key_of(temperature)): self.exp(temperature) * gap_CV}

    def at(self, ids_C1: Array) -> Array:
        """Looks up the shifted logit of an id of each row, (C, 1)."""
        columns, logits_CV = self.columns, self.logits_CV
        if columns.start is None:
            return jnp.take_along_axis(logits_CV, ids_C1, axis=1) - self.max_C1
        own_C1 = ids_C1 - columns.start
        here_C1 = (own_C1 >= 0) & (own_C1 < logits_CV.shape[1])
        own_C1 = jnp.clip(own_C1, 0, logits_CV.shape[1] - 1)
        logit_C1 = jnp.where(here_C1, jnp.take_along_axis(logits_CV, own_C1, axis=1), 0.0)
        return axes.summed(logit_C1, columns.axes) - self.max_C1

    def likeliest(self, mass: float, temperature: Temperature, sums: Sums) -> Array:
        """Marks each row's most probable ids that have at most `mass` together, and the first one,
        bool (C, V). Ids of equal probability are marked together. Exact, and without sorting."""
        key = "likeliest", mass, key_of(temperature)
        if key not in self._kept:
            exp_CV = self.exp(temperature)
            most_C1 = mass * sums[self.name, key_of(temperature)]

            def too_many(least_C1: Array) -> Array:
                kept_CV = jnp.where(exp_CV >= least_C1, exp_CV, 0.0)
                return self.columns.total(kept_CV) > most_C1

            beyond_C1 = bisection.border(too_many, most_C1.shape)
            # The most probable one has exponential 1, and is marked whatever it has.
            self._kept[key] = (exp_CV > beyond_C1) | (exp_CV >= 1.0)
        return self._kept[key]

    def mean_gap(self, other: Softmax, temperature: Temperature, sums: Sums) -> Array:
        """Computes the mean of (s - o) / T under this distribution (see `gap`), (C, 1)."""
        key = key_of(temperature)
        return sums["gap", self.name, other.name, key] / sums[self.name, key] / temperature

    def first_choice(self) -> Array:
        """Finds the most likely id of each row, the first in a tie, int32 (C,)."""
        if self.columns.start is None:
            return jnp.argmax(self.logits_CV, axis=1)
        ids_CV = self.columns.ids(self.logits_CV.shape)
        best_CV = jnp.where(self.logits_CV == self.max_C1, -ids_CV, jnp.iinfo(jnp.int32).min)
        return -axes.largest(best_CV.max(axis=1), self.columns.axes)

    def kl(self, other: Softmax, temperature: Temperature, sums: Sums) -> Array:
        """Computes KL(this || other) of the softened distributions in nats, (C, 1)."""
        return self.mean_gap(other, temperature, sums) + (
            other.log_normalizer(temperature, sums) - self.log_normalizer(temperature, sums)
        )


def key_of(temperature: Temperature) -> Hashable:
    """Makes the cache key of a temperature: equal constants share one, traced ones do not."""
    return float(temperature) if isinstance(temperature, int | float) else id(temperature)


@dataclasses.dataclass
class Rows:
    """Holds the logits and labels of one chunk of rows, the inputs of a divergence."""

    student: Softmax
    teacher: Softmax | None  # over as many ids as the student here
    labels_C: Array  # int32; float32 for a regression
    whole_teacher: Softmax | None = None  # over all of its ids
    shared: int = 0  # ids that student and teacher share
    written_C: Array | None = None  # `Batch.written`

    def student_at_label(self) -> Array:
        """Looks up the student's shifted logit of each row's label, (C, 1)."""
        return self.student.at(self.labels_C[:, None])

    def is_label(self) -> Array:
        """Marks each row's label, bool (C, V)."""
        ids_CV = self.student.columns.ids(self.student.logits_CV.shape)
        return ids_CV == self.labels_C[:, None]

    def total(self, array_CV: Array) -> Array:
        """Sums over the vocabulary, (C, 1)."""
        return self.student.columns.total(array_CV)

    def through_softmax(self, p_CV: Array, slope_CV: Array) -> Array:
        """Backpropagates a gradient from the student's probabilities to its logits, (C, V)."""
        return p_CV * (slope_CV - self.total(p_CV * slope_CV))


class Divergence:
    """Base of the row-wise terms: frozen dataclasses, so that a run's terms are a static argument.

    `needs_teacher` tells whether `rows.teacher` is read, `of_written` whether labels have to be
    words that the student wrote itself, `has_temperature` whether the config may set a temperature
    (by default `usual_temperature`), `suits` whether the logits may be those of classes or the
    single output of a regression, `of_probabilities` that adding a constant to a row's logits
    changes nothing, `needs_all_ids` that it is infinite where the teacher gives an id no
    probability.
    """

    needs_teacher = True
    of_written = False
    has_temperature = True
    usual_temperature = 1.0
    suits = ("classes",)
    of_probabilities = True
    needs_all_ids = False

    def sums(self, rows: Rows, temperature: Temperature) -> Sums:
        """Lists arrays (C, V) to be summed over the vocabulary; equal sums have equal keys."""
        raise NotImplementedError

    def value(self, rows: Rows, sums: Sums, temperature: Temperature) -> Array:
        """Computes each row's divergence in nats, (C, 1); `sums` holds (C, 1) arrays."""
        raise NotImplementedError

    def grad(self, rows: Rows, sums: Sums, temperature: Temperature) -> Array:
        """Computes d value / d student logits, (C, V), by autodiff; override it for speed."""

        def total(logits_CV):
            own = rows.student
            student = Softmax(own.name, logits_CV, own.max_C1, frozenset(), own.columns)
            moved = dataclasses.replace(rows, student=student)
            named = self.sums(moved, temperature)
            fresh = {name: rows.total(array_CV) for name, array_CV in named.items()}
            return jnp.sum(self.value(moved, fresh, temperature))

        return jax.grad(total)(rows.student.logits_CV)


@dataclasses.dataclass(frozen=True)
class Softened(Divergence):
    """Base of divergences between p = softmax(student / T) and q = softmax(teacher / T).

    T^2 keeps the size of the gradient independent of T; `t_squared=False` leaves it out.
    """

    t_squared: bool = True

    def sums(self, rows: Rows, temperature: Temperature) -> Sums:
        return {**rows.student.normalizer(temperature), **rows.teacher.normalizer(temperature)}

    def _factor(self, temperature: Temperature) -> Temperature:
        """Computes the factor of the value: T^2, or 1 without `t_squared`."""
        return temperature**2 if self.t_squared else 1.0

    def _slope(self, temperature: Temperature) -> Temperature:
        """Computes the factor of the gradient: that of the value, divided by T."""
        return temperature if self.t_squared else 1.0 / temperature
