"""A wrong bit in any file of a run directory: the run ends as it would have, or in one line that
names the file."""

import contextlib
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest

from benchmarks.kill_resume import untimed
from kd_jax import cli
from kd_jax.recipes import distil
from kd_jax.run import workdir
from kd_jax.train import loop
from tests import tiny_config
from tests.recipes import substituting

TABLES = ("metrics.csv", "eval.csv")
# For people; nothing reads them again.
SHOWN = ("command.txt", "parameters.txt", "tensorboard")
# Which files of a checkpoint are spoilt here; tests/train/test_checkpoint.py has them all.
OF_CHECKPOINT = ("metrics", "_METADATA", "manifest.ocdbt")


class Killed(Exception):
    pass


class Opened:
    """Notes the files under `folder` that Python opens and may read, while there is one."""

    def __init__(self):
        self.folder, self.files = None, set()
        sys.addaudithook(self._note)

    def _note(self, event, arguments):
        if event != "open" or not self.folder or arguments[2] & os.O_ACCMODE == os.O_WRONLY:
            return
        if str(arguments[0]).startswith(str(self.folder)):
            self.files.add(Path(arguments[0]).relative_to(self.folder))


@contextlib.contextmanager
def exported():
    """The parameters that a run would export."""
    found = []

    def export_run(setup, this, params, results):
        found.append(jax.tree.leaves(params))
        return {"path": "nowhere"}

    with substituting.quick(), mock.patch.object(distil.export, "export_run", export_run):
        yield found


def run(config, folder):
    """(parameters, figures, tables) of a run, or of what was left of it."""
    with exported() as params, workdir.enter(config, "tiny", str(folder)) as place:
        results = distil.run(config, place)
    tables = {
        f"{stage}/{name}": (folder / stage / name).read_bytes()
        for stage in ("teacher", "student")
        for name in TABLES
    }
    return params[0], untimed(results["stages"]), tables


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damage")


@pytest.fixture(scope="module")
def config(folder):
    c = tiny_config.get_config(str(tiny_config.write_text(folder)))
    c.data.cache_dir = str(folder / "cache")
    return c


@pytest.fixture(scope="module")
def stopped(config, folder):
    """A run that was stopped between the second and the third checkpoint of its student."""
    steps = []
    step = loop.train_step

    def until(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6 + 5:
            raise Killed
        return step(*args, **kwargs)

    with mock.patch.object(loop, "train_step", until), pytest.raises(Killed):
        run(config, folder / "stopped")
    return folder / "stopped"


def spoil(file):
    whole = file.read_bytes()
    at = len(whole) // 2
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_wrong_bit_in_any_file(config, folder, stopped, caplog, capsys):
    opened = Opened()
    opened.folder = folder / "whole"
    params, figures, tables = run(config, shutil.copytree(stopped, folder / "whole"))
    opened.folder = None
    same, said, refused = [], [], []
    for file in sorted(
        path.relative_to(stopped)
        for path in stopped.rglob("*")
        if path.is_file() and path.stat().st_size
    ):
        if "checkpoints" in file.parts:
            last = file.parts[2] == ("6" if file.parts[0] == "teacher" else "4")
            if not last or file.name not in OF_CHECKPOINT:
                continue
        elif file not in opened.files and file.parts[0] != "tokenizer":
            assert file.parts[-1] in SHOWN or file.parts[-2] in SHOWN, file
            continue
        copy = shutil.copytree(stopped, folder / "spoilt")
        spoil(copy / file)
        # A checkpoint is named as a whole.
        named = str(copy / Path(*file.parts[:3] if "checkpoints" in file.parts else file.parts))
        caplog.clear()
        capsys.readouterr()
        try:
            with cli.plain_errors():
                found = run(config, copy)
        except SystemExit:
            # Libraries may speak late, of reads of a spoilt checkpoint that nobody waited for.
            lines = capsys.readouterr().err.splitlines()
            (line,) = (line for line in lines if line.startswith("error: "))
            own = str(copy / "tokenizer") if file.parts[0] == "tokenizer" else named
            assert own in line, (file, line)
            refused.append(file)
        else:
            assert all(map(np.array_equal, found[0], params)) and found[1] == figures, file
            if named in caplog.text:
                said.append(file)
            else:
                assert found[2] == tables, file
                same.append(file)
        shutil.rmtree(copy)
    print("same:", *same, "\nsaid:", *said, "\nrefused:", *refused)
    assert {"config.json", "manifest.json", "teacher/metrics.csv"} <= {*map(str, said)}
    assert Path("teacher/results.json") in refused and len(said) + len(refused) > 12
