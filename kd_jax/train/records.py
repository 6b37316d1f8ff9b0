"""What a run writes as it goes: CSV files, TensorBoard events, Weights & Biases.

metrics.csv and eval.csv hold nothing but what the computation determines, to the last bit, so two
runs can be compared by `cmp`; times go to timing.csv. A CSV is cut back to the step that a
resumed run starts from.
"""

import csv
import io
import os
import secrets
import time
from typing import Any

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from kd_jax.errors import UserError


class Table:
    """A CSV file that grows by rows with a first column `step`, cut back to `start` first."""

    def __init__(self, path: epath.PathLike, start: int):
        self.path = epath.Path(path)
        self._rows = [row for row in read(self.path) if int(row["step"]) <= start]
        self._names = list(self._rows[0]) if self._rows else None
        text = self._format(self._rows, header=True) if self._rows else ""
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(text)
        temporary.replace(self.path)
        self._file = self.path.open("a")

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
        self._file.write(self._format([row], header))
        self._file.flush()

    def sync(self) -> None:
        """Puts every row on disk: called before a checkpoint that the rows belong to."""
        self._file.flush()
        try:
            os.fsync(self._file.fileno())
        except (AttributeError, OSError):  # a remote file has no descriptor, flushing is all
            pass

    def close(self) -> None:
        self.sync()
        self._file.close()


def read(path: epath.PathLike) -> list[dict[str, str]]:
    """The whole rows of a CSV; a last line that a crash cut short is left out."""
    path = epath.Path(path)
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if None not in row and None not in row.values()]


class Events:
    """TensorBoard curves, written here and now: tensorboardX's own SummaryWriter does it in
    a thread that dies of a full disk unheard, after which the run would wait for it forever."""

    def __init__(self, directory: epath.PathLike, start: int):
        epath.Path(directory).mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(os.fspath(epath.Path(directory) / "events"))
        # Hides what an interrupted run wrote of the steps that are done again.
        again = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=again))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            summary = scalar(name, value)
            self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))

    def sync(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Records:
    """All of one stage's records in one place. Only the first process of a run has them."""

    def __init__(self, directory: epath.PathLike, start: int, wandb_run: Any = None):
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.metrics = Table(directory / "metrics.csv", start)
        self.evals = Table(directory / "eval.csv", start)
        self.timing = Table(directory / "timing.csv", start)
        self._events = Events(directory / "tensorboard", start)
        self._files = (self.metrics, self.evals, self.timing, self._events)
        self._wandb, self._stage = wandb_run, directory.name

    def add(self, table: Table, kind: str, row: dict[str, Any]) -> None:
        """A row for `table`, and its numbers as curves `kind/NAME`."""
        table.add(row)
        values = {f"{kind}/{name}": value for name, value in row.items() if name != "step"}
        self._events.add(row["step"], values)
        if self._wandb is not None:
            named = {f"{self._stage}/{name}": value for name, value in values.items()}
            self._wandb.log(named | {f"{self._stage}/step": row["step"]})

    def sync(self) -> None:
        """Puts everything so far on disk."""
        for file in self._files:
            file.sync()

    def close(self) -> None:
        for file in self._files:
            file.close()


def open_wandb(project: str, name: str, config: dict, folder: epath.PathLike) -> Any:
    """A W&B run for the run directory `folder`, the same one when the run is continued.

    WANDB_MODE=offline keeps it in `folder`/wandb. Raises UserError where wandb is not installed or
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
        return wandb.init(id=identity.read_text(), resume="allow", **about)
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"config.wandb={project!r}: {reason}; run `wandb login`, set WANDB_MODE=offline, or "
            f"leave config.wandb empty"
        ) from None
