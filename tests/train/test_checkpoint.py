import contextlib
import os
import resource
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.train import checkpoint, sharding
from kd_jax.train.checkpoint import Checkpoints, Damaged
from kd_jax.train.state import TrainState, create
from tests import forked
from tests.models import tiny

MESH = sharding.make_mesh(2)
WHOLE = NamedSharding(MESH, P())
OPTIMIZER = optax.trace(0.9)


def make(step: int, size: int = 8, place=WHOLE) -> TrainState:
    """A state whose numbers all tell the step."""
    kernel = jax.device_put(jnp.full((size, 8), step, jnp.float32), place)
    params = {"student": {"blocks": {0: {"kernel": kernel}}}, "objective": {}}
    opt_state = jax.tree.map(lambda x: x + 0.5, OPTIMIZER.init(params))
    opt_state = jax.tree.map(lambda x: jnp.full_like(x, step + 0.5, device=place), opt_state)
    return TrainState(jnp.int32(step), params, opt_state, None, OPTIMIZER)


def kernel(state: TrainState):
    return state.params["student"]["blocks"][0]["kernel"]


def save(checkpoints: Checkpoints, losses: dict) -> None:
    for step, loss in losses.items():
        checkpoints.save(make(step), None if loss is None else [loss])
        checkpoints.wait()


def steps(folder) -> list[int]:
    return sorted(int(name) for name in os.listdir(folder))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_the_whole_state_comes_back(folder):
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, {3: None})
    restored = checkpoints.restore(3, make(0))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, make(3))
    assert restored.optimizer is OPTIMIZER


def test_a_state_is_restored_in_the_layout_asked_for(folder):
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, {3: None})
    split = make(0, place=NamedSharding(MESH, P("fsdp")))
    restored = checkpoints.restore(3, split)
    checkpoints.close()
    assert kernel(restored).sharding == kernel(split).sharding
    np.testing.assert_array_equal(kernel(restored), 3.0)


def test_what_is_being_saved_may_be_donated(folder):
    """On CPU the checkpoint is written from the very memory that the steps work in."""

    @jax.jit(donate_argnums=0)
    def step(state):
        return jax.tree.map(lambda x: x + 1, state)

    checkpoints = Checkpoints(folder, keep=1)
    state = make(7, size=400_000)
    checkpoints.save(state, None)
    for _ in range(20):
        state = step(state)
    jax.block_until_ready(state)
    del state
    checkpoints.wait()
    restored = checkpoints.restore(7, make(0, size=400_000))
    checkpoints.close()
    np.testing.assert_array_equal(kernel(restored), 7.0)
    np.testing.assert_array_equal(jax.tree.leaves(restored.opt_state)[0], 7.5)


def test_the_last_ones_and_the_best_stay(folder):
    checkpoints = Checkpoints(folder, keep=2)
    kept = []
    for step, loss in {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: None, 6: None}.items():
        save(checkpoints, {step: loss})
        kept.append((steps(folder), checkpoints.best))
    checkpoints.close()
    assert kept == [
        ([1], 1),
        ([1, 2], 2),
        ([2, 3], 2),
        ([2, 3, 4], 2),
        ([2, 4, 5], 2),
        ([2, 5, 6], 2),
    ]
    again = Checkpoints(folder, keep=2)
    assert (again.latest, again.best) == (6, 2)
    again.close()


def test_the_last_of_equally_good_ones_is_the_best(folder):
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, {1: 1.0, 2: 1.0, 3: 2.0})
    assert (steps(folder), checkpoints.best) == ([2, 3], 2)
    checkpoints.close()


def test_without_figures_the_newest_is_the_best(folder):
    checkpoints = Checkpoints(folder, keep=1)
    assert checkpoints.best is None and checkpoints.latest is None
    save(checkpoints, {1: None, 2: None})
    assert checkpoints.best == 2
    checkpoints.close()


def test_an_unfinished_checkpoint_is_never_seen_and_goes_away(folder):
    checkpoints = Checkpoints(folder, keep=3)
    save(checkpoints, {1: 2.0, 2: 1.0})
    checkpoints.close()
    unfinished = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", unfinished)
    reader = Checkpoints(folder, keep=None)
    assert (reader.latest, reader.best) == (2, 2)
    reader.close()
    assert unfinished.exists()  # reading changes nothing
    again = Checkpoints(folder, keep=3)
    assert (again.latest, again.best) == (2, 2)
    save(again, {3: 3.0})
    again.close()
    assert steps(folder) == [1, 2, 3]


@pytest.mark.parametrize("gone", ["metrics", "default", "_CHECKPOINT_METADATA"])
def test_a_checkpoint_that_was_half_removed_does_no_harm(folder, gone):
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, {1: 1.0, 2: 2.0})
    save(checkpoints, {3: 0.5})  # removes 1
    checkpoints.close()
    shutil.copytree(folder / "2", folder / "1")
    path = folder / "1" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = Checkpoints(folder, keep=2)
    assert (again.latest, again.best) == (3, 3)
    save(again, {4: None})
    again.close()
    assert steps(folder) == [3, 4]


def test_reading_makes_no_folder(folder):
    reader = Checkpoints(folder, keep=None)
    assert reader.latest is None and reader.best is None
    reader.close()
    assert not folder.exists()


def test_devices_share_the_writing_of_large_arrays_alone(folder):
    """Cutting hundreds of small ones into pieces takes longer than writing them."""
    checkpoints = Checkpoints(folder, keep=2)
    for step, size in ((1, 8), (2, 2**18)):
        checkpoints.save(make(step, size), None)
    checkpoints.close()
    with ocp.StandardCheckpointer() as reader:
        trees = [reader.metadata(folder / step / "default").item_metadata.tree for step in "12"]
    written = [tree["params"]["student"]["blocks"]["0"]["kernel"].storage for tree in trees]
    assert [found.chunk_shape for found in written] == [(8, 8), (2**15, 8)]  # eight devices


def fill_disk(folder: str) -> None:
    """Saves step 1, then step 2 where no file may become longer than 1 kB: like a full disk."""
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, {1: 1.0})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    checkpoints.save(make(2, size=400_000), None)
    checkpoints.wait()


def test_a_full_disk_is_one_line_and_loses_nothing(folder, tmp_path):
    # Of its own process, since other files of step 2 may still be written after the error.
    devices = {name: os.environ[name] for name in ("JAX_PLATFORMS", "XLA_FLAGS")}
    failed = forked.start([str(folder)], tmp_path, __file__, **devices)
    assert failed.wait() == 1
    assert failed.output().splitlines()[-1] == (
        f"cannot write a checkpoint in {folder}: File too large. Make "
        f"room and run the same command again (last whole checkpoint: step 1)"
    )
    again = Checkpoints(folder, keep=2)
    assert again.latest == 1
    np.testing.assert_array_equal(kernel(again.restore(1, make(0))), 1.0)
    save(again, {2: None})
    assert steps(folder) == [1, 2]
    again.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ValueError("RESOURCE_EXHAUSTED: x\nNo space left on device [28]"),
            "No space left on device",
        ),
        (PermissionError(13, "Permission denied"), "[Errno 13] Permission denied"),
    ],
)
def test_a_failed_write_is_told_by_the_next_save_or_check(folder, monkeypatch, error, reason):
    checkpoints = Checkpoints(folder, keep=2)

    def fail(*_, **__):
        raise error

    for name, call in (
        ("save", lambda: checkpoints.save(make(1), None)),
        ("check_for_errors", checkpoints.check),
        ("wait_until_finished", checkpoints.wait),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, name, fail)
            with pytest.raises(UserError) as found:
                call()
        assert f"{reason}. Make room" in str(found.value)
        assert str(found.value).endswith("(last whole checkpoint: none yet)")
    checkpoints.close()


def test_a_mistake_of_ours_is_no_full_disk(folder):
    checkpoints = Checkpoints(folder, keep=2)
    with pytest.raises(ValueError), checkpoints._file_errors():
        raise ValueError("shapes differ")
    checkpoints.close()


def flip(path) -> bytes:
    """Changes one bit in the middle of a file; returns what it held."""
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    return whole


# Reads that fail too, of other arrays, are heard by nobody.
unheard = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@unheard
def test_a_wrong_bit_in_any_file_is_never_taken_for_the_state(folder, tmp_path, caplog):
    """The last state is the last one or, said, the one before it; the best is the best or none."""
    checkpoints = Checkpoints(folder, keep=3)
    save(checkpoints, {1: 3.0, 2: 1.0, 3: 2.0})
    checkpoints.close()
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    noticed = {"last": [], "best": [], "rank": []}
    for number, file in enumerate(files):
        copy = shutil.copytree(folder, tmp_path / str(number) / "checkpoints")
        flip(copy / file)
        caplog.clear()
        try:
            opened = Checkpoints(copy, keep=3)
        except Damaged as error:
            assert str(copy / file) in str(error) and file.parts[:2] == ("1", "metrics")
            noticed["rank"].append(file)
            continue
        state = opened.newest(make(0))
        jax.tree.map(np.testing.assert_array_equal, state, make(int(state.step)))
        if int(state.step) < 3:
            damaged = int(state.step) + 1
            assert (
                file.parts[0] == str(damaged) and f"going on from step {damaged - 1}" in caplog.text
            )
            assert str(copy / str(damaged)) in caplog.text
            assert steps(copy.parent / "checkpoints.damaged") == list(range(damaged, 4))
            noticed["rank" if "metrics" in file.parts else "last"].append(file)
        elif opened.best == 2:
            try:
                best = opened.chosen(make(0))
                jax.tree.map(np.testing.assert_array_equal, best.params, make(2).params)
                assert int(best.step) == 2 and best.opt_state == ()
            except Damaged as error:
                assert file.parts[0] == "2" and str(copy / "2") in str(error)
                assert "the same command trains it again" in str(error) and steps(copy) == [1]
                noticed["best"].append(file)
        opened.close()
    assert {name: len(found) for name, found in noticed.items()} == dict(last=3, best=3, rank=3)


def test_a_wrong_bit_that_orbax_does_not_see(folder, caplog):
    checkpoints = Checkpoints(folder, keep=2)
    noise = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)  # not compressible
    for step in (1, 2):
        state = make(step, size=400)
        kernels = jax.tree.map(lambda x: x + noise, state.params)
        checkpoints.save(state.replace(params=kernels), None)
        checkpoints.wait()
    files = (path for path in (folder / "2" / "default").rglob("*") if path.is_file())
    flip(max(files, key=lambda path: path.stat().st_size))
    state = checkpoints.newest(make(0, size=400))
    np.testing.assert_array_equal(kernel(state), 1 + noise)
    assert f"{folder}/2 is damaged: other params than were saved; set aside in" in caplog.text
    checkpoints.close()


@unheard
def test_where_no_checkpoint_is_whole_nothing_is_moved(folder):
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, {1: None, 2: None})
    for step in (1, 2):
        flip(folder / str(step) / "default" / "_METADATA")
    with pytest.raises(Damaged, match=f"{folder}/2 is damaged .*, and no other is whole: rename"):
        checkpoints.newest(make(0))
    checkpoints.close()
    assert steps(folder) == [1, 2]


@unheard
def test_a_reader_changes_nothing(folder):
    """Of another run, say."""
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, {1: 2.0, 2: 1.0})
    checkpoints.close()
    whole = flip(folder / "2" / "metrics" / "metrics")
    with pytest.raises(Damaged, match="2/metrics/metrics is damaged"):
        Checkpoints(folder, keep=None)
    (folder / "2" / "metrics" / "metrics").write_bytes(whole)
    flip(folder / "2" / "default" / "_METADATA")
    reader = Checkpoints(folder, keep=None)
    with pytest.raises(Damaged, match=f"{folder}/2 is damaged"):
        reader.restore(2, make(0))
    with pytest.raises(Damaged, match=f"{folder}/2 is damaged"):
        reader.fits(2, make(0))
    reader.close()
    assert steps(folder) == [1, 2]


def test_too_little_memory_is_no_damage(folder):
    checkpoints = Checkpoints(folder, keep=2)
    with pytest.raises(RuntimeError), checkpoints._damage(1):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    checkpoints.close()


def test_the_best_is_read_without_the_optimizer(folder, monkeypatch):
    checkpoints = Checkpoints(folder, keep=1)
    save(checkpoints, {1: 1.0})
    split = make(0, place=NamedSharding(MESH, P("fsdp")))
    read, restore = [], checkpoint.ocp.Checkpointer.restore

    def note(self, path, args):
        read.extend(args.item)
        return restore(self, path, args=args)

    monkeypatch.setattr(checkpoint.ocp.Checkpointer, "restore", note)
    best = checkpoints.chosen(split)
    assert read == ["step", "params"]
    assert int(best.step) == 1 and best.opt_state == ()
    assert kernel(best).sharding == kernel(split).sharding
    np.testing.assert_array_equal(kernel(best), 1.0)
    checkpoints.close()


def test_what_is_saved_about_a_state_comes_back(folder):
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save(make(1), None, {"metrics.csv": "abc"})
    checkpoints.wait()
    assert checkpoints.note(1) == {"metrics.csv": "abc"}
    checkpoints.close()


def of_model(fsdp: int, model: int = 1) -> TrainState:
    """A state of a model whose tables are padded as on this mesh; every number is 1."""
    student = tiny.model("bert", "mlm", num_hidden_layers=1, vocab_size=97)
    rows = 97 if fsdp * model == 1 else -(-97 // (fsdp * model)) * fsdp * model
    ones = jax.tree.map(jnp.ones_like, student.params)
    padded = families.with_rows(ones, rows)
    params = {"student": padded, "objective": {}}
    mesh = sharding.make_mesh(fsdp, jax.devices()[: fsdp * model], model)
    make = lambda _: OPTIMIZER  # noqa: E731
    return create(lambda x: x, params, student.graphdef, make, families.PARTITION, mesh)


@pytest.mark.parametrize(
    ("saved", "wanted"), [((1, 1), (4, 2)), ((4, 2), (2, 1)), ((2, 1), (1, 1))]
)
def test_tables_fit_a_mesh_with_other_padding(tmp_path, saved, wanted):
    state, like = of_model(*saved), of_model(*wanted)
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        checkpoints.save(state, None)
        checkpoints.wait()
        assert checkpoints.fits(0, like)
        found = checkpoints.restore(0, like)
    for one, other in zip(*map(jax.tree.leaves, (found, like)), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding


def test_another_vocabulary_is_no_padding(tmp_path):
    state, like = of_model(1), of_model(1)
    longer = tiny.model("bert", "mlm", num_hidden_layers=1, vocab_size=98)
    like = like.replace(
        params={"student": longer.params, "objective": {}}, graphdef=longer.graphdef
    )
    with contextlib.closing(Checkpoints(tmp_path, keep=2)) as checkpoints:
        checkpoints.save(state, None)
        checkpoints.wait()
        assert not checkpoints.fits(0, like)


if __name__ == "__main__":
    try:
        fill_disk(sys.argv[1])
    except UserError as error:
        print(error)  # what goes to stderr, logs and a traceback, is too long for a file
        sys.exit(1)
