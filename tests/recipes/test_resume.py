"""A run that is killed goes on under the same command, and ends as if it had not been."""

import pytest

from benchmarks import kill_resume
from benchmarks.kill_resume import Kill
from tests import forked

STEPS, SAVE = 6, 2
ARGUMENTS = [
    f"--config={forked.ROOT / 'configs/quickstart.py'}:smoke",
    f"--config.steps={STEPS}",
    f"--config.checkpoint.every={SAVE}",
    "--config.eval.every=2",
    "--config.batch_size=256",
]
KILLS = [Kill("teacher", step=3), Kill("baseline", step=2, write="checkpoint"), Kill("student", 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("resume")


def start(run):
    return forked.start([*ARGUMENTS, f"--workdir={run}"], run.parent)


@pytest.fixture(scope="module")
def undisturbed(folder):
    run = folder / "undisturbed"
    process = start(run)
    assert process.wait() == 0, process.error()
    return run


def test_killed_runs_end_bitwise_the_same(folder, undisturbed):
    done = kill_resume.run_killed(start, folder / "killed", KILLS, timeout=120)
    assert done["hits"] == {"teacher": 1, "checkpoint": 1, "student": 1}
    assert kill_resume.differences(undisturbed, folder / "killed") == []
