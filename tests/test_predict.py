import pytest

from kd_jax import cli, predict
from kd_jax.errors import UserError
from kd_jax.recipes import predict as recipe
from kd_jax.recipes.predict import Options

DONE = {"output": "out.csv", "rows": 1234, "seconds": 5.6}


@pytest.fixture
def calls(monkeypatch):
    """What the command asks the recipe for."""
    made = []

    def record(open_model, *args):
        made.append((open_model(), *args))
        return DONE

    monkeypatch.setattr(recipe, "checkpoint", lambda *about: about)
    monkeypatch.setattr(recipe, "predict_file", record)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    return made


def test_flags(calls, capsys):
    files = ["--model=m", "--input=in.csv", "--output=out.csv"]
    predict.main(files)
    more = "--revision=v1 --text=a --pair=b --batch_size=8 --precision=bf16 --null_threshold=-1.5"
    predict.main([*files, *more.split()])
    predict.main([*files, "--delimiter=;", "--keep_empty"])
    assert calls == [
        (("m", None, None), "in.csv", "out.csv", Options()),
        (("m", "v1", "bf16"), "in.csv", "out.csv", Options("a", "b", 8, "bf16", -1.5)),
        (("m", None, None), "in.csv", "out.csv", Options(delimiter=";", keep_empty=True)),
    ]
    assert capsys.readouterr().out == "wrote out.csv: 1,234 rows in 5.6 s\n" * 3


def test_a_mistake_is_one_line(monkeypatch, capsys):
    def fail(*args):
        raise UserError("no such thing")

    monkeypatch.setattr(recipe, "checkpoint", fail)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    with pytest.raises(SystemExit) as exit:
        predict.main(["--model=m", "--input=a.txt", "--output=b.csv"])
    assert exit.value.code == 1 and capsys.readouterr().err == "error: no such thing\n"


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        predict.main(["--help"])
    assert exit.value.code == 0
    assert "python -m kd_jax.predict --model=" in capsys.readouterr().out
