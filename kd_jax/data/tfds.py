"""Reads datasets prepared by TensorFlow Datasets, without TensorFlow."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from kd_jax.data import identity
from kd_jax.data.source import Documents, Records, check_text, from_rows
from kd_jax.errors import UserError


def documents(spec: dict, where: str) -> Documents:
    """Opens documents, one for each row: its feature `spec["text"]`. `spec["path"]` is a dataset's
    name ("wiki40b/en", looked for in $TFDS_DATA_DIR or ~/tensorflow_datasets) or the folder of a
    prepared dataset.

    The dataset must have been prepared in a format with random access. Raises UserError for an
    unknown or unprepared dataset, an unknown split or feature.
    """
    import tensorflow_datasets as tfds

    table, features, stamp = _load(spec, where)
    name, column = _name(spec), spec["text"]
    columns = {each: isinstance(features[each], tfds.features.Text) for each in features}
    check_text(name, columns, column, where)

    def read() -> Iterator[str]:
        return from_rows(table[row][column].decode() for row in range(len(table)))

    return Documents(name, read, stamp=stamp)


def rows(spec: dict, where: str) -> Records:
    """Opens the rows of the split with all features, classes as their numbers. Raises UserError
    like `documents`."""
    table, _, stamp = _load(spec, where)
    name = _name(spec)

    def read() -> Iterator[tuple[str, dict]]:
        return ((f"{name}, row {row}", _plain(table[row])) for row in range(len(table)))

    return Records(name, read, stamp=stamp)


def _name(spec: dict) -> str:
    return f"tfds {spec['path']}:{spec['split']}"


def _plain(value: Any) -> Any:
    """Converts bytes to text and NumPy values to Python's, also in nested values."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    return [_plain(part) for part in value] if isinstance(value, list) else value


def _load(spec, where):
    """Loads a split: returns (the split, with random access; the dataset's features; what makes
    its stamp)."""
    import tensorflow_datasets as tfds

    path, split = spec["path"], spec["split"]
    try:
        if os.path.isdir(path):
            builder = tfds.builder_from_directory(path)
        else:
            builder = tfds.builder(path)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"no tfds dataset {path!r} (config.{where}.path): {reason}") from error
    splits = list(builder.info.splits)
    if not splits:
        raise UserError(
            f"tfds dataset {path!r} is not prepared in {builder.data_dir}: run `tfds build {path} "
            f"--file_format=array_record`, or set TFDS_DATA_DIR to the folder that holds it"
        )
    try:
        table = builder.as_data_source(split)
    except ValueError as error:
        raise UserError(
            f"tfds dataset {path!r}, split {split!r} (config.{where}.split): {error}; "
            f"have: {', '.join(splits)}"
        ) from error
    folder = Path(builder.data_dir)
    return table, builder.info.features, lambda: identity.of_files(sorted(folder.iterdir()))
