import re
from pathlib import Path

import pytest

from kd_jax import compare as command
from kd_jax.errors import UserError
from kd_jax.recipes.compare import compare, group
from kd_jax.report import runs
from tests.report import example_run


def written(tmp_path, **settings):
    """Run directories: a name gives the keywords of example_run.write."""
    return {n: str(example_run.write(tmp_path / n, **kw)) for n, kw in settings.items()}


def labels(folders):
    groups = group([runs.read(folder) for folder in folders.values()])
    return {label: [run.seed for run in members] for label, members in groups.items()}


def test_seeds_are_grouped_in_their_order(tmp_path):
    folders = written(tmp_path, a=dict(seed=2), b=dict(seed=0), c=dict(seed=1))
    assert labels(folders) == {"example": [0, 1, 2]}


def test_other_settings_are_told_apart(tmp_path):
    folders = written(tmp_path, a={}, b=dict(seed=1), c=dict(seed=1, weight=1.0))
    assert labels(folders) == {
        "example kl.weight=0.5": [0, 1],
        "example kl.weight=1.0": [1],
    }


def test_writes_tables_and_plots(tmp_path):
    folders = written(tmp_path, a={}, b=dict(seed=1), c=dict(weight=1.0, shift=-0.5))
    tables, files = compare([*folders.values()], str(tmp_path / "out"))
    assert [path.rsplit("/", 1)[1] for path in files] == [
        "report.html",
        "report.md",
        "training.png",
        "validation.png",
    ]
    assert all(Path(path).stat().st_size > 0 for path in files)
    assert len(tables) == 3  # two configurations, and both under each other
    difference = "−0.4500 ± 0.0500"
    assert tables[0].rows[0] == [
        "loss (nats/token)",
        "2.0000",
        "3.0000",
        "2.5500 ± 0.0707",
        difference,
    ]
    assert tables[2].rows[-1][:5] == ["example kl.weight=1.0", "1", "1.5000", "2.5000", "2.0000"]


def test_fine_tuning_runs(tmp_path):
    folders = [example_run.write_classifier(tmp_path / str(i), seed=i) for i in range(3)]
    tables, files = compare([*map(str, folders)], str(tmp_path / "out"))
    assert tables[0].title.endswith("student's accuracy higher in 3 of 3")
    assert files[-1] == str(tmp_path / "out" / "trade_off.png")
    assert re.search(
        r"Made on \d{4}-\d\d-\d\d by python -m kd_jax.compare .*/0 .*/2 --out .*/out\n",
        (tmp_path / "out" / "report.md").read_text(),
    )
    pictures = re.findall(r"\]\((.*?)\)", (tmp_path / "out" / "report.md").read_text())
    assert sorted(pictures) == ["trade_off.png", "training.png", "validation.png"]
    assert all((tmp_path / "out" / name).exists() for name in pictures)


def test_different_tasks(tmp_path):
    folders = [example_run.write(tmp_path / "a"), example_run.write_classifier(tmp_path / "b")]
    with pytest.raises(UserError, match="different tasks .*a: unknown task.*b: agnews"):
        compare([*map(str, folders)], str(tmp_path / "out"))


def test_different_primary_figures(tmp_path):
    folders = [example_run.write_classifier(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    path = folders[1] / "results.json"
    path.write_text(path.read_text().replace('"primary": "accuracy"', '"primary": "macro_f1"'))
    with pytest.raises(UserError, match="different primary figures .*a: accuracy.*b: macro_f1"):
        compare([*map(str, folders)], str(tmp_path / "out"))


def test_a_primary_figure_that_nobody_measured(tmp_path):
    folder = example_run.write_classifier(tmp_path / "a")
    path = folder / "results.json"
    path.write_text(path.read_text().replace('"primary": "accuracy"', '"primary": "f2"'))
    with pytest.raises(UserError, match="primary='f2'.* have loss, accuracy, macro_f1"):
        compare([str(folder)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_same_run_twice(tmp_path):
    folders = written(tmp_path, a={}, b={})
    with pytest.raises(UserError, match="/a and .*/b are the same run .*seed 0"):
        compare([*folders.values()], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_different_splits(tmp_path):
    folders = written(tmp_path, a={}, b=dict(seed=1))
    path = tmp_path / "b" / "results.json"
    path.write_text(path.read_text().replace('"split": "test"', '"split": "validation"'))
    with pytest.raises(UserError, match="different splits .*a: test.*b: validation"):
        compare([*folders.values()], str(tmp_path / "out"))


def test_command_draws_one_run_into_its_own_plots(tmp_path, capsys):
    folder = example_run.write(tmp_path / "run")
    command.main([str(folder)])
    assert (folder / "plots" / "training.png").exists()
    assert "student - baseline" in capsys.readouterr().out


def test_command_reports_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        command.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
