"""A recipe of one's own: one module, which no list elsewhere has to name."""

import json

import pytest

from kd_jax import cli, compare, evaluate, main, plan, recipes
from tests import tiny_config
from tests.plugged import plug_in
from tests.recipes import substituting

MODULE = '''
"""Trains like `distil`, and counts the stages."""

from kd_jax import storage
from kd_jax.recipes import distil


def run(config, place):
    results = distil.run(config, place)
    storage.write_json(place.folder / "counted.json", {"stages": len(config.stages)})
    return results
'''
CONFIG = """
from tests import tiny_config


def get_config(text):
    c = tiny_config.get_config(text)
    c.recipe, c.steps, c.stages = "counting", 2, dict(teacher={})
    return c
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """--config of a file that names kd_jax/recipes/counting.py, which is in another folder."""
    (tmp_path / "own.py").write_text(CONFIG)
    plug_in(monkeypatch, tmp_path, recipes, "counting", MODULE)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    monkeypatch.chdir(tmp_path)
    return f"{tmp_path / 'own.py'}:{tiny_config.write_text(tmp_path)}"


def test_it_is_run_evaluated_compared_and_planned(config, tmp_path, capsys):
    flags = ["--config", config, f"--config.data.cache_dir={tmp_path}"]
    with substituting.quick():
        main.main([*flags, "--workdir=run"])
        evaluate.main(["--workdir=run", "--json", "figures.json"])
    assert json.loads((tmp_path / "run" / "counted.json").read_text())["stages"] == 1
    trained = json.loads((tmp_path / "run" / "results.json").read_text())["stages"]["teacher"]
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["stage"] == "teacher" and figures["loss"] == pytest.approx(trained["loss"])
    compare.main(["run", "--out=report"])
    assert "teacher" in (tmp_path / "report" / "report.md").read_text()
    plan.main([*flags, "--json=plan.json"])
    assert json.loads((tmp_path / "plan.json").read_text())["stages"][0]["stage"] == "teacher"
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main.main(["--config", config, "--config.recipe=countin", "--workdir=other"])
    assert "unknown recipes plug-in 'countin' (did you mean 'counting'?)" in capsys.readouterr().err
