"""Offers the commands of kd_jax as Python functions, also for tables and texts in memory.

A run of the API is a run of the command line: the same run directory, which the same call, or
`python -m kd_jax.main`, continues after a kill. See docs/python.md.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from ml_collections import ConfigDict

from kd_jax import cli, experiments, hub, keys, plugins, storage
from kd_jax.errors import UserError
from kd_jax.recipes import compare, embed, evaluate, export, generate, plan, predict
from kd_jax.report import runs
from kd_jax.report.table import Table, of_runs
from kd_jax.run.workdir import enter
from kd_jax.train.records import Listener

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
Config = ConfigDict  # an experiment: sections and keys, as `kd-jax keys` lists them
# Rows of data: the path of a file; columns by name; a pandas DataFrame, a dataset of Hugging Face's
# `datasets` or a pyarrow Table; or a list of texts, of rows (dicts), or of chats (lists of
# messages).
Rows = str | os.PathLike | Mapping[str, Sequence] | Sequence | Any


def list_experiments() -> dict[str, str]:
    """Lists the experiments that come with kd_jax: name -> what it does."""
    return {name: experiments.title(name) for name in experiments.names()}


def configure(experiment: str, changes: Mapping[str, Any] | None = None) -> Config:
    """Makes the config of an experiment.

    Args:
        experiment: a name of `list_experiments`, or the path of your own file; with a variant
            behind a colon, "quickstart:smoke".
        changes: values by dotted key, {"teacher.model": "gpt2", "optim.learning_rate": 1e-4}; also
            keys that the experiment does not set but that are legal (docs/config.md).

    Raises UserError for an unknown experiment, and for unknown keys.
    """
    config = experiments.read(experiment)
    keys.change(config, (changes or {}).items())
    return config


def distil(
    config: Config,
    *,
    train: Rows | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    workdir: str | os.PathLike | None = None,
    callback: Listener | None = None,
) -> Run:
    """Runs an experiment: trains its stages, measures them, exports the student.

    Args:
        config: see `configure`.
        train, validation, test: rows that replace config.data's. With `train` but no `test`,
            metrics are computed on held-out training rows. Tables in memory are written, once for
            each content, to `tables` next to the run directory.
        workdir: the run directory; runs/NAME-HASH of the config by default. An interrupted run
            is continued there, a finished one is only read.
        callback: called in the first process with (stage, kind, row) for each row that is written:
            kind is "train" (step, loss, terms, learning_rate ...), "eval" (step and held-out
            figures) or "time" (step, tokens_per_second ...).

    Raises UserError for mistakes in config, data or models, mostly before any long work.
    """
    start()
    config = copy.deepcopy(config)
    tables = (Path(workdir).parent if workdir else Path("runs")) / "tables"
    given = {"train": train, "validation": validation, "test": test}
    with config.unlocked():
        if train is not None:  # the experiment's other splits are of other rows
            for split in {"validation", "test"} & set(config.data):
                del config.data[split]
        for split, rows in given.items():
            if rows is not None:
                config.data[split] = dict(source="files", path=_file(rows, tables, split))
    recipe = plugins.load("recipes", config.recipe, "run")
    where = None if workdir is None else os.fspath(workdir)
    listeners = [] if callback is None else [callback]
    with enter(config, config.task.name, where, listeners, "kd_jax.distil(...)") as place:
        recipe.run(config, place)
        return open_run(place.folder)


@functools.cache
def start() -> None:
    """Starts JAX and logging as the commands do, once a process."""
    cli.start_jax()


def _file(rows: Rows, folder: Path, key: str) -> str:
    """Returns the path of a file with the rows; a table in memory is written to `folder`, under a
    hash of its content."""
    if isinstance(rows, str | os.PathLike):
        return os.fspath(rows)
    import pyarrow.parquet

    table = _table(rows, key)
    if not table.num_rows:
        raise UserError(f"{key}: a table without rows; give at least one")
    content = hashlib.blake2b(digest_size=6)
    for batch in table.to_batches(max_chunksize=1000):  # as Python values, which are large
        for row in batch.to_pylist():
            content.update(json.dumps(row, default=str, sort_keys=True).encode())
    path = folder / f"{key}-{content.hexdigest()}.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        storage.write(path, functools.partial(pyarrow.parquet.write_table, table))
    return str(path)


@contextlib.contextmanager
def _private() -> Iterator[Path]:
    """Makes a folder for the files of one call; messages about them name what was given."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Path(folder)
        except UserError as error:
            made = rf"{re.escape(folder)}/(\w+)-\w+\.parquet"
            raise UserError(re.sub(made, r"\1", str(error))) from None


def _several(texts: Sequence) -> Sequence:
    """Returns texts; UserError for a single one, of which each letter would be taken for a text."""
    if isinstance(texts, str):
        raise UserError(f"give a list of texts, as [{texts[:20]!r}], not a text alone")
    return texts


def _options(kind: Callable[..., T], precision: str, given: Mapping[str, Any]) -> T:
    """Makes a command's options of keyword arguments; UserError for one that it does not have."""
    have = [field.name for field in dataclasses.fields(kind)]
    if unknown := [name for name in given if name not in have]:
        raise UserError(f"no option {unknown[0]!r}; have: {', '.join(have)}")
    return kind(**{"precision": precision} | given)


def _table(rows: Rows, key: str) -> pa.Table:
    import pyarrow as pa  # not before `start`: its threads would keep memory of their own

    try:
        if isinstance(rows, pa.Table):
            return rows
        if hasattr(rows, "with_format"):  # of Hugging Face's datasets
            return rows.with_format("arrow")[:]
        if hasattr(rows, "iloc"):  # of pandas
            return pa.Table.from_pandas(rows, preserve_index=False)
        if isinstance(rows, Mapping):
            return pa.table({name: list(column) for name, column in rows.items()})
        rows = list(rows)
        if all(isinstance(row, str) for row in rows):
            return pa.table({"text": pa.array(rows, pa.string())})
        if all(isinstance(row, Mapping) for row in rows):
            return pa.Table.from_pylist(rows)
        if all(isinstance(row, Sequence) for row in rows):
            return pa.table({"messages": rows})
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise UserError(f"{key}: no table can be made of these rows: {error}") from None
    raise UserError(
        f"{key}: rows of {type(rows[0]).__name__}; give the path of a file, columns by name, a "
        f"DataFrame, or a list of texts, of rows (dicts) or of chats (lists of messages)"
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run: its figures, curves and models."""

    folder: Path
    results: dict[str, Any]  # results.json

    @property
    def figures(self) -> dict[str, dict[str, Any]]:
        """Returns the reported metrics: stage -> {"loss", "accuracy", ..., "best_step"}."""
        return self.results["stages"]

    def table(self) -> Table:
        """Makes the table of the run's figures, to print() or as markdown()."""
        return of_runs([self.results], f"{self.folder.name}, {self.results['split']} split")

    def curves(self, stage: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Reads a stage's training curves: columns of metrics.csv (losses and terms by step) and of
        eval.csv (held-out metrics)."""
        found = runs.curves(self.folder)[stage]
        return found.training, found.validation

    def model(self) -> Model:
        """Loads the student that the run exported."""
        return load(self.results["export"]["path"])

    def save(self, out: str | os.PathLike, stage: str | None = None, *, onnx: bool = False) -> Path:
        """Writes the model of a stage (the run's student by default) as a Hugging Face checkpoint
        into the new folder `out`, checked against the model in memory; with `onnx`, an encoder
        also as ONNX files."""
        start()
        export.export_stage(str(self.folder), stage, os.fspath(out), onnx)
        return Path(out)


def open_run(folder: str | os.PathLike) -> Run:
    """Opens the directory of a finished run. Raises UserError if it is not one."""
    found = runs.read(os.fspath(folder))
    return Run(Path(found.workdir), found.results)


@dataclasses.dataclass(frozen=True)
class Model:
    """A Hugging Face checkpoint: a student that was exported, or any model of a known family. Its
    weights are read when they are first needed, and stay in memory as long as this object does."""

    name: str  # folder, or hub id
    revision: str | None = None  # of a hub id
    precision: str = "fp32"  # fp32 | bf16
    _open: dict = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[dict]:
        """Labels texts with a classifier or regression.

        Returns for each text {"index", "label", "probability", "probabilities"}, or {"index",
        "score"} of a regression. Raises UserError for a model without such a head, and for a text
        that is empty.
        """
        columns = {"text": _several(texts)} | ({} if pairs is None else {"pair": _several(pairs)})
        return self._predict(columns, None if pairs is None else "pair")

    def answer(self, questions: Sequence[str], contexts: Sequence[str]) -> list[dict]:
        """Answers questions, each from its context: {"index", "answer", "probability", "start",
        "end", "no_answer"} (kd_jax.predict)."""
        columns = {"question": _several(questions), "context": _several(contexts)}
        return self._predict(columns, None)

    def embed(self, texts: Sequence[str], **options: Any) -> np.ndarray:
        """Computes the vectors of texts with a sentence embedder, (N, D) float32.

        Args:
            texts: the texts.
            options: of `kd_jax.embed`: prompt_name, prompt, dimensions, batch_size.

        Raises UserError for a text that is empty, and for a prompt that the model does not have.
        """
        start()
        texts, given = list(_several(texts)), _options(embed.Options, self.precision, options)
        with _private() as folder:
            source, target = _file(texts, folder, "texts"), folder / "vectors.npy"
            open_model = self._opening(embed.checkpoint, given.precision)
            embed.embed_file(open_model, source, str(target), given)
            return np.load(target)

    def generate(self, prompts: Sequence, **options: Any) -> list[dict]:
        """Writes after prompts with a causal model, in batches, on all devices.

        Args:
            prompts: texts, or chats (lists of messages), to which the tokenizer's template is
                applied.
            options: of `kd_jax.generate`: max_new_tokens, temperature, top_k, top_p, samples, seed.

        Returns for each text {"index", "text", "tokens", "ended", "logp"}, with "sample" if there
        are several of a prompt. Raises UserError for a model that writes no text.
        """
        start()
        prompts, given = _several(prompts), _options(generate.Options, self.precision, options)
        with _private() as folder:
            source, target = _file(prompts, folder, "prompts"), folder / "written.jsonl"
            open_model = self._opening(generate.checkpoint, given.precision)
            generate.generate_file(open_model, source, str(target), given)
            return [json.loads(line) for line in target.read_text().splitlines()]

    def evaluate(self, task: str, data: Rows | None = None, **options: Any) -> dict[str, Any]:
        """Measures the model on a task: "text" (labelled), "clm", "mlm", "chat", "squad",
        "glue/sst2", "hellaswag" ... (docs/evaluate.md).

        Args:
            task: a name for `python -m kd_jax.evaluate --task`.
            data: rows, or None for the task's split on the hub.
            options: further flags of that command: text, label, teacher, seq_len, batch_size ...

        Returns the task's metrics, "parameters", "size_mb", "seconds" and a description of model
        and data.
        """
        start()
        given = _options(evaluate.Options, self.precision, options)
        with _private() as folder:
            path = None if data is None else _file(data, folder, "data")
            return evaluate.evaluate_checkpoint(self.name, self.revision, task, path, given).report

    def _predict(self, columns: Mapping[str, Sequence], pair: str | None) -> list[dict]:
        start()
        options = predict.Options(pair=pair, precision=self.precision)
        with _private() as folder:
            source, target = _file(columns, folder, "texts"), folder / "predictions.jsonl"
            open_model = self._opening(predict.checkpoint, options.precision)
            predict.predict_file(open_model, source, str(target), options)
            return [json.loads(line) for line in target.read_text().splitlines()]

    def _opening(self, checkpoint: Callable[..., T], precision: str) -> Callable[[], T]:
        """Makes a function that opens the model as a command does, once for all its calls."""
        opening = functools.partial(checkpoint, self.name, self.revision, precision)
        return self._open.setdefault((checkpoint, precision), functools.cache(opening))


def load(model: str | os.PathLike, revision: str | None = None, precision: str = "fp32") -> Model:
    """Opens a model: the folder of a Hugging Face checkpoint, or a hub id at a revision.

    Raises UserError if there is none.
    """
    hub.resolve(os.fspath(model), revision, "model")
    return Model(os.fspath(model), revision, precision)


def compare_runs(
    folders: Sequence[str | os.PathLike], out: str | os.PathLike = "runs/comparison"
) -> list[Table]:
    """Compares finished runs: writes report.html, report.md and pictures to `out`, returns the
    tables. Runs that differ only in their seed share a row, as mean ± standard deviation."""
    return compare.compare([os.fspath(folder) for folder in folders], os.fspath(out))[0]


def forecast(config: Config, topology: str = "") -> dict[str, Any]:
    """Forecasts the parameters and FLOPs of each stage of a run, without weights, data or
    accelerators; with a topology ("v5e:4x4", docs/scaling.md) also memory and communication of the
    compiled step."""
    start()
    return plan.plan(config, topology)
