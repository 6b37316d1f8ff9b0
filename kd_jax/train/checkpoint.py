"""Saves and restores checkpoints with Orbax, asynchronously; keeps the last N and the best.

A checkpoint is written under another name and renamed when it is complete, so an unfinished one is
never read after a crash. It holds the whole TrainState; the data stream needs only its step. Its
file metrics/metrics has its rank among others, and digests of the state, which are checked when it
is read: Orbax does not detect a wrong byte in an array.
"""

import contextlib
import functools
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from kd_jax import storage
from kd_jax.errors import UserError, line
from kd_jax.tensors import with_rows
from kd_jax.train.sharding import path_name
from kd_jax.train.state import TrainState, abstract
from kd_jax.types import Array

log = logging.getLogger(__name__)

_FULL = re.compile("no space left on device|disk quota|file too large", re.I)
# What keeps a whole checkpoint from being read.
_NOT_DAMAGE = re.compile(
    "resource_exhausted|out of memory|permission denied|too many open|unavailable|deadline", re.I
)


class Damaged(UserError):
    """The error of a checkpoint whose files differ from what was written."""


def _rank(metrics: dict) -> list[float]:
    return metrics["rank"] or [sys.float_info.max]  # the last, where there is none


class Checkpoints:
    """The checkpoints of one training stage, in `directory` (local or gs://)."""

    def __init__(self, directory: epath.PathLike, keep: int | None):
        """Opens the directory, to keep the last `keep` checkpoints and the best; None: only to
        read, since another run may be writing there.

        A checkpoint whose rank is unreadable is moved aside with all later ones, which are trained
        again. Raises Damaged if there is none before it, or if the directory is only read.
        """
        self.directory = epath.Path(directory).absolute()
        options = dict(create=False, read_only=True, save_interval_steps=0)
        if keep is not None:
            best = BestN(
                get_metric_fn=_rank, reverse=True, n=1, keep_checkpoints_without_metrics=False
            )
            policy = AnyPreservationPolicy([LatestN(keep), best])
            options = dict(preservation_policy=policy, cleanup_tmp_directories=True)
        for step in self._steps():
            try:
                self._metrics(step)
            except Damaged as error:
                if keep is None:
                    raise
                self._set_aside(step, error)
                break
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers=_handler(),
            options=ocp.CheckpointManagerOptions(best_fn=_rank, best_mode="min", **options),
        )

    @property
    def latest(self) -> int | None:
        """Finds the step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Finds the step of the checkpoint with the lowest rank, or the newest if none has one."""
        best = self._manager.best_step()
        return best if best is not None and self._metrics(best).get("rank") else self.latest

    def save(
        self, state: TrainState, rank: list[float] | None, about: Mapping[str, str] | None = None
    ) -> None:
        """Saves `state` under its step, in the background; the next step may donate `state` at
        once, since JAX keeps an array's memory while Orbax reads it.

        `rank`: numbers that are compared from the left, the lowest is the best checkpoint; None:
        not a candidate. `about`: text that `note` returns. Raises UserError if the file system
        refuses (a full disk); earlier checkpoints stay.
        """
        tree = _arrays(state)
        digests = {name: checksum(part) for name, part in tree.items()}
        metrics = {"rank": rank, "state": digests, "about": dict(about or {})}
        metrics["digest"] = storage.digest_of(metrics)
        with self._file_errors():
            step, args = int(state.step), ocp.args.PyTreeSave(tree)
            self._manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads the state of `step` onto the devices and in the layout of `like`; the optimizer's
        state is skipped if that of `like` is (). Raises Damaged."""
        wanted = {name: part for name, part in _arrays(abstract(like)).items() if part != ()}
        tables = {}
        with contextlib.suppress(Exception):  # without shapes on disk there is only one layout
            tables = _padded_otherwise(self._params(step), like)
        as_stored = functools.partial(_as_stored, tables)
        item = {
            name: jax.tree_util.tree_map_with_path(as_stored, part) for name, part in wanted.items()
        }
        how = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=like.opt_state == (),
        )
        with self._damage(step), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            restored = reader.restore(self.directory / str(step) / "default", args=how)
        written = self._metrics(step).get("state")
        if written is None:
            log.warning("%s/%d has no digest, and is taken as it is", self.directory, step)
        for name, part in restored.items() if written is not None else ():
            if checksum(part) != written.get(name):
                raise Damaged(f"{self.directory}/{step} is damaged: other {name} than were saved")
        if tables:
            resize = jax.jit(
                lambda found: jax.tree.map(_fitted, found, wanted),
                out_shardings=jax.tree.map(lambda x: x.sharding, wanted),
            )
            restored = resize(restored)
        return like.replace(**restored)

    def newest(self, like: TrainState, after: int = -1) -> TrainState | None:
        """Reads the last undamaged checkpoint beyond step `after`; None if there is no checkpoint.
        Later, damaged ones are moved aside.

        Raises UserError if all are damaged.
        """
        damaged = None
        for step in sorted((s for s in self._manager.all_steps() if s > after), reverse=True):
            try:
                state = self.restore(step, like)
            except Damaged as error:
                if jax.process_count() > 1:  # others may find nothing wrong with their parts
                    raise Damaged(f"{error}: rename it, and the same command goes on") from error
                damaged = damaged or error
                continue
            if damaged:
                self._set_aside(step + 1, damaged)
                self._manager.reload()
            return state
        if damaged:
            raise Damaged(
                f"{damaged}, and no other is whole: rename it to train again from what there was "
                f"before it"
            )
        return None

    def chosen(self, like: TrainState) -> TrainState:
        """Reads the best checkpoint, without the optimizer's state. Raises Damaged after moving a
        damaged one aside; the same command trains it again, from an earlier one."""
        try:
            return self.restore(self.best, like.replace(opt_state=()))
        except Damaged as error:
            self._set_aside(self.best, error)
            raise Damaged(f"{error}: the same command trains it again") from error

    def note(self, step: int) -> Mapping[str, str]:
        """Reads the texts that `save` was given as `about`, with the checkpoint of `step`."""
        return self._metrics(step).get("about", {})

    def fits(self, step: int, like: TrainState) -> bool:
        """Tells whether the parameters of `step` have the names and shapes of those of `like`."""
        with self._damage(step):
            there = self._params(step)
            tables = _padded_otherwise(there, like)
        own = {path: x.shape for path, x in _by_name(like.params).items()}
        return {p: s for p, s in there.items() if p not in tables} == {
            p: s for p, s in own.items() if p not in tables
        }

    def _params(self, step: int) -> dict[str, tuple[int, ...]]:
        """Reads the shapes of the parameters of `step`, by path name."""
        with ocp.StandardCheckpointer() as reader:
            there = reader.metadata(self.directory / str(step) / "default").item_metadata.tree
        return {name: tuple(x.shape) for name, x in _by_name(there["params"]).items()}

    def check(self) -> None:
        """Checks writes in the background. Raises UserError if one has failed."""
        with self._file_errors():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until everything is on disk. Raises UserError if it cannot be written."""
        with self._file_errors():
            self._manager.wait_until_finished()
        self.check()

    def close(self) -> None:
        """Waits for writes, and closes the directory."""
        self.wait()
        self._manager.close()

    def _steps(self) -> list[int]:
        found = self.directory.iterdir() if self.directory.exists() else ()
        return sorted(int(path.name) for path in found if path.name.isdecimal())

    def _metrics(self, step: int) -> dict[str, Any]:
        """Reads the metadata of a checkpoint, without arrays; {} if an older version wrote none."""
        path = self.directory / str(step) / "metrics" / "metrics"
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_bytes())
            digest = found.pop("digest", None)
            # Older versions wrote the rank alone.
            whole = digest == storage.digest_of(found) if digest else list(found) == ["rank"]
        except (ValueError, AttributeError):
            whole = False
        if not whole:
            raise Damaged(
                f"{path} is damaged, so that nobody can tell which checkpoint is the best"
            )
        return found

    def _set_aside(self, first: int, error: Damaged) -> None:
        """Moves checkpoints from step `first` on out of the folder, if there is an earlier one."""
        earlier = [step for step in self._steps() if step < first]
        if not earlier:
            raise Damaged(f"{error}; none is before it: rename it to go on without it") from error
        place = self.directory.with_name(f"{self.directory.name}.damaged")
        if jax.process_index() == 0:
            for step in (step for step in self._steps() if step >= first):
                storage.set_aside(self.directory / str(step), place)
        log.warning("%s; set aside in %s, going on from step %d", error, place, earlier[-1])
        if jax.process_count() > 1:
            raise Damaged(f"{error}: set aside, run the same command again") from error

    @contextlib.contextmanager
    def _damage(self, step: int) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # Orbax, tensorstore and JSON have no common class
            if _NOT_DAMAGE.search(str(error)):
                raise
            raise Damaged(
                f"{self.directory}/{step} is damaged ({type(error).__name__}: {line(error)[:100]})"
            ) from error

    @contextlib.contextmanager
    def _file_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            full = _FULL.search(str(error))
            if not (full or isinstance(error, OSError)):
                raise
            reason = full[0] if full else str(error).splitlines()[0]
            latest = f"step {self.latest}" if self.latest is not None else "none yet"
            raise UserError(
                f"cannot write a checkpoint in {self.directory}: {reason}. Make room and run the "
                f"same command again (last whole checkpoint: {latest})"
            ) from error


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Makes what writes arrays. Every device would write its part of what all of them hold, and a
    model's many small arrays take longer to cut than to write."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _arrays(state: TrainState) -> dict:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _by_name(params: Any) -> dict[str, Any]:
    return {path_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def _padded_otherwise(
    there: dict[str, tuple[int, ...]], like: TrainState
) -> dict[str, tuple[int, ...]]:
    """Finds the tables over the vocabulary that were saved on a mesh with other padding: their
    stored shapes by the parameter's name."""
    size = like.student.vocab_size
    found = {}
    for name, leaf in _by_name(like.params).items():
        stored = there.get(name, leaf.shape)
        if stored[1:] == leaf.shape[1:] and stored != leaf.shape:
            if size is not None and min(stored[0], leaf.shape[0]) >= size:
                found[name] = stored
    return found


def _as_stored(tables: dict[str, tuple[int, ...]], path: tuple, wanted: Any) -> Any:
    """Describes an array as it is on disk: a table, or its moments, with the rows that it has
    there, on every device."""
    name = path_name(path)
    shape = next((s for table, s in tables.items() if f"/{name}".endswith(f"/{table}")), None)
    if shape is None:
        return wanted
    place = NamedSharding(wanted.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=place)


def _fitted(found: Array, wanted: Any) -> Array:
    return with_rows(found, wanted.shape[0]) if wanted.ndim else found


def resume_from(directory: str, steps: int) -> Checkpoints:
    """Opens the checkpoints of another stage directory, to continue from the last one.

    Raises UserError if there is none, or only one beyond this stage's `steps`.
    """
    source = Checkpoints(epath.Path(directory) / "checkpoints", keep=None)
    if source.latest is None:
        raise UserError(f"config.resume={directory}: no checkpoint there; give RUN/STAGE")
    if source.latest > steps:
        raise UserError(
            f"config.resume={directory} is at step {source.latest}, beyond the {steps} of this "
            f"stage; raise config.steps"
        )
    return source


def checksum(tree: Any) -> str:
    """Computes 16 hex digits from the arrays of a tree and their paths, the same in any layout on
    any number of devices.

    Each word of an array is mixed with its index by invertible steps, so that any changed word
    changes the sum of all, modulo 2^32. Accelerators sum on the device; a CPU needs no compiled
    program for it.
    """
    found = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get([_sum_of(leaf) for _, leaf in found])
    paths = [jax.tree_util.keystr(path) for path, _ in found]
    text = "".join(f"{path}={int(x)};" for path, x in zip(paths, sums, strict=True))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sum_of(x: Array) -> Any:
    here = x.is_fully_addressable and {d.platform for d in x.devices()} == {"cpu"}
    return _sum(np.asarray(x), np) if here else _compiled(x)


def _sum(x: Any, xp: Any) -> Any:
    x = x.reshape(x.shape or (1,))
    words = x.view(f"uint{8 * x.dtype.itemsize}").astype("uint32")
    place = xp.zeros((1,) * x.ndim, "uint32")
    for axis, size in enumerate(x.shape):
        along = [size if each == axis else 1 for each in range(x.ndim)]
        place = place * size + xp.arange(size, dtype="uint32").reshape(along)
    words = words + place * np.uint32(0x9E3779B1)
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    return xp.sum(words ^ (words >> 13), dtype="uint32")


_compiled = jax.jit(lambda x: _sum(x, jnp))
