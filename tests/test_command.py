"""The console command, and the experiments that it lists and finds."""

import os
import subprocess
import sys

import pytest

from kd_jax import __main__ as command
from kd_jax import experiments
from kd_jax.errors import UserError


def said(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["kd-jax", *arguments])
    command.main()
    return capsys.readouterr().out


def test_help_names_every_verb_and_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['kd-jax', '--help']; import kd_jax.__main__ as m; m.main();"
        "assert not {'jax', 'numpy', 'transformers', 'ml_collections'} & set(sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"  {verb} " in shown.stdout for verb in command.VERBS)


def test_version(monkeypatch, capsys):
    assert said(monkeypatch, capsys, "--version").startswith("kd_jax 0.")


def test_experiments_are_listed_with_their_first_sentence(monkeypatch, capsys):
    lines = said(monkeypatch, capsys, "configs").splitlines()
    assert [line.split()[0] for line in lines[: len(experiments.names())]] == experiments.names()
    assert any(line.startswith("quickstart ") and "Distillation from" in line for line in lines)


def test_an_unknown_verb(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kd-jax", "train"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: kd-jax train: have main, evaluate")


@pytest.mark.parametrize("given", ["quickstart", "quickstart:smoke", "configs/quickstart.py:smoke"])
def test_an_experiment_by_name_from_any_folder(monkeypatch, tmp_path, given):
    monkeypatch.chdir(tmp_path)
    found = experiments.path(given)
    assert (
        found
        == str(experiments.folder() / "quickstart.py")
        + given.partition(":")[1]
        + (given.partition(":")[2])
    )


def test_a_file_of_ones_own_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart.py").write_text("")
    assert experiments.path("quickstart.py:tiny") == "quickstart.py:tiny"


def test_what_is_no_experiment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--config=elsewhere/quickstart.py: no such file"):
        experiments.path("elsewhere/quickstart.py")


def test_an_experiment_starts_from_another_outside_of_the_checkout(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code = "from kd_jax import experiments; print(experiments.load('sweep_agnews').recipe)"
    path = [str(experiments.folder().parent)] if experiments.folder().name == "configs" else []
    ran = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}; {code}"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    assert ran.stdout == "sweep\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)  # as `head` does
    command = [sys.executable, "-m", "kd_jax", "configs"]
    ran = subprocess.run(
        command, cwd=experiments.folder().parent, stdout=writes, stderr=subprocess.PIPE
    )
    os.close(writes)
    assert (ran.returncode, ran.stderr) == (0, b"")
