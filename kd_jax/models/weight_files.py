"""Reads and writes files of tensors by name: safetensors, in one file or several with an index, and
PyTorch's pickles. Nothing is read before it is used, and nothing is written all at once."""

import json
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from kd_jax.errors import UserError

# In the order of preference; an index names the files of a checkpoint in several.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FILE_BYTES = 5_000_000_000  # of one file that is written, at most, unless one tensor is larger
_TYPES = {
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "BOOL": np.bool_,
    **{f"F{8 * size}": np.dtype(f"<f{size}") for size in (2, 4, 8)},
    **{f"I{8 * size}": np.dtype(f"<i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
}


class Stored(NamedTuple):
    """A tensor of a file."""

    array: np.ndarray  # mapped into memory
    where: str  # "FILE: NAME", for messages


def read(folder: Path) -> dict[str, Stored]:
    """Maps all tensors of a checkpoint folder into memory, by the names in its files.

    Raises UserError for missing, truncated and other files.
    """
    name = next((name for name in WEIGHTS if (folder / name).exists()), None)
    if name is None:
        have = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UserError(f"{folder}: no weights; want {' or '.join(WEIGHTS)}, have {have}")
    if not name.endswith(".index.json"):
        return _read_file(folder / name)
    file_of = _read_index(folder / name)
    found = {}
    for file in sorted(set(file_of.values())):
        found |= _read_file(folder / file)
    absent = sorted(file_of.keys() - found.keys())
    if absent:
        raise UserError(f"{folder / name}: its files lack {', '.join(list_names('-', absent))}")
    return found


def list_names(sign: str, names: list[str]) -> list[str]:
    """Returns the first few names, each with a sign in front."""
    more = [f"{sign} {len(names) - 6} more"] if len(names) > 6 else []
    return [f"{sign} {name}" for name in names[:6]] + more


def _read_index(path: Path) -> dict[str, str]:
    """Reads which file holds each tensor from an index file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(file, str) for file in found.values()):
            return found
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(
        f"{path}: its weight_map should give the file of each tensor by name; download it again"
    )


def _read_file(path: Path) -> dict[str, Stored]:
    if not path.exists():
        raise UserError(f"{path}: missing, though the index names it; download it again")
    arrays = _read_torch(path) if path.suffix == ".bin" else _read_safetensors(path)
    return {name: Stored(array, f"{path}: {name}") for name, array in arrays.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np"):  # checks sizes and offsets
            pass
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{path}: truncated or not safetensors ({error}); download it again"
        ) from None
    with path.open("rb") as file:
        start = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start))
    header.pop("__metadata__", None)
    data, found = np.memmap(path, np.uint8, mode="r")[8 + start :], {}
    for name, about in header.items():
        if about["dtype"] not in _TYPES:
            have = ", ".join(_TYPES)
            raise UserError(f"{path}: {name} is of type {about['dtype']}; have: {have}")
        first, end = about["data_offsets"]
        found[name] = data[first:end].view(_TYPES[about["dtype"]]).reshape(about["shape"])
    return found


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            f"{path}: reading it needs torch; pip install torch, or convert it to safetensors"
        ) from None
    try:
        mapped = zipfile.is_zipfile(path)  # PyTorch's older format cannot be mapped
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: truncated, or more than weights ({reason})") from None
    if not isinstance(found, dict) or not found:
        what = f"a {type(found).__name__}" if found or not isinstance(found, dict) else "nothing"
        raise UserError(f"{path}: holds {what}, no tensors by name; save model.state_dict() there")
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise UserError(
            f"{path}: holds more than tensors ({', '.join(others[:6])}); save model.state_dict() "
            f"alone there"
        )
    half = torch.bfloat16  # which PyTorch cannot give to NumPy
    return {
        str(name): tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == half
        else tensor.detach().numpy()
        for name, tensor in found.items()
    }


def write(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], arrays: Iterable[np.ndarray]
) -> None:
    """Writes float32 tensors to model.safetensors, one after the other; more than `FILE_BYTES` of
    them to several files with an index.

    Args:
        folder: the folder of the files.
        shapes: their shapes by name.
        arrays: the tensors, in the order of `shapes`.
    """
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    parts: list[dict[str, int]] = [{}]
    for name, size in sizes.items():
        if parts[-1] and sum(parts[-1].values()) + size > FILE_BYTES:
            parts.append({})
        parts[-1][name] = size
    names = [f"model-{i:05}-of-{len(parts):05}.safetensors" for i in range(1, len(parts) + 1)]
    names = names if len(parts) > 1 else ["model.safetensors"]
    given = iter(arrays)
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part, shapes, given)
    if len(parts) > 1:
        files = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_file(
    path: Path,
    sizes: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    arrays: Iterator[np.ndarray],
) -> None:
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, size in sizes.items():
        offsets = [end, end + size]
        header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": offsets}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sizes:
            array = next(arrays)
            if array.shape != tuple(shapes[name]):
                raise ValueError(f"{name} has shape {array.shape}, want {shapes[name]}")
            file.write(np.ascontiguousarray(array, "<f4").data)
