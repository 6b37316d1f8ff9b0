"""Records a run's metrics: CSV files, TensorBoard events, Weights & Biases.

metrics.csv, eval.csv and samples.jsonl hold only what is reproducible to the last bit, so two runs
can be compared by `cmp`; times go to timing.csv. All are cut back to the step from which a run
resumes.
"""

import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from kd_jax import storage
from kd_jax.errors import UserError, line
from kd_jax.plugins import without_torch
from kd_jax.types import Batch

log = logging.getLogger(__name__)


class Table:
    """A CSV file whose first column is `step`, cut back to step `start` when it is opened."""

    def __init__(self, path: epath.PathLike, start: int, written: str | None = None):
        """Opens the file. `written`: the digest of the rows up to `start`, if known; a file with
        other rows is moved aside, with a warning."""
        self.path = epath.Path(path)
        rows = [row for row in self._read() if _step(row) <= start]
        self._take(rows)
        if written is not None and self.digest != written:
            self._take([])
            place = self.path.parent / "damaged"
            if self.path.exists():
                storage.set_aside(self.path, place)
            log.warning(
                "%s: damaged, its rows up to step %d are not those that were written; what there "
                "is of it is now in %s",
                *(self.path, start, place),
            )
        storage.write(self.path, lambda file: file.write(self._text.encode()))
        self._file = self.path.open("a")

    def _read(self) -> list[dict]:
        return read(self.path)

    def _take(self, rows: list[dict]) -> None:
        self._names = list(rows[0]) if rows else None
        self._text = self._format(rows, header=True) if rows else ""
        self._hash = hashlib.blake2b(self._text.encode(), digest_size=8)

    @property
    def digest(self) -> str:
        """Computes the digest of all rows."""
        return self._hash.hexdigest()

    def _format(self, rows: list[dict], header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._names, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def add(self, row: dict[str, Any]) -> None:
        """Appends a row; every row has the same columns."""
        header = self._names is None
        self._names = self._names or list(row)
        text = self._format([row], header)
        self._hash.update(text.encode())
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        """Flushes every row to disk; called before a checkpoint of the same step is saved."""
        self._file.flush()
        with contextlib.suppress(AttributeError, OSError):  # a remote file has no descriptor
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


class Texts(Table):
    """A JSON Lines file whose objects have a `step`: like `Table`, with texts of any kind."""

    def _read(self) -> list[dict]:
        rows = []
        for text in _whole_lines(self.path).split("\n"):
            with contextlib.suppress(ValueError):  # the digest tells of damaged ones
                rows.append(json.loads(text))
        return [row for row in rows if isinstance(row, dict)]

    def _format(self, rows: list[dict], header: bool) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: epath.PathLike) -> list[dict[str, str]]:
    """Reads the rows of a CSV; an incomplete last line, after a crash, is left out."""
    rows = csv.DictReader(io.StringIO(_whole_lines(epath.Path(path))))
    return [row for row in rows if None not in row and None not in row.values()]


def _whole_lines(path: epath.Path) -> str:
    """Reads a file up to its last line break; "" if there is none."""
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    return text[: text.rfind("\n") + 1]


def _step(row: dict[str, Any]) -> float:
    """Reads the step of a row; for a damaged row, infinity."""
    text = str(row.get("step", ""))
    return int(text) if text.isdecimal() else math.inf


class Events:
    """A synchronous writer of TensorBoard curves: tensorboardX's SummaryWriter writes in a thread
    that dies silently on a full disk, after which the run would wait for it forever."""

    def __init__(self, directory: epath.PathLike, start: int):
        with without_torch():
            from tensorboardX import event_file_writer, summary
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        self._event, self._scalar = Event, summary.scalar
        self._writer = event_file_writer.EventsWriter(os.fspath(epath.Path(directory) / "events"))
        # Hides what an interrupted run wrote of the steps that are done again.
        self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._write(step, summary=self._scalar(name, value))

    def _write(self, step: int, **what: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **what))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


# What is told of every row: the stage, the kind (train, eval, time), the row.
Listener = Callable[[str, str, Mapping[str, Any]], None]


class Records:
    """The records of a stage: tables, curves and listeners, in the first process of a run only."""

    # The tables, and the folder of each one's curves.
    _CURVES = {"metrics": "train", "eval": "eval", "timing": "time"}
    _SAMPLES = "samples.jsonl"  # texts, where a model writes some

    def __init__(
        self,
        directory: epath.PathLike,
        start: int,
        listeners: Sequence[Listener] = (),
        written: Mapping[str, str] | None = None,
        samples: bool = False,
    ):
        """Opens the records. `written`: the result of `sync` at step `start`, if that has a
        checkpoint; `samples`: whether there will be samples of text."""
        directory = epath.Path(directory)
        self._tables: dict[str, Table] = {}
        self._files: tuple[Table | Events, ...] = ()
        self._listeners, self._stage = listeners, directory.name
        if jax.process_index() > 0:
            return
        directory.mkdir(parents=True, exist_ok=True)
        for name in self._CURVES:
            file = f"{name}.csv"
            self._tables[name] = Table(directory / file, start, (written or {}).get(file))
        if samples:
            digest = (written or {}).get(self._SAMPLES)
            self._tables["samples"] = Texts(directory / self._SAMPLES, start, digest)
        self._events = Events(directory / "tensorboard", start)
        self._files = (*self._tables.values(), self._events)

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Adds a row to the table `name` (metrics, eval, timing), and its numbers to the curves."""
        if not self._files:
            return
        self._tables[name].add(row)
        kind = self._CURVES[name]
        values = {f"{kind}/{key}": value for key, value in row.items() if key != "step"}
        self._events.add(row["step"], values)
        for listener in self._listeners:
            listener(self._stage, kind, row)

    def add_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines to samples.jsonl: texts that the model wrote at this step."""
        if self._files:
            for sample in samples:
                self._tables["samples"].add({"step": step, **sample})

    def sync(self) -> dict[str, str]:
        """Flushes everything to disk; returns digests of the tables, by file name."""
        for file in self._files:
            file.sync()
        return {table.path.name: table.digest for table in self._tables.values()}

    def close(self) -> None:
        for file in self._files:
            file.close()


class Clock:
    """A clock of training time, without evaluation and saving, and of the wait for batches."""

    def __init__(self, writes: bool = False):
        """Starts. `writes`: whether a model writes what it learns from, which is timed apart."""
        self._writes = writes
        self.rate = 0.0  # tokens a second of the last row
        self.all_steps = self.all_rows = self.all_tokens = 0
        self.restart()
        self._start = self._began

    def restart(self) -> None:
        """Starts the clock of a new row."""
        self._began = time.perf_counter()
        self.waited = self.writing = 0.0
        self.steps = self.rows = self.tokens = 0

    def count(self, batch: Batch) -> None:
        """Counts a step, and this process's rows and tokens without padding and filling rows."""
        processes = jax.process_count()
        rows = processes * int((batch.ids_B >= 0).sum())
        tokens = processes * int(batch.mask_BT.sum())
        self.steps, self.all_steps = self.steps + 1, self.all_steps + 1
        self.rows, self.all_rows = self.rows + rows, self.all_rows + rows
        self.tokens, self.all_tokens = self.tokens + tokens, self.all_tokens + tokens

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time of the block as waiting for a batch."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    @contextlib.contextmanager
    def written(self) -> Iterator[None]:
        """Counts the time of the block as time in which the model writes what it learns from."""
        began = time.perf_counter()
        yield
        self.writing += time.perf_counter() - began

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stops the clock during the block."""
        began = time.perf_counter()
        yield
        spent = time.perf_counter() - began
        self._began, self._start = self._began + spent, self._start + spent

    def row(self, step: int) -> dict[str, float]:
        """Makes a row of timing.csv from the steps since the last one."""
        seconds = time.perf_counter() - self._began
        row = {
            "step": step,
            "seconds": round(seconds, 4),
            "tokens_per_second": round(self.tokens / seconds, 1),
            "rows_per_second": round(self.rows / seconds, 2),
            "input_wait_fraction": round(self.waited / seconds, 5),
        }
        if self._writes:
            learning = seconds - self.waited - self.writing
            row |= {
                "writing_seconds": round(self.writing, 4),
                "learning_seconds": round(learning, 4),
            }
        self.rate = row["tokens_per_second"]
        self.restart()
        return row

    def last_row(self, step: int) -> dict[str, float] | None:
        """Makes the row of a stage's last steps; None if there were none. If no step was timed,
        since each had a shape to compile, compilation is included."""
        if not self.steps and not self.rate:
            self.steps, self.rows, self.tokens = self.all_steps, self.all_rows, self.all_tokens
            self._began = self._start
        return self.row(step) if self.steps else None


@contextlib.contextmanager
def wandb_listener(
    project: str, name: str, config: dict, folder: epath.PathLike
) -> Iterator[Listener]:
    """Opens the W&B run of the run directory `folder`, or continues it; yields a listener that logs
    every row to it.

    WANDB_MODE=offline keeps it in `folder`/wandb. Raises UserError if wandb is not installed or
    refuses.
    """
    try:
        import wandb
    except ModuleNotFoundError:
        raise UserError(
            f"config.wandb={project!r} needs wandb: pip install 'kd_jax[wandb]', or leave it empty"
        ) from None
    identity = epath.Path(folder) / "wandb_id.txt"
    if not identity.exists():
        identity.write_text(secrets.token_hex(4))
    about = dict(project=project, name=name, config=config, dir=os.fspath(folder))
    try:
        run = wandb.init(id=identity.read_text(), resume="allow", **about)
    except wandb.Error as error:
        raise UserError(
            f"config.wandb={project!r}: {line(error)}; run `wandb login`, set WANDB_MODE=offline, "
            f"or leave config.wandb empty"
        ) from None

    def log(stage: str, kind: str, row: Mapping[str, Any]) -> None:
        values = {f"{stage}/{kind}/{key}": value for key, value in row.items() if key != "step"}
        run.log(values | {f"{stage}/step": row["step"]})

    yield log
    run.finish()
