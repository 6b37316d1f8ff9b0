"""A run that is killed goes on under the same command, and ends as if it had not been."""

import json
import signal
import socket
import time

import pytest

from benchmarks import kill_resume
from benchmarks.kill_resume import Kill
from kd_jax import storage
from kd_jax.train.distributed import HEARTBEAT_SECONDS
from tests import forked, tiny_config

KILLS = [
    Kill("teacher", step=3),
    Kill("student", step=4, write="checkpoint"),
    Kill("student", write="export"),
]


WANDB = """
import json, pathlib

class Error(Exception): pass

class Run:
    def __init__(self, options): self.file = pathlib.Path(options["dir"], "wandb.jsonl")
    def log(self, row): self.file.open("a").write(json.dumps(row) + "\\n")
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
    return lambda run, *more: forked.start([*base, f"--workdir={run}", *more], folder)


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


# A run that ends only when it is told to, and saves only then.
ENDLESS = [
    "--config.steps=1000000",
    "--config.eval.every=1000000",
    "--config.checkpoint.every=1000000",
]


@pytest.fixture
def two_processes(start):
    """Starts two processes of one run."""
    started = []

    def both(run, *more):
        with socket.create_server(("", 0)) as server:
            at = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
        cluster = [[at, f"--process_id={i}", "--process_count=2"] for i in range(2)]
        started.extend(start(run, *more, *flags) for flags in cluster)
        return started[-2:]

    yield both
    for process in started:
        if process.poll() is None:
            process.kill()


def until_step(run, step, processes, stage="teacher"):
    deadline = time.monotonic() + 120
    while kill_resume.last_step(run, stage) < step:
        assert all(process.poll() is None for process in processes), processes[0].error()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_two_processes_agree_on_the_step_to_save_and_end_together(folder, two_processes):
    run = folder / "two"
    processes = two_processes(run, *ENDLESS)
    until_step(run, 5, processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told
    assert [process.wait() for process in processes] == [143, 143]
    (saved,) = kill_resume.checkpoints(run, "teacher")
    assert saved == kill_resume.last_step(run, "teacher")
    assert f"teacher {saved}/1000000  saved" in processes[0].output()
    assert "saved" not in processes[1].output() + processes[1].error()

    processes = two_processes(run, *ENDLESS)
    until_step(run, saved + 5, processes)
    metrics = (run / "teacher" / "metrics.csv").read_text().splitlines()
    assert [int(row.split(",")[0]) for row in metrics[1 : saved + 4]] == list(range(1, saved + 4))
    killed = time.monotonic()
    processes[1].kill()
    assert processes[0].wait() == 1
    assert time.monotonic() - killed < HEARTBEAT_SECONDS
    errors = [line for line in processes[0].error().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "process 0 of 2 cannot go on" in errors[0]
    assert "Traceback" not in processes[0].error()


def test_a_sharded_run_that_lost_a_process_ends_bitwise_the_same(
    undisturbed, folder, two_processes
):
    """Its teacher is a checkpoint, of which each process reads its part; the student starts from
    it."""
    flags = [
        f"--config.teacher.model={undisturbed / 'export' / 'student'}",
        "--config.student.init=teacher",
        "--config.stages={'student': {}}",
        "--config.tokenizer.train=",
        "--config.mesh.fsdp=2",
        "--config.eval.every=40",
        "--config.checkpoint.every=40",
        "--config.steps=120",
    ]
    whole, killed = folder / "split", folder / "split_killed"
    processes = two_processes(killed, *flags)
    # Between two checkpoints: in the barrier of one the other would wait for the heartbeat.
    until_step(killed, 45, processes, "student")
    processes[1].kill()
    assert processes[0].wait() == 1
    assert 0 < max(kill_resume.checkpoints(killed, "student")) < 120
    for run in (killed, whole):
        assert [process.wait() for process in two_processes(run, *flags)] == [0, 0]
    for name in ("metrics.csv", "eval.csv"):
        assert (whole / "student" / name).read_bytes() == (killed / "student" / name).read_bytes()
    weights = "export/student/model.safetensors"
    assert (whole / weights).read_bytes() == (killed / weights).read_bytes()
    # The digests of parameters and moments.
    last = [
        storage.read_json(run / "student/checkpoints/120/metrics/metrics")
        for run in (whole, killed)
    ]
    assert last[0]["state"] == last[1]["state"] and len(last[0]["state"]) == 3
