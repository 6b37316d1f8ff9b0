"""A task of one's own: one module, which no list elsewhere has to name."""

import json

import pytest

from kd_jax import cli, evaluate, predict, smoke, tasks
from kd_jax import config as defaults
from kd_jax.errors import UserError
from kd_jax.recipes import plan
from kd_jax.recipes.compare import compare
from kd_jax.run.run import build
from kd_jax.tasks import command
from tests import smoke as smoke_runs
from tests.plugged import plug_in
from tests.recipes import finetuning

MODULE = '''
"""Tells how loud texts are: how many marks end them."""

import numpy as np

from kd_jax.data import source
from kd_jax.ranges import Whole
from kd_jax.tasks.classification import ClassificationTask, Texts, numbers
from kd_jax.tasks.task import local

DEFAULTS = dict(name="loudness", mark="!", seq_len=Whole(least=8, default=16))


class Loudness(ClassificationTask):
    labels, regression = ("score",), True
    metrics, primary = ("spearman", "pearson"), "spearman"
    defaults = DEFAULTS
    variant, variants = "mark", ("!", "?")

    @classmethod
    def smoke(cls, task, data, samples):
        path = samples.parent / "shouts.jsonl"
        lines = ['{"text": "%s city %d %s"}' % ("ab"[i % 2], i, "! " * (i % 5)) for i in range(80)]
        path.write_text("\\n".join(lines))
        return {}, local(path, path)

    def _read(self, key):
        where, spec = self._spec(key)
        found = source.table(spec, where)
        texts = found.texts("text", "config.data")
        loud_N = numbers([text.count(self.config["mark"]) for text in texts], found.place)
        return Texts(found.name, texts, None, loud_N, found.place).checked()


make = Loudness
'''


def config():
    """As a file of configs/ makes it, with `:smoke`."""
    c = defaults.finetuning()
    c.task, c.data = dict(name="loudness"), dict(train=dict(path="mine.jsonl"))
    c.teacher.model = c.student.model = "google-bert/bert-base-uncased"
    c.student.init = "model"
    c.objective = dict(mse=dict(weight=1.0))
    c.stages = dict(teacher=dict(), student=dict())
    return smoke.smoke_finetuning(c)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """kd_jax/tasks/loudness.py, in another folder."""
    plug_in(monkeypatch, tmp_path, tasks, "loudness", MODULE)
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    return tmp_path


def test_it_is_run_evaluated_compared_planned_and_predicts(folder, capsys):
    with smoke_runs.one_length("loudness"):
        results = finetuning.run(config(), folder / "run")
    figures = results["stages"]["student"]
    assert results["primary"] == "spearman" and "pearson" in figures
    assert results["data"]["train"]["examples"] == 64 and results["data"]["train"]["cut"] == 0

    export, data = folder / "run" / "export" / "student", folder / "cache" / "shouts.jsonl"
    with finetuning.quick():
        written = [f"--json={folder / 'figures.json'}", "--precision=bf16"]
        own = [f"--model={export}", f"--data={data}", "--task=loudness/!"]
        evaluate.main([*own, *written])
        found = json.loads((folder / "figures.json").read_text())
        assert found["pearson"] == pytest.approx(figures["pearson"], abs=1e-3)
        predict.main([f"--model={export}", f"--input={data}", f"--output={folder / 'out.jsonl'}"])
    assert len((folder / "out.jsonl").read_text().splitlines()) == 80
    compare([str(folder / "run")], str(folder / "report"))
    report = (folder / "report" / "report.md").read_text()
    assert "loudness" in report and "Spearman" in report


def test_it_is_planned_and_named(folder, capsys):
    planned = plan.needed(build(config()))
    assert planned["stage"] == "student" and planned["tokens"] == 16
    assert "loudness/MARK" in command.names()
    with pytest.raises(UserError, match="--task=loudness: no such task .did you mean loudness/"):
        command.find("loudness")
    with pytest.raises(SystemExit):
        evaluate.main(["--model=m", "--task=loudness/?", "--text=body"])
    assert "--text does not go with task loudness/?" in capsys.readouterr().err
