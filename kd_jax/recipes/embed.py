"""Computes the vectors of a file of texts, with a sentence embedder.

Texts are read some thousands at a time, in batches of similar length. What is done is kept next to
the output, so that the same command continues after an interruption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kd_jax import storage
from kd_jax.data import encoded
from kd_jax.data.loader import BucketStream
from kd_jax.errors import UserError
from kd_jax.models import embedder, family
from kd_jax.ranges import Whole
from kd_jax.recipes.predict import AT_ONCE, buckets_of, check_finite, shown
from kd_jax.run import subject
from kd_jax.run.subject import Subject
from kd_jax.tasks import prediction
from kd_jax.tasks.prediction import Input
from kd_jax.train.passes import predict
from kd_jax.train.progress import ProgressBar

SUFFIXES = (".npy", ".parquet")


@dataclasses.dataclass(frozen=True)
class Options:
    """Optional settings; None takes the default."""

    text: str | None = None  # column of the text: "text"
    prompt_name: str | None = None  # of the folder's prompts: its default one, if it has one
    prompt: str | None = None  # what every text begins with, in place of these
    dimensions: int | None = None  # of a vector, the first ones: as the folder says, mostly all
    batch_size: int | None = None  # rows over all devices: 32
    precision: str | None = None  # fp32 | bf16: fp32
    delimiter: str | None = None  # of a .csv or .tsv: see data/source.py
    keep_empty: bool = False  # rows without text: True keeps them, with a vector of NaN


def embed_file(
    open_model: Callable[[], Subject], source: str, target: str, options: Options
) -> dict[str, Any]:
    """Writes the vectors of the texts of the file `source` to the file `target`.

    Args:
        open_model: opens an embedder, as `checkpoint` does.
        source: a file as `prediction.texts` reads it.
        target: a .npy, float32 (N, D), or a .parquet with `index`, the number of the text from 0,
            `id` if the input has ids, and `vector`; both in the order of the input.

    Returns {"model", "commit", "rows", "dimensions", "seconds", "output"}. Raises UserError for
    mistakes in any of these before anything is computed or written.
    """
    began = time.perf_counter()
    read, written = Path(source).expanduser(), Path(target).expanduser()
    prediction.check_output(written, read, SUFFIXES)
    batch_size = subject.rows(options.batch_size)
    own = _cut(open_model(), options.dimensions)
    config, prompt = own.described.config, _prompt(own, options)
    found = prediction.texts(read, options.text, None, options.delimiter, options.keep_empty)
    texts = [prompt + text for text in found.examples.first]
    batch_size = subject.rows_for(len(texts), batch_size)
    most = config.texts.max_tokens or own.tokenizer.model_max_length
    seq_len = min(most, config.max_tokens)
    student, mesh = own.frozen
    about = dict(
        model=own.digest,
        texts=texts,
        read=[own.tokenizer.backend_tokenizer.to_str(), seq_len, sorted(found.empty)],
    )
    done, buckets = storage.Arrays(written, about), ()
    with contextlib.closing(ProgressBar("embed", 0, len(texts))) as bar:
        for start in range(0, len(texts), AT_ONCE):
            part = slice(start, min(start + AT_ONCE, len(texts)))
            if done.read(start) is not None:
                continue
            labels_N1 = np.zeros((part.stop - start, 1), np.int32)
            rows = encoded.encode(own.tokenizer, texts[part], None, labels_N1, seq_len)
            buckets = buckets or buckets_of(rows, seq_len, batch_size, len(texts) > AT_ONCE)
            stream = BucketStream(rows.lengths_N, buckets, rows.batch, batch_size)
            vectors = predict(student, shown(stream, bar, part), mesh, family.PARTITION)
            vectors_ND = np.stack([vectors[i] for i in range(len(rows))])
            check_finite(vectors_ND, own)
            vectors_ND[[row - start for row in found.empty if start <= row < part.stop]] = np.nan
            done.write(start, vectors_ND)
    dimensions = done.read(0).shape[1]
    write = _npy if written.suffix == ".npy" else _parquet
    parts = (done.read(start) for start in range(0, len(texts), AT_ONCE))
    storage.write(written, lambda file: write(file, parts, found, dimensions))
    shutil.rmtree(done.folder)
    return {
        "model": own.described.name,
        "commit": own.described.commit,
        "rows": len(texts),
        "dimensions": dimensions,
        "seconds": round(time.perf_counter() - began, 1),
        "output": str(written),
    }


def checkpoint(model: str, revision: str | None, precision: str | None) -> Subject:
    """Opens the folder of an embedder, or of any model of a known family, or a hub id."""
    return subject.of_checkpoint(model, revision, "embedding", precision)


def _cut(own: Subject, dimensions: int | None) -> Subject:
    """Changes an embedder so that its vectors keep so many dimensions, if that is given."""
    if dimensions is None:
        return own
    described, config = own.described, own.described.config
    Whole(least=1).check(dimensions, "--dimensions")
    if dimensions > (most := embedder.whole_width(config)):
        raise UserError(f"--dimensions={dimensions}: {described.name} has vectors of {most} only")
    config = dataclasses.replace(config, dimensions=dimensions)
    return dataclasses.replace(own, described=dataclasses.replace(described, config=config))


def _prompt(own: Subject, options: Options) -> str:
    """Chooses what every text begins with."""
    texts, name = own.described.config.texts, options.prompt_name
    if options.prompt is not None:
        if name is not None:
            raise UserError("--prompt and --prompt_name: give one of them")
        return options.prompt
    have, name = dict(texts.prompts), texts.default_prompt if name is None else name
    if name is not None and name not in have:
        raise UserError(
            f"--prompt_name={name}: {own.described.name} has the prompts "
            f"{', '.join(have) or 'none'}; give the words themselves by --prompt"
        )
    return have.get(name, "")


def _npy(file: BinaryIO, parts: Iterator[np.ndarray], found: Input, dimensions: int) -> None:
    shape = len(found), dimensions
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    for vectors_ND in parts:
        file.write(np.ascontiguousarray(vectors_ND, "<f4").data)


def _parquet(file: BinaryIO, parts: Iterator[np.ndarray], found: Input, dimensions: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        ids = {} if found.ids is None else {"id": pa.array(found.ids)}
    except (pa.ArrowException, OverflowError):  # of several types, or above 2^63
        ids = {"id": pa.array([None if each is None else str(each) for each in found.ids])}
    vector = pa.list_(pa.float32(), dimensions)
    fields = [("index", pa.int64()), *((name, ids[name].type) for name in ids), ("vector", vector)]
    start = 0
    with pyarrow.parquet.ParquetWriter(file, pa.schema(fields)) as writer:
        for vectors_ND in parts:
            rows = slice(start, start := start + len(vectors_ND))
            columns = [pa.array(range(rows.start, rows.stop), pa.int64())]
            columns += [values[rows.start : rows.stop] for values in ids.values()]
            columns.append(pa.FixedSizeListArray.from_arrays(vectors_ND.reshape(-1), dimensions))
            writer.write_table(pa.table(columns, schema=pa.schema(fields)))
