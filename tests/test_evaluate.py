import json

import pytest

from kd_jax import cli, evaluate
from kd_jax.errors import UserError

FOUND = {
    "model": "runs/example",
    "stage": "student",
    "task": "mlm",
    "data": {"name": "words.txt", "tokens": 100},
    "split": "test",
    "teacher": "gpt2",
    "seq_len": 64,
    "precision": "bf16",
    "loss": 2.5,
    "perplexity": 12.18,
    "accuracy": 0.5,
    "kl": 0.25,
    "agreement": 0.75,
    "parameters": 1_234_567,
    "size_mb": 4.94,
}


def test_table():
    table = evaluate.table(FOUND)
    assert table.header == ["", "student"]
    assert table.title == "words.txt, mlm, rows of 64 tokens, bf16, beside gpt2"
    assert table.rows[0] == ["loss (nats/token)", "2.5000"]
    assert ["KL to teacher (nats/token)", "0.2500"] in table.rows
    alone = {k: v for k, v in FOUND.items() if k not in ("stage", "kl", "agreement")}
    table = evaluate.table(alone | {"model": "some/folder/distilgpt2", "teacher": None})
    assert table.header == ["", "distilgpt2"] and "beside" not in table.title
    assert "KL" not in str(table.rows)


@pytest.fixture
def calls(monkeypatch):
    """What the command asks the recipe for."""
    made = []

    def record(*args):
        made.append(args)
        return FOUND

    monkeypatch.setattr(evaluate, "evaluate_stage", record)
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", record)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    return made


def test_a_run(calls, tmp_path, capsys):
    file = tmp_path / "figures.json"
    evaluate.main(["--workdir=RUN", "--task=mlm", "--split=validation", f"--json={file}"])
    evaluate.main(["--workdir=RUN", "--stage=teacher", "--data=x.txt", "--seq_len=64"])
    options = evaluate.Options
    assert calls == [
        ("RUN", "student", "mlm", None, "validation", options()),
        ("RUN", "teacher", None, "x.txt", None, options(seq_len=64)),
    ]
    assert json.loads(file.read_text()) == FOUND
    assert "perplexity" in capsys.readouterr().out


def test_a_model(calls):
    command = "--model=gpt2 --revision=v1 --task=clm --data=x.txt --teacher=gpt2-xl"
    evaluate.main([*command.split(), "--batch_size=8", "--precision=bf16"])
    options = evaluate.Options(teacher="gpt2-xl", batch_size=8, precision="bf16")
    assert calls == [("gpt2", "v1", "clm", "x.txt", options)]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model=m --task=mlm", "--model needs --task (mlm or clm) and --data"),
        ("--model=m --data=x", "--model needs --task (mlm or clm) and --data"),
        ("--model=m --task=mlm --data=x --split=test", "--split does not go with --model"),
        ("--model=m --task=mlm --data=x --stage=student", "--stage does not go with --model"),
        ("--workdir=r --revision=v1", "--revision does not go with --workdir"),
        ("--workdir=r --data=x --split=test", "--split does not go with --workdir with --data"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, calls, capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags.split())
    assert exit.value.code == 1 and calls == []
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_mistake_is_one_line(monkeypatch, capsys):
    def fail(*args):
        raise UserError("no such thing")

    monkeypatch.setattr(evaluate, "evaluate_stage", fail)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--workdir=RUN"])
    assert exit.value.code == 1 and capsys.readouterr().err == "error: no such thing\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--help"])
    assert exit.value.code == 0
    assert "python -m kd_jax.evaluate --workdir=" in capsys.readouterr().out
