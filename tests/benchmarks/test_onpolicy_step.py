"""The on-policy benchmark: its prompts, its rows' processes, and what its table says."""

import argparse
import collections
import json
import pathlib

import numpy as np
import pytest
import transformers

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import onpolicy_cases
    import onpolicy_models
    import onpolicy_step

    return onpolicy_cases, onpolicy_models, onpolicy_step


@pytest.fixture
def case(scripts, tmp_path):
    """Arguments of a timed process, and tiny models."""
    cases, models, _ = scripts
    models.write_prompts(tmp_path, models.tiny(tmp_path))
    return argparse.Namespace(precision="fp32", folder=tmp_path, steps=2, tiny=True)


def check(found, cases):
    rows, new = cases.TINY_ROWS, cases.TINY_NEW
    assert len(found["seconds"]) == len(found["writing"]) == len(found["tokens"]) == 2
    assert all(0 < own < all_ for own, all_ in zip(found["writing"], found["seconds"], strict=True))
    assert all(rows <= tokens <= rows * new for tokens in found["tokens"])
    assert len(found["losses"]) == cases.WARM + 2 and np.isfinite(found["losses"]).all()
    assert found["first_s"] > max(found["seconds"]) and found["peak_bytes"] > 50e6


def test_prompts_are_the_same_tokens_in_every_system(scripts, case):
    cases, _, _ = scripts
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder / "teacher")
    stories = (case.folder / cases.TEXT).read_text().strip().split("\n\n")
    prompts = cases.prompts(case.folder)
    assert len(stories) == len(prompts) + 1  # tasks/clm.py takes no prompt from the first one
    for story, prompt in zip(stories[1:], prompts, strict=True):
        tokens = tokenizer(prompt)["input_ids"]
        assert tokens == tokenizer(story)["input_ids"][: cases.PROMPT]
        assert tokens[0] == 1 and len(tokens) == cases.PROMPT


def test_kd_jax_takes_the_steps(scripts, case, tmp_path):
    import onpolicy_kd_jax

    check(onpolicy_kd_jax.train(case, tmp_path / "run"), scripts[0])


def test_trl_takes_the_steps(scripts, case, tmp_path):
    pytest.importorskip("trl")
    import onpolicy_trl

    check(onpolicy_trl.train(case, str(tmp_path / "run")), scripts[0])


def test_the_table_compares_with_kd_jax(scripts, tmp_path, monkeypatch, capsys):
    """Two processes a row: 0.1 and 0.3 s of kd_jax's, ten times as long of TRL's."""
    _, _, step = scripts

    def launch(arguments, cache, more=None, python=None):
        if arguments[0] == "onpolicy_models.py":
            return {"prompts": 64}
        times = 10 if python == "other" else 1
        calls[python] += 1
        seconds = [times * (0.1 if calls[python] == 1 else 0.3)] * 3
        parts = {"writing": [times * 0.05] * 3, "tokens": [10, 20, 30], "cpu": seconds}
        about = {"losses": [2.0, 1.0], "first_s": 5.0, "peak_bytes": 1e9, "others": [0.1] * 3}
        return {"seconds": seconds} | parts | about

    calls = collections.Counter()
    monkeypatch.setattr(step, "launch", launch)
    monkeypatch.setattr(step.subprocess, "run", lambda *_, **__: argparse.Namespace(returncode=0))
    target = tmp_path / "rows.json"
    argv = ["x", "--tiny", "--rounds=2", f"--json={target}", "--python-trl=other"]
    monkeypatch.setattr(step.sys, "argv", [*argv, "--rows=kd_jax-fp32,pytorch-trl-fp32"])
    step.main()
    kd_jax, trl = json.loads(target.read_text())
    assert (kd_jax["ratio"], trl["ratio"]) == (1.0, pytest.approx(10.0))
    assert trl["writing_ratio"] == pytest.approx(10.0) and trl["tokens"] == 20
    assert trl["learning_s"] == pytest.approx(trl["median_s"] - trl["writing_s"])
    assert "10.00x" in capsys.readouterr().out


def test_a_missing_trl_is_one_line(scripts, monkeypatch, capsys):
    step = scripts[2]
    monkeypatch.setattr(step.sys, "argv", ["x", "--tiny", "--python-trl=/bin/false"])
    with pytest.raises(SystemExit):
        step.main()
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "has no TRL" in error and "pip install --no-deps trl accelerate" in error
