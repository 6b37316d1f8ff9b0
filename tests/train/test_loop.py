"""The loop around a step that is no model: one number that depends on all batches and dropout."""

import math
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from kd_jax.errors import UserError
from kd_jax.train import finite, loop, records, sharding
from kd_jax.train.checkpoint import Checkpoints
from kd_jax.train.loop import Intervals, Schedules, Selection
from kd_jax.train.preemption import Preempted
from kd_jax.train.state import TrainState, abstract, settle
from kd_jax.types import Batch, Ratio

MESH = sharding.make_mesh(1)
OPTIMIZER = optax.trace(0.9)
PLAN = types.SimpleNamespace(mesh=MESH, objective=types.SimpleNamespace(names=["ce"]))
STEPS = 12


@jax.jit(donate_argnames="state")
def update(state, ids, inputs):
    noise = (inputs.seed % 1000).astype(jnp.float32) / 1000
    value = state.params["student"]["w"] * 0.9 + jnp.mean(ids.astype(jnp.float32)) + noise
    return state.replace(
        step=state.step + 1,
        params={"student": {"w": value}, "objective": {}},
        opt_state=jax.tree.map(lambda x: x + value, state.opt_state),
    )


@pytest.fixture
def events(monkeypatch):
    return watched(monkeypatch)


def watched(monkeypatch):
    """What happens, in order; and the place to make a step's metrics bad."""
    happened = types.SimpleNamespace(log=[], bad={})

    def train_step(state, batch, teacher, inputs, *, program):
        at = int(state.step) + 1
        on_devices = (isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((batch, inputs)))
        assert all(on_devices), "the step would send what is not there in silence"
        happened.log.append(f"step {at}")
        loss = jnp.float32(happened.bad.get(("loss", at), 1.0 / at))
        norm = jnp.float32(happened.bad.get(("grad_norm", at), 0.5))
        terms = {"ce": Ratio(loss * 2, jnp.float32(2.0))}
        return update(state, batch.ids_B, inputs), {
            "loss": loss,
            "grad_norm": norm,
            "terms": terms,
        }

    monkeypatch.setattr(loop, "train_step", train_step)
    for name, kind, text in (
        ("save", Checkpoints, lambda s, state, *about: f"save {int(state.step)}"),
        ("restore", Checkpoints, lambda s, step, like: f"restore {step}"),
        ("add", records.Table, lambda s, row: f"{s.path.stem} {row['step']}"),
        ("sync", records.Records, lambda s: "sync"),
    ):
        monkeypatch.setattr(kind, name, noted(getattr(kind, name), text, happened))
    return happened


def noted(method, text, happened):
    def call(self, *args):
        happened.log.append(text(self, *args))
        return method(self, *args)

    return call


class Stream:
    """Batch `step` holds eight numbers that depend on the step."""

    def __init__(self, events, at=None):
        self._events, self._at = events, at or {}

    def batches(self, start):
        for step in range(start, 1000):
            self._at.get(step, lambda: None)()
            self._events.log.append(f"batch {step}")
            ids = np.arange(8, dtype=np.int32) * (step + 3) % 7
            mask = np.ones((8, 4), np.float32)
            yield Batch(ids, mask.astype(np.int32), mask, ids, mask)


def new_state() -> TrainState:
    params = {"student": {"w": jnp.zeros(3)}, "objective": {}}
    state = TrainState(jnp.int32(0), params, OPTIMIZER.init(params), None, OPTIMIZER)
    return jax.device_put(state, NamedSharding(MESH, PartitionSpec()))


def fit(folder, events, *, steps=STEPS, at=None, validate=None, losses=None, state=None, **options):
    """`at`: step -> what happens when its batch is asked for; `losses`: step -> held-out loss."""

    def held_out(student):
        step = int(events.log[-1].split()[1]) if events.log else 0
        events.log.append("evaluate")
        return {"loss": (losses or {}).get(step, 5.0 - step / 100), "accuracy": 0.5}

    options = dict(intervals=Intervals(evaluate=2, save=4, log=3), keep=2) | options
    return loop.fit(
        new_state() if state is None else state,
        stage="student",
        program=PLAN,
        stream=Stream(events, at),
        teacher=options.pop("teacher", None),
        schedules=Schedules(lambda step: 0.1 * step, {"ce": lambda step: 1.0}, {}, seed=3),
        steps=steps,
        validate=validate or held_out,
        directory=epath.Path(folder),
        **options,
    )


def files(folder) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("metrics.csv", "eval.csv")}


def final(folder) -> list[np.ndarray]:
    """All arrays of the last checkpoint."""
    reader = Checkpoints(folder / "checkpoints", keep=None)
    state = reader.restore(reader.latest, new_state())
    reader.close()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(files, arrays) of a whole run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        fit(folder, watched(monkeypatch))
    return files(folder), final(folder)


def check_whole(folder, undisturbed):
    assert files(folder) == undisturbed[0]
    check_arrays(folder, undisturbed)


def check_arrays(folder, undisturbed):
    assert all(map(np.array_equal, final(folder), undisturbed[1]))


def test_a_step_begins_when_the_last_one_has_given_its_memory_back(tmp_path, events, monkeypatch):
    log = events.log
    monkeypatch.setattr(loop, "settle", lambda state: log.append(f"settle {state.step}") or state)
    fit(tmp_path, events, steps=2)
    steps = [line for line in log if line.split()[0] in ("step", "settle")]
    assert steps == ["settle 0", "step 1", "settle 1", "step 2"]

    own = types.SimpleNamespace(sleep=lambda seconds: log.append("moment"))
    monkeypatch.setattr("kd_jax.train.state.time", own)  # other threads sleep as well
    log.clear()
    done, late = (
        types.SimpleNamespace(is_ready=lambda ready=ready: ready) for ready in (True, False)
    )
    late.block_until_ready = lambda: log.append("ready")
    settle(types.SimpleNamespace(step=done))
    assert not log
    given = types.SimpleNamespace(step=late)
    assert settle(given) is given
    assert log == ["ready", "moment"]


def test_the_order_of_a_run(tmp_path, events):
    fit(tmp_path, events, steps=4)
    assert [event for event in events.log if not event.startswith("timing")] == [
        *("batch 0", "step 1", "metrics 1"),  # the first step compiles, and is waited for
        *("batch 1", "step 2", "metrics 2", "evaluate", "eval 2"),
        *("batch 2", "step 3", "batch 3", "step 4", "metrics 3"),
        *("metrics 4", "evaluate", "eval 4", "sync", "save 4"),
    ]


def test_the_order_of_a_continued_run(tmp_path, events):
    fit(tmp_path, events, steps=4)
    events.log.clear()
    fit(tmp_path, events, steps=6)
    assert [event for event in events.log if not event.startswith("timing")] == [
        *("restore 4", "batch 4", "step 5", "metrics 5"),
        *("batch 5", "step 6", "metrics 6", "evaluate", "eval 6", "sync", "save 6"),
    ]


def test_a_finished_stage_computes_nothing(tmp_path, events):
    fit(tmp_path, events)
    events.log.clear()
    before = files(tmp_path)
    fitted = fit(tmp_path, events)
    assert events.log == [f"restore {STEPS}"]
    assert files(tmp_path) == before
    assert fitted.best_step == STEPS


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 7, 8, 11])
def test_interrupted_and_continued_is_the_same_bit_for_bit(tmp_path, events, undisturbed, stop):
    class Crash(Exception):
        pass

    def crash():
        raise Crash

    folder = tmp_path / "crashed"
    with pytest.raises(Crash):
        fit(folder, events, at={stop: crash})
    fit(folder, events)
    check_whole(folder, undisturbed)


@pytest.mark.parametrize("stop", [0, 1, 3, 4, 5, 8, 11])
def test_sigterm_saves_and_the_same_command_continues(tmp_path, events, undisturbed, stop, capsys):
    folder = tmp_path / "preempted"
    with pytest.raises(Preempted) as status:
        fit(folder, events, at={stop: terminate})
    assert status.value.code == 143
    # The signal came while a batch was made: the step was taken, saved and not evaluated twice.
    assert f"student {stop + 1}/12  saved" in capsys.readouterr().out
    reader = Checkpoints(folder / "checkpoints", keep=None)
    assert reader.latest == stop + 1
    reader.close()
    events.log.clear()
    fit(folder, events)
    assert events.log[0] == f"restore {stop + 1}"
    assert events.log.count(f"step {stop + 1}") == 0
    check_whole(folder, undisturbed)


def test_sigterm_at_the_very_end_is_not_forgotten(tmp_path, events):
    def validate(student):
        terminate()
        return {"loss": 1.0}

    with pytest.raises(Preempted):
        fit(tmp_path, events, steps=2, validate=validate)
    assert fit(tmp_path, events, steps=2).best_step == 2


def test_sigterm_is_left_to_others_after_the_loop(tmp_path, events):
    before = signal.getsignal(signal.SIGTERM)
    fit(tmp_path, events, steps=2)
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_best_step_does_not_depend_on_a_signal(tmp_path, events):
    losses = {2: 1.0, 4: 3.0, 6: 0.5, 8: 2.0, 10: 4.0, 12: 4.0}  # the best are never saved
    assert fit(tmp_path / "a", events, losses=losses).best_step == 8
    with pytest.raises(Preempted):
        fit(tmp_path / "b", events, losses=losses, at={5: terminate})  # saves step 6
    fitted = fit(tmp_path / "b", events, losses=losses)
    assert fitted.best_step == 8 and int(fitted.state.step) == 8


def test_the_best_state_is_given_back(tmp_path, events):
    fitted = fit(tmp_path, events, losses={8: 1.0})
    assert fitted.best_step == 8 and int(fitted.state.step) == 8


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [1, 6, 8, 12])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, events, name, value, at):
    events.bad[name, at] = value
    with pytest.raises(UserError) as error:
        fit(tmp_path, events)
    saved = (at - 1) // 4 * 4
    last = f"step {saved}" if saved else "none yet"
    why = "lower optim.learning_rate or set optim.clip_norm"
    if at == 1:  # no learning rate has had a part in it
        why = (
            "nothing was updated before, so the parameters that the stage starts from are not "
            "finite or too large for config.precision; look at them, or take fp32"
        )
    assert str(error.value) == (
        f"student: {name} is {value} at step {at}: {why} (last checkpoint: {last})"
    )
    assert records.read(tmp_path / "metrics.csv")[-1]["step"] == str(at)
    reader = Checkpoints(tmp_path / "checkpoints", keep=None)
    assert reader.latest == (saved or None)  # whole, though it was being written
    reader.close()


@pytest.mark.parametrize("whole", [True, False])
def test_a_teacher_that_is_not_finite_is_told(tmp_path, events, monkeypatch, whole):
    monkeypatch.setattr(finite, "teacher_is_finite", lambda teacher, batch, *, program: whole)
    events.bad["loss", 6] = math.nan
    says = "the teacher's logits are finite; lower optim" if whole else "logits are not finite"
    with pytest.raises(UserError, match=f"student: loss is nan at step 6: .*{says}"):
        fit(tmp_path, events, teacher="teacher")


def test_a_held_out_loss_that_is_not_finite_ends_the_run(tmp_path, events):
    with pytest.raises(UserError, match="held-out loss is nan at step 8.*last checkpoint: step 4"):
        fit(tmp_path, events, losses={8: math.nan})
    assert "save 8" not in events.log


def test_figures_without_a_loss(tmp_path, events):
    figures = iter((0.5, 0.7, 0.7, math.nan))
    with pytest.raises(UserError, match="held-out spearman is nan at step 8"):
        options = dict(selection=Selection("spearman", larger=True))
        fit(tmp_path, events, validate=lambda student: {"spearman": next(figures)}, **options)
    assert "save 4" in events.log
    assert Selection("spearman", larger=True).rank({"spearman": 0.5}) == [-0.5, 0.0]


def test_goes_on_from_another_stage(tmp_path, events, undisturbed):
    fit(tmp_path / "first", events, steps=4)
    events.log.clear()
    fit(tmp_path / "second", events, resume=str(tmp_path / "first"))
    assert events.log[:2] == ["restore 4", "evaluate"]
    check_arrays(tmp_path / "second", undisturbed)
    events.log.clear()
    fit(tmp_path / "second", events, resume=str(tmp_path / "first"))
    assert events.log == [f"restore {STEPS}"]  # its own checkpoints come first


def test_nothing_to_go_on_from(tmp_path, events):
    with pytest.raises(
        UserError, match="config.resume=.*typo: no checkpoint there; give RUN/STAGE"
    ):
        fit(tmp_path / "a", events, resume=str(tmp_path / "typo"))
    assert not (tmp_path / "typo").exists()
    fit(tmp_path / "b", events, steps=6)
    with pytest.raises(UserError, match="is at step 6, beyond the 4 of this stage"):
        fit(tmp_path / "c", events, steps=4, resume=str(tmp_path / "b"))


def test_timing_rows(tmp_path, events):
    fit(tmp_path, events)
    rows = records.read(tmp_path / "timing.csv")
    assert [row["step"] for row in rows] == ["4", "7", "10", "12"]  # without the first step
    assert all(0 <= float(row["input_wait_fraction"]) <= 1 for row in rows)


def test_the_shortest_stage_has_timing(tmp_path, events):
    fit(tmp_path, events, steps=1)  # of a step that compiles
    (row,) = records.read(tmp_path / "timing.csv")
    assert row["step"] == "1" and float(row["tokens_per_second"]) > 0


def test_a_stage_that_ends_early_has_timing(tmp_path, events):
    worse = {step: float(step) for step in range(STEPS)}
    how = dict(intervals=Intervals(evaluate=2, save=2, log=1000), selection=Selection(patience=2))
    assert fit(tmp_path, events, losses=worse, **how).steps < STEPS
    (row,) = records.read(tmp_path / "timing.csv")  # from the first save
    assert row["step"] == "2" and float(row["tokens_per_second"]) > 0


def test_compiling_is_said_once(tmp_path, events, capsys):
    fit(tmp_path, events)
    assert capsys.readouterr().out.count("compiling the step for 8 rows of 4 tokens") == 1


def test_evaluation_and_saving_are_no_training_time(tmp_path, events, monkeypatch):
    """By a clock that a batch moves on by a second, and an evaluation by a thousand."""
    now = [0.0]
    monkeypatch.setattr(records.time, "perf_counter", lambda: now[0])

    def move(seconds):
        now[0] += seconds

    def validate(student):
        move(1000)
        return {"loss": 1.0}

    fit(tmp_path, events, at={step: lambda: move(1) for step in range(STEPS)}, validate=validate)
    rows = records.read(tmp_path / "timing.csv")
    speed = [(row["seconds"], row["tokens_per_second"], row["rows_per_second"]) for row in rows]
    assert speed == [("3.0", "32.0", "8.0")] * 3 + [
        ("2.0", "32.0", "8.0")
    ]  # eight rows of four tokens a second
    assert [row["input_wait_fraction"] for row in rows] == ["1.0"] * 4


def test_metrics_columns(tmp_path, events):
    fit(tmp_path, events, steps=2)
    first, second = records.read(tmp_path / "metrics.csv")
    assert list(first) == ["step", "loss", "ce", "ce_weighted", "learning_rate", "grad_norm"]
    assert second == {
        "step": "2",
        "loss": "0.5",
        "ce": "0.5",
        "ce_weighted": "0.5",
        "learning_rate": str(float(np.float32(0.1))),
        "grad_norm": "0.5",
    }


def test_every_step_has_its_own_dropout():
    schedules = Schedules(lambda step: 0.0, {}, {}, seed=3)
    seeds = [int(schedules.at(step).seed) for step in range(100)]
    assert len(set(seeds)) == 100 and seeds[7] == int(schedules.at(7).seed)
    assert seeds[0] != int(Schedules(lambda step: 0.0, {}, {}, seed=4).at(0).seed)


ACCURACY = {2: 0.5, 4: 0.7, 6: 0.7, 8: 0.6, 10: 0.65, 12: 0.6}
PATIENT = dict(
    intervals=Intervals(evaluate=2, save=2, log=3),
    selection=Selection("accuracy", larger=True, patience=3),
)


def scored(events, losses):
    """Held-out figures with ACCURACY, and losses by step."""

    def validate(student):
        step = int(next(x for x in reversed(events.log) if x.startswith("step")).split()[1])
        return {"loss": losses.get(step, 1.0), "accuracy": ACCURACY[step]}

    return validate


@pytest.mark.parametrize(("losses", "best"), [({4: 0.5}, 4), ({6: 0.5}, 6)])
def test_stops_when_nothing_gets_better(tmp_path, events, losses, best):
    """Equal accuracies are decided by the loss, and the waiting counts from the best."""
    fitted = fit(tmp_path, events, validate=scored(events, losses), **PATIENT)
    assert (fitted.best_step, fitted.steps) == (best, best + 6)
    again = fit(tmp_path, events, validate=scored(events, losses), **PATIENT)
    assert (again.best_step, again.steps) == (best, best + 6)


def test_stops_at_the_same_step_when_interrupted(tmp_path, events):
    validate = scored(events, {4: 0.5})
    with pytest.raises(Preempted):
        fit(tmp_path, events, at={7: terminate}, validate=validate, **PATIENT)
    fitted = fit(tmp_path, events, validate=validate, **PATIENT)
    assert (fitted.best_step, fitted.steps) == (4, 10)


def test_a_model_that_changes_on_its_way(tmp_path, events):
    """Two calls in one directory: the second begins where the first ended, wherever it is killed,
    and its checkpoints alone are candidates."""
    first = dict(steps=5, selection=None, losses={2: 0.1, 4: 0.1})
    ended = fit(tmp_path / "a", events, **first)
    assert (ended.best_step, int(ended.state.step)) == (5, 5)
    events.log.clear()
    whole = fit(tmp_path / "a", events, state=ended.state, begin=5, losses={8: 0.2})
    assert events.log[:3] == ["batch 5", "step 6", "metrics 6"]  # nothing restored, nothing judged
    assert whole.best_step == 8

    class Crash(Exception):
        pass

    def crash():
        raise Crash

    folder = tmp_path / "b"
    ended = fit(folder, events, **first)
    with pytest.raises(Crash):
        fit(folder, events, state=ended.state, begin=5, losses={8: 0.2}, at={10: crash})
    again = fit(folder, events, state=abstract(new_state()), begin=5, losses={8: 0.2})
    assert again.best_step == 8
    assert files(folder) == files(tmp_path / "a")
    assert all(map(np.array_equal, final(folder), final(tmp_path / "a")))


def damage(folder, step):
    """Makes a checkpoint unreadable."""
    (folder / "checkpoints" / str(step) / "default" / "_METADATA").write_text("{")


def test_a_damaged_checkpoint_is_trained_again_from_the_one_before(
    tmp_path, events, undisturbed, caplog
):
    folder = tmp_path / "damaged"
    fit(folder, events, steps=8)
    damage(folder, 8)
    events.log.clear()
    fit(folder, events)
    assert events.log[:3] == ["restore 8", "restore 4", "batch 4"]
    assert f"{folder}/checkpoints/8 is damaged" in caplog.text
    assert "going on from step 4" in caplog.text
    assert (folder / "checkpoints.damaged" / "8").exists()
    check_whole(folder, undisturbed)


def test_a_damaged_best_checkpoint_is_trained_again(tmp_path, events):
    """Nothing else takes its place in silence."""
    best = dict(losses={8: 1.0})
    whole = fit(tmp_path / "whole", events, **best)
    folder = tmp_path / "damaged"
    fit(folder, events, **best, keep=3)
    damage(folder, 8)
    with pytest.raises(UserError) as error:
        fit(folder, events, **best, keep=3)
    assert f"{folder}/checkpoints/8 is damaged" in str(error.value)
    assert str(error.value).endswith("the same command trains it again")
    again = fit(folder, events, **best, keep=3)
    assert again.best_step == 8 and files(folder) == files(tmp_path / "whole")
    np.testing.assert_array_equal(
        again.state.params["student"]["w"], whole.state.params["student"]["w"]
    )


def test_a_damaged_best_checkpoint_without_one_before_it(tmp_path, events):
    best = dict(losses={4: 1.0})
    fit(tmp_path, events, **best, keep=1)
    damage(tmp_path, 4)
    for _ in range(2):
        with pytest.raises(
            UserError, match="4 is damaged .*; none is before it: rename it to go on"
        ):
            fit(tmp_path, events, **best, keep=1)


def test_no_checkpoint_is_whole(tmp_path, events):
    fit(tmp_path, events, steps=4)
    damage(tmp_path, 4)
    with pytest.raises(UserError, match="4 is damaged .*, and no other is whole"):
        fit(tmp_path, events)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text(path.read_text().replace("\n2,0.5", "\n2,0.7")),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\n2,", b"\n\xff,")),
        lambda path: path.write_text(path.read_text().replace("loss", "lost")),
        lambda path: path.write_text(""),
        lambda path: path.unlink(),
    ],
    ids=["value", "no text", "header", "empty", "gone"],
)
def test_rows_that_are_not_those_that_were_written_are_said(
    tmp_path, events, undisturbed, caplog, spoil
):
    folder = tmp_path / "spoilt"
    fit(folder, events, steps=8)
    spoil(folder / "metrics.csv")
    fit(folder, events)
    (said,) = [text for text in caplog.messages if "damaged" in text]
    assert said.startswith(f"{folder}/metrics.csv: damaged, its rows up to step 8 are not those")
    assert [int(row["step"]) for row in records.read(folder / "metrics.csv")] == [9, 10, 11, 12]
    assert files(folder)["eval.csv"] == undisturbed[0]["eval.csv"]
    check_arrays(folder, undisturbed)


def test_the_best_comes_without_the_optimizer(tmp_path, events):
    """Two whole states would need twice the memory."""
    fitted = fit(tmp_path, events, losses={8: 1.0})
    assert fitted.state.opt_state == () and fitted.state.params["student"]["w"].shape == (3,)


def test_a_figure_that_is_not_finite_is_the_last():
    figures = [{"loss": 1.0, "kl": x} for x in (math.nan, 2.0, math.inf, 1.0)]
    assert sorted(map(Selection("kl").rank, figures))[:2] == [[1.0, 1.0], [2.0, 1.0]]
    assert sorted(map(Selection("kl", larger=True).rank, figures))[:2] == [[-2.0, 1.0], [-1.0, 1.0]]
    assert all(map(math.isfinite, Selection("kl").rank(figures[0])))


def test_a_row_of_metrics_needs_no_device():
    """The device is busy with the next step when a row is made."""
    terms = {"ce": Ratio(np.float32(3.0), np.float32(2.0)), "kl": Ratio(*np.zeros(2, np.float32))}
    metrics = {"terms": terms, "loss": np.float32(0.75), "grad_norm": np.float32(1.0)}
    inputs = loop.Inputs(np.float32(1e-3), {"ce": np.float32(0.5)}, {}, np.uint32(0))
    with jax.transfer_guard("disallow"):
        row = loop._metrics_row(7, metrics, inputs, ["ce"])
    assert (row["ce"], row["ce_weighted"], row["kl"]) == (1.5, 0.75, 0.0)
