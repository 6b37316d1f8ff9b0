"""Writes arrays that grow to .npy files, and reads them by memory maps."""

from pathlib import Path

import numpy as np


def type_of_ids(size: int) -> np.dtype:
    """Chooses the type in which ids below `size` are kept: uint16 where it fits, else int32."""
    return np.dtype(np.uint16 if size <= 2**16 else np.int32)


class Growing:
    """A .npy file of an array whose first axis grows; complete when the `with` block ends."""

    def __init__(self, file: Path, dtype: np.dtype | type, *row: int) -> None:
        """Takes the type, and the shape of one row: () for a vector."""
        self.count = 0  # rows so far
        self._file, self._dtype, self._row = file, np.dtype(dtype), row

    def __enter__(self) -> "Growing":
        self._stream = self._file.open("wb")
        self._header()
        return self

    def append(self, array: np.ndarray) -> None:
        """Appends rows, converted to the type of the file."""
        self._stream.write(np.ascontiguousarray(array, self._dtype).tobytes())
        self.count += len(array)

    def __exit__(self, *_: object) -> None:
        self._stream.seek(0)
        self._header()
        self._stream.close()

    def _header(self) -> None:
        # NumPy leaves room for the first axis to grow, so the header's length does not change.
        shape = (self.count, *self._row)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, header)


def load(file: Path) -> np.ndarray:
    """Reads a .npy file as it is needed: its pages belong to the system, not to the process."""
    return np.load(file, mmap_mode="r")
