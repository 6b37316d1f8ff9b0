import pytest

from kd_jax import cli, generate
from kd_jax.recipes import generate as recipe
from kd_jax.recipes.generate import Options


@pytest.fixture
def calls(monkeypatch):
    """What the command asks the recipe for."""
    made = []

    def record(open_model, *args):
        made.append((*open_model(), *args))
        return {"output": "out.jsonl", "rows": 1234, "seconds": 5.6}

    monkeypatch.setattr(recipe, "generate_file", record)
    monkeypatch.setattr(recipe, "checkpoint", lambda *args: ("checkpoint", args))
    monkeypatch.setattr(recipe, "stage_of", lambda *args: ("stage", args))
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    return made


def test_flags(calls, capsys):
    files = ["--input=in.csv", "--output=out.jsonl"]
    generate.main(["--model=m", "--revision=v1", *files])
    more = "--messages=a --max_new_tokens=9 --temperature=0.7 --top_k=5 --top_p=0.9 --samples=3"
    more += " --seed=4 --batch_size=8 --precision=bf16 --stage=student"
    generate.main(["--workdir=r", *more.split(), *files])
    wanted = Options(None, "a", None, 9, 0.7, 5, 0.9, 3, 4, 8, "bf16")
    assert calls == [
        ("checkpoint", ("m", "v1", None), "in.csv", "out.jsonl", Options()),
        ("stage", ("r", "student", "bf16"), "in.csv", "out.jsonl", wanted),
    ]
    assert capsys.readouterr().out == "wrote out.jsonl: 1,234 texts in 5.6 s\n" * 2
    for wrong in ("--model=m --stage=s", "--workdir=r --revision=v"):
        with pytest.raises(SystemExit):
            generate.main([*wrong.split(), *files])
        assert "--revision goes with --model, and --stage with" in capsys.readouterr().err
