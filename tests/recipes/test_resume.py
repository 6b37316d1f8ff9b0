"""A run that is killed goes on under the same command, and ends as if it had not been."""

import json
import signal
import time

import pytest

from benchmarks import kill_resume
from benchmarks.kill_resume import Kill
from kd_jax import storage
from kd_jax.train.distributed import HEARTBEAT_SECONDS
from tests import forked, tiny_config

# At step 5 the checkpoint of step 2 at least is whole.
KILLS = [
    Kill("teacher", step=5),
    Kill("student", step=5, write="checkpoint"),
    Kill("student", write="export"),
]


# It holds a run at $HOLD, the first row of "STAGE/step", until the file `held` is gone.
WANDB = """
import json, os, pathlib, time

class Error(Exception): pass

class Run:
    def __init__(self, options): self.file = pathlib.Path(options["dir"], "wandb.jsonl")
    def log(self, row):
        self.file.open("a").write(json.dumps(row) + "\\n")
        stage, _, step = os.environ.get("HOLD", "").partition("/")
        if stage and row != "finished" and row.get(stage + "/step") == int(step):
            os.environ["HOLD"], held = "", self.file.with_name("held")
            held.touch()
            while held.exists(): time.sleep(0.01)
    def finish(self): self.log("finished")

def init(**options):
    run = Run(options)
    run.log(dict(project=options["project"], id=options["id"], resume=options["resume"]))
    return run
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    (folder / "wandb.py").write_text(WANDB)  # in the place of the real one
    return folder


@pytest.fixture(scope="module")
def start(folder):
    config = f"--config={tiny_config.__file__}:{tiny_config.write_text(folder)}"
    base = [config, "--config.wandb=project"]
    return lambda run, *more, **environment: forked.start(
        [*base, f"--workdir={run}", *more], folder, **environment
    )


@pytest.fixture(scope="module")
def undisturbed(folder, start):
    run = folder / "undisturbed"
    process = start(run)
    assert process.wait() == 0, process.error()
    return run


def test_killed_runs_end_bitwise_the_same(folder, start, undisturbed):
    done = kill_resume.run_killed(start, folder / "killed", KILLS, timeout=120)
    assert done["hits"] == {"teacher": 1, "checkpoint": 1, "export": 1}
    assert kill_resume.differences(undisturbed, folder / "killed") == []


def test_a_difference_is_seen(undisturbed, folder):
    """What the test above relies on."""
    weights = undisturbed / "export" / "student" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    assert kill_resume.differences(undisturbed, folder / "killed") == [
        "export/student/model.safetensors"
    ]
    weights.write_bytes(whole)


def logged(run):
    return [json.loads(line) for line in (run / "wandb.jsonl").read_text().splitlines()]


def test_wandb_gets_all_stages_and_knows_a_continued_run(undisturbed, folder):
    first, *rows, last = logged(undisturbed)
    assert first["project"] == "project" and last == "finished"
    for stage in ("teacher", "student"):
        steps = [row[f"{stage}/step"] for row in rows if f"{stage}/train/loss" in row]
        assert steps == list(range(1, 7))
        assert [row for row in rows if f"{stage}/eval/loss" in row]
    starts = [row for row in logged(folder / "killed") if "project" in row]
    assert len(starts) == 4 and len({start["id"] for start in starts}) == 1
    assert starts[0]["id"] != first["id"]


def test_after_the_end_the_same_command_prints_the_table(undisturbed, start):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.csv")}
    again = start(undisturbed)
    assert again.wait() == 0
    assert again.output().startswith("run directory:") and "perplexity" in again.output()
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.csv")}


def test_a_run_of_another_config_is_refused(undisturbed, start):
    other = start(undisturbed, "--config.seed=7")
    assert other.wait() == 1
    (error,) = other.error().splitlines()
    assert error == (
        f"error: {undisturbed} holds a run of another config; differing: seed (0 there, 7 here). "
        f"Give another --workdir, or none"
    )


@pytest.fixture
def two_processes(start):
    """Starts two processes of one run."""
    started = []

    def both(run, *more, **environment):
        started.extend(start(run, *more, *flags, **environment) for flags in forked.cluster())
        return started[-2:]

    yield both
    for process in started:
        if process.poll() is None:
            process.kill()


def until(reached, processes):
    deadline = time.monotonic() + 120
    while not reached():
        assert all(process.poll() is None for process in processes), processes[0].error()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_stop_and_go_on_together(undisturbed, folder, two_processes):
    """They agree on the step to save; without one of them the other ends; the run ends bitwise the
    same. Its teacher is a checkpoint, of which each process reads its part; the student starts from
    it."""
    flags = [
        f"--config.teacher.model={undisturbed / 'export' / 'student'}",
        "--config.student.init=teacher",
        "--config.stages={'student': {}}",
        "--config.tokenizer.train=",
        "--config.mesh.fsdp=2",
        "--config.eval.every=8",
        "--config.checkpoint.every=8",
        "--config.steps=16",
    ]
    whole, killed = folder / "split", folder / "split_killed"
    held = killed / "held"

    processes = two_processes(killed, *flags, HOLD="student/2")
    until(held.exists, processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told
    held.unlink()
    assert [process.wait() for process in processes] == [143, 143]
    (saved,) = kill_resume.checkpoints(killed, "student")
    assert 2 < saved == kill_resume.last_step(killed, "student") < 8
    assert f"student {saved}/16  saved" in processes[0].output()
    assert "saved" not in processes[1].output() + processes[1].error()

    # Between two checkpoints: in the barrier of one the other would wait for the heartbeat.
    processes = two_processes(killed, *flags, HOLD="student/10")
    until(lambda: held.exists() and 8 in kill_resume.checkpoints(killed, "student"), processes)
    metrics = (killed / "student" / "metrics.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in metrics[1:10]] == list(range(1, 10))
    ended = time.monotonic()
    processes[1].kill()
    held.unlink()
    assert processes[0].wait() == 1
    assert time.monotonic() - ended < HEARTBEAT_SECONDS
    errors = [line for line in processes[0].error().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 0 of 2 cannot go on" in errors[0]
    assert "Traceback" not in processes[0].error()
    assert kill_resume.checkpoints(killed, "student")[-1] == 8

    for run in (killed, whole):
        assert [process.wait() for process in two_processes(run, *flags)] == [0, 0]
    for name in ("metrics.csv", "eval.csv"):
        assert (whole / "student" / name).read_bytes() == (killed / "student" / name).read_bytes()
    weights = "export/student/model.safetensors"
    assert (whole / weights).read_bytes() == (killed / weights).read_bytes()
    # The digests of parameters and moments.
    last = [
        storage.read_json(run / "student/checkpoints/16/metrics/metrics") for run in (whole, killed)
    ]
    assert last[0]["state"] == last[1]["state"] and len(last[0]["state"]) == 3
