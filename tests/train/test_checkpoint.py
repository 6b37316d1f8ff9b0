import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from kd_jax.errors import UserError
from kd_jax.train import sharding
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.train.state import TrainState

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


@pytest.fixture
def full_disk():
    """No file may become longer than 100 kB: like a full disk, for this process alone."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_loses_nothing(folder, full_disk):
    checkpoints = Checkpoints(folder, keep=2)
    save(checkpoints, {1: 1.0})
    full_disk(1000)
    with pytest.raises(UserError) as error:
        checkpoints.save(make(2, size=400_000), None)
        checkpoints.wait()
    full_disk(resource.RLIM_INFINITY)
    message = str(error.value)
    assert message == (
        f"cannot write a checkpoint in {folder}: File too large. Make room and run the same "
        f"command again (last whole checkpoint: step 1)"
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
