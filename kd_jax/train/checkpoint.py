"""Checkpoints: Orbax, asynchronous, the last N and the best.

A checkpoint is written beside its place and renamed when it is whole, so one that a crash left
unfinished is never seen. It holds the whole TrainState; the data stream needs only its step.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from kd_jax.errors import UserError
from kd_jax.train.state import TrainState, abstract


def _rank(metrics: dict) -> list[float]:
    return metrics["rank"]


class Checkpoints:
    """The checkpoints of one training stage, in `directory` (local or gs://)."""

    def __init__(self, directory: epath.PathLike, keep: int | None):
        """`keep`: how many of the last ones stay, besides the best. None only reads: the run that
        the directory belongs to may be writing there."""
        self.directory = epath.Path(directory).absolute()
        options = dict(create=False, read_only=True, save_interval_steps=0)
        if keep is not None:
            best = BestN(
                get_metric_fn=_rank, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
            policy = AnyPreservationPolicy([LatestN(keep), best])
            options = dict(preservation_policy=policy, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(best_fn=_rank, best_mode="min", **options),
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest whole checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Step of the lowest rank, or the newest where none has one."""
        best = self._manager.best_step()
        return self.latest if best is None else best

    def save(self, state: TrainState, rank: list[float] | None) -> None:
        """Saves `state` under its step; writes in the background. Steps may donate `state` at once:
        while Orbax reads an array, JAX leaves it its memory. `rank`: numbers that are compared from
        the left, the lowest is the best checkpoint; None: not a candidate.

        Raises UserError where the file system refuses (a full disk); what was saved stays.
        """
        arrays = ocp.args.StandardSave(_arrays(state))
        with self._file_errors():
            metrics = None if rank is None else {"rank": rank}
            self._manager.save(int(state.step), args=arrays, metrics=metrics)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state of `step`, on the devices and in the layout of `like`."""
        restored = self._manager.restore(
            step, args=ocp.args.StandardRestore(_arrays(abstract(like)))
        )
        return like.replace(**restored)

    def fits(self, step: int, like: TrainState) -> bool:
        """Whether the parameters of `step` have the names and shapes of those of `like`."""
        with ocp.StandardCheckpointer() as reader:
            there = reader.metadata(self.directory / str(step) / "default").item_metadata.tree
        return _shapes(there["params"]) == _shapes(like.params)

    def check(self) -> None:
        """Raises UserError where a write in the background has failed."""
        with self._file_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until everything is on disk. Raises UserError where it cannot be written."""
        with self._file_errors():
            self._manager.wait_until_finished()
        self.check()

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            full = re.search("no space left on device|disk quota|file too large", str(error), re.I)
            if not (full or isinstance(error, OSError)):
                raise
            reason = full[0] if full else str(error).splitlines()[0]
            latest = f"step {self.latest}" if self.latest is not None else "none yet"
            raise UserError(
                f"cannot write a checkpoint in {self.directory}: {reason}. Make room and run the "
                f"same command again (last whole checkpoint: {latest})"
            ) from error


def _arrays(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _shapes(params: Any) -> set[tuple]:
    found = jax.tree_util.tree_leaves_with_path(params)
    return {(*(_name(key) for key in path), leaf.shape) for path, leaf in found}


def _name(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "idx", key)))
