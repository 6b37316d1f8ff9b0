"""Tensors that are read only when they are placed, and only the parts that are asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[slice, ...]  # of every axis


@dataclasses.dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor known by its shape and type, whose values are read part by part.

    A leaf of trees of parameters, also for `jax.eval_shape`; jax.jit refuses it. NumPy reads all of
    it. What `part` returns is converted to `dtype`, and copied if it is a view (of a file).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    part: Callable[[Index], np.ndarray]  # by slices from START to STOP; of any type

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def read(self, index: Index = ()) -> np.ndarray:
        """Reads a part of the tensor, by slices of its first axes: what
        `jax.make_array_from_callback` asks for."""
        rest = (slice(None),) * (self.ndim - len(index))
        pairs = zip((*index, *rest), self.shape, strict=True)
        found = self.part(tuple(slice(*own.indices(size)) for own, size in pairs))
        return found.astype(self.dtype, copy=not found.flags.owndata)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads the whole tensor and indexes it: for small ones."""
        return self.read()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read() if dtype is None else self.read().astype(dtype, copy=False)

    def astype(self, dtype: Any) -> LazyTensor:
        """Changes the type of what is read, which is converted once, from the file's own type."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def checked(self, check: Callable[[np.ndarray, Index], None]) -> LazyTensor:
        """Calls `check` with every part that is read, in its own type, and its place."""

        def part(index: Index) -> np.ndarray:
            found = self.part(index)
            check(found, index)
            return found

        return dataclasses.replace(self, part=part)

    def __mul__(self, factor: float) -> LazyTensor:
        return dataclasses.replace(self, part=lambda index: self.read(index) * factor)

    def padded(self, rows: int) -> LazyTensor:
        """Appends rows of zeros along the first axis, up to `rows`."""
        have = self.shape[0]

        def part(index: Index) -> np.ndarray:
            first, *rest = index
            found = self.read((slice(min(first.start, have), min(first.stop, have)), *rest))
            missing = first.stop - first.start - len(found)
            return np.pad(found, [(0, missing), *[(0, 0)] * len(rest)])

        return dataclasses.replace(self, shape=(rows, *self.shape[1:]), part=part)


def of_array(array: np.ndarray, dtype: Any) -> LazyTensor:
    """Makes a lazy tensor of an array, or of a view of a file that is mapped into memory."""
    return LazyTensor(array.shape, np.dtype(dtype), lambda index: array[index])


def stacked(tensors: Sequence[Any]) -> Any:
    """Stacks tensors of one shape and type along a new first axis, lazy ones lazily."""
    first = tensors[0]
    if not isinstance(first, LazyTensor):
        return (np if isinstance(first, np.ndarray) else jnp).stack(tensors)

    def part(index: Index) -> np.ndarray:
        chosen, rest = tensors[index[0]], index[1:]
        sizes = [own.stop - own.start for own in rest]
        found = np.empty((len(chosen), *sizes), first.dtype)
        for place, tensor in zip(found, chosen, strict=True):
            place[...] = tensor.read(rest)
        return found

    return LazyTensor((len(tensors), *first.shape), first.dtype, part)


def with_rows(array: Any, rows: int) -> Any:
    """Pads an array of any kind with rows of zeros at the end of its first axis, or cuts it."""
    have = array.shape[0]
    if have >= rows:
        return array if have == rows else array[:rows]
    if isinstance(array, LazyTensor):
        return array.padded(rows)
    xp = np if isinstance(array, np.ndarray) else jnp
    return xp.pad(array, [(0, rows - have)] + [(0, 0)] * (array.ndim - 1))


def is_lazy(tree: Any) -> bool:
    """Tells whether a tree of parameters has lazy tensors."""
    return any(isinstance(leaf, LazyTensor) for leaf in jax.tree.leaves(tree))
