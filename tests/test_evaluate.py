import json
from pathlib import Path

import pytest

from kd_jax import cli, evaluate
from kd_jax.errors import UserError
from kd_jax.recipes import evaluate as recipe
from kd_jax.recipes.evaluate import Evaluated, Options

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
NEWS = {
    "model": "some/folder/student",
    "task": "agnews",
    "data": {"name": "test.csv", "examples": 3},
    "split": "test",
    "precision": "fp32",
    "loss": 0.5,
    "accuracy": 0.75,
    "classes": {
        "World": {"precision": 1.0, "recall": 0.5, "f1": 0.6667, "support": 2},
        "Sports": {"precision": 0.5, "recall": 1.0, "f1": 0.6667, "support": 1},
    },
    "confusion": [[1, 1], [0, 1]],
}


def test_table():
    table = recipe.table(FOUND)
    assert table.header == ["", "student"]
    assert table.title == "words.txt, mlm, rows of 64 tokens, bf16, beside gpt2"
    assert table.rows[0] == ["loss (nats/token)", "2.5000"]
    assert ["KL to teacher (nats/token)", "0.2500"] in table.rows
    alone = {k: v for k, v in FOUND.items() if k not in ("stage", "kl", "agreement")}
    table = recipe.table(alone | {"model": "some/folder/distilgpt2", "teacher": None})
    assert table.header == ["", "distilgpt2"] and "beside" not in table.title
    assert "KL" not in str(table.rows)


def test_table_of_predictions():
    found = {name: NEWS[name] for name in ("task", "data", "accuracy")}
    table = recipe.table(found | {"predictions": "other/system.tsv"})
    assert table.header == ["", "system.tsv"] and table.title == "test.csv, agnews"
    for task in (
        "glue",
        "labelled_text",
        "embedding",
        "glue/sst2",
    ):  # as runs and command lines say
        assert recipe.table(found | {"task": task, "model": "m"}).title == f"test.csv, {task}"


class Scores:
    """What the recipe gives beside the figures."""

    def write(self, folder):
        folder.mkdir(parents=True)
        (folder / "likelihoods.jsonl").write_text("{}")
        return [str(folder / "likelihoods.jsonl")]


SWAG = {
    "model": "some/folder/gpt2",
    "task": "hellaswag",
    "data": {"name": "val.jsonl", "examples": 1000},
    "precision": "fp32",
    "acc": 0.27,
    "acc_error": 0.014,
    "acc_interval": [0.24, 0.3],
    "questions": 1000,
}
WINDOWS = {"seq_len": 64, "stride": 32, "documents": "joined", "loss": 1.5}


def test_table_of_scores():
    table = recipe.table(SWAG)
    assert table.title == "val.jsonl, hellaswag, fp32" and table.header[1] == "gpt2"
    assert table.rows[0][:2] == ["acc", "0.2700 ± 0.0140 (0.2400 to 0.3000)"]
    stated = {key: SWAG[key] for key in ("model", "data", "precision")}
    table = recipe.table(stated | WINDOWS | {"task": "perplexity"})
    title = "val.jsonl, perplexity, windows of 64 tokens, stride 32, documents joined, fp32"
    assert table.title == title and table.rows == [["loss (nats/token)", "1.5000"]]


@pytest.fixture
def calls(monkeypatch):
    """What the command asks the recipe for."""
    made = []

    def record(*args):
        made.append(args)
        scored = any(task in args for task in ("hellaswag", "cbt/NE", "perplexity"))
        return Evaluated(Scores(), SWAG) if scored else Evaluated(None, FOUND)

    monkeypatch.setattr(recipe, "evaluate_stage", record)
    monkeypatch.setattr(recipe, "evaluate_checkpoint", record)
    changed = SWAG | {"beside_teacher": {"mean_difference": 0.5, "mean_difference_error": 0.02}}
    stages = {
        "teacher": Evaluated(Scores(), SWAG),
        "prune": Evaluated(Scores(), changed),
    }
    monkeypatch.setattr(recipe, "evaluate_run", lambda *args: record(*args) and stages)
    monkeypatch.setattr(recipe, "evaluate_predictions", lambda *args: record(*args).report)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    return made


@pytest.fixture
def run(tmp_path):
    """Makes a finished run of a task."""

    def make(task):
        folder = tmp_path / task
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"task": {"name": task}}))
        results = {"config": "example", "seed": 0, "stages": {}}
        (folder / "results.json").write_text(json.dumps(results))
        return str(folder)

    return make


def test_a_run(calls, run, tmp_path, capsys):
    folder = run("mlm")
    file = tmp_path / "figures.json"
    evaluate.main([f"--workdir={folder}", "--task=mlm", "--split=validation", f"--json={file}"])
    evaluate.main([f"--workdir={folder}", "--stage=teacher", "--data=x.txt", "--seq_len=64"])
    options = Options
    assert calls == [
        (folder, None, "mlm", None, "validation", options()),
        (folder, "teacher", None, "x.txt", None, options(seq_len=64)),
    ]
    assert json.loads(file.read_text()) == FOUND
    assert "perplexity" in capsys.readouterr().out


def test_a_model(calls):
    command = "--model=gpt2 --revision=v1 --task=clm --data=x.txt --teacher=gpt2-xl"
    evaluate.main([*command.split(), "--batch_size=8", "--precision=bf16"])
    options = Options(teacher="gpt2-xl", batch_size=8, precision="bf16")
    assert calls == [("gpt2", "v1", "clm", "x.txt", options)]


def test_a_fine_tuning_run(calls, run):
    folder = run("squad")
    evaluate.main([f"--workdir={folder}", "--split=validation"])
    evaluate.main([f"--workdir={folder}", "--stage=teacher", "--data=dev.json", "--task=squad"])
    assert calls == [
        (folder, None, None, None, "validation", Options()),
        (folder, "teacher", "squad", "dev.json", None, Options()),
    ]


def test_a_classifier(calls, monkeypatch, capsys):
    written = []

    class Predictions:
        def write(self, folder):
            written.append(str(folder))
            return ["a.tsv"]

    def record(*args):
        calls.append(args)
        return Evaluated(Predictions(), FOUND)

    monkeypatch.setattr(recipe, "evaluate_checkpoint", record)
    command = "--model=m --revision=v1 --task=text --data=x.tsv --text=t --pair=u --label=y"
    flags = ["--labels=bad,good", "--batch_size=8", "--precision=bf16", "--out=there"]
    flags += ["--seq_len=64"]
    evaluate.main([*command.split(), *flags])
    columns = {"text": "t", "pair": "u", "label": "y", "labels": ("bad", "good")}
    options = Options(**columns, seq_len=64, batch_size=8, precision="bf16")
    assert calls == [("m", "v1", "text", "x.tsv", options)]
    assert written == ["there"]
    assert "wrote\n  a.tsv" in capsys.readouterr().out


def test_figures_by_class_are_shown(calls, monkeypatch, capsys):
    monkeypatch.setattr(recipe, "evaluate_checkpoint", lambda *args: Evaluated(None, NEWS))
    evaluate.main(["--model=m", "--task=agnews"])
    shown = capsys.readouterr().out
    assert "test.csv, agnews, fp32" in shown and "Sports" in shown and "1.0000" in shown


def test_scores_of_a_model(calls, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "figures.json"
    evaluate.main(
        ["--model=gpt2", "--revision=v1", "--task=hellaswag", f"--out={out}", f"--json={file}"]
    )
    evaluate.main(
        "--model=gpt2 --task=perplexity --data=x.txt --seq_len=64 --stride=32 --documents=alone "
        "--batch_size=8 --precision=bf16".split()
    )
    assert calls == [
        ("gpt2", "v1", "hellaswag", None, Options()),
        (
            "gpt2",
            None,
            "perplexity",
            "x.txt",
            Options(seq_len=64, stride=32, documents="alone", batch_size=8, precision="bf16"),
        ),
    ]
    assert json.loads(file.read_text()) == SWAG and (out / "likelihoods.jsonl").exists()
    shown = capsys.readouterr().out
    assert "0.2400 to 0.3000" in shown and f"wrote\n  {out}/likelihoods.jsonl" in shown


def test_scores_of_a_run(calls, run, tmp_path, capsys):
    folder, out, file = run("clm"), tmp_path / "out", tmp_path / "figures.json"
    evaluate.main([f"--workdir={folder}", "--task=cbt/NE", "--data=cbt", "--stage=teacher"])
    capsys.readouterr()
    command = [f"--workdir={folder}", "--task=hellaswag"]
    evaluate.main([*command, f"--out={out}", f"--json={file}"])
    shown = capsys.readouterr().out
    assert "teacher" in shown and "prune" in shown and "0.5000 ± 0.0200" in shown
    assert list(json.loads(file.read_text())["stages"]) == ["teacher", "prune"]
    assert (out / "prune" / "likelihoods.jsonl").exists()
    assert calls == [
        (folder, "teacher", "cbt/NE", "cbt", None, Options()),
        (folder, "hellaswag", None, Options()),
    ]


def test_predictions(calls):
    evaluate.main(["--predictions=p.tsv", "--task=text", "--data=x.tsv", "--labels=a,b"])
    evaluate.main(["--predictions=p.tsv", "--task=glue/sst2"])
    assert calls == [
        ("text", "x.tsv", "p.tsv", Options(labels=("a", "b"))),
        ("glue/sst2", None, "p.tsv", Options()),
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--model=m",
            "--task is missing; have: agnews, embedding/SCORED, glue/TASK, text, ",
        ),
        ("--predictions=p", "--task is missing; have: agnews, embedding/SCORED, "),
        (
            "--model=m --task=sst2",
            "--task=sst2: no such task (did you mean glue/sst2?); have: agnews, "
            "embedding/SCORED, glue/TASK, text, phrasebank/LEVEL, reranking, squad, chat, clm, "
            "mlm, cbt, cbt/CLASSES, hellaswag, perplexity",
        ),
        ("--model=m --task=SST-2", "--task=SST-2: no such task (did you mean glue/sst2?)"),
        ("--model=m --task=NE", "--task=NE: no such task (did you mean cbt/NE?)"),
        ("--model=m --task=perplexty", "--task=perplexty: no such task (did you mean perplexity?)"),
        (
            "--workdir=mlm --task=helaswag",
            "--task=helaswag: no such task (did you mean hellaswag?)",
        ),
        ("--model= --task=mlm --data=x", "--model is empty; give it a value, or leave it out"),
        ("--model=m --task=clm --data=x --json=no/x.json", "--json=no/x.json: there is no folder"),
        ("--model=m --task=clm --data=x --json=mlm", "--json=mlm is a folder; give a file"),
        ("--model=m --task=squad --out=mlm/config.json", "--out=mlm/config.json: "),
        ("--model=m --task=mlm --data=x --separator=bos", "--separator does not go with task mlm"),
        ("--model=m --task=squad --separator=bos", "--separator does not go with task squad"),
        ("--workdir=clm --separator=bos", "--separator does not go with --workdir, whose config"),
        ("--workdir=clm --text=body", "--text does not go with --workdir without --data"),
        ("--model=m --task=hellaswag --text=t", "--text does not go with task hellaswag"),
        ("--predictions=p --task=mlm", "--predictions does not go with task mlm"),
        ("--predictions=p --task=squad --out=d", "--out does not go with --predictions"),
        ("--predictions=p --task=agnews --labels=a,b", "--labels does not go with --predictions"),
        ("--model=m --task=squad --teacher=t", "--teacher does not go with task squad"),
        (
            "--model=m --task=embedding/sts --data=x --out=d",
            "--out does not go with task embedding",
        ),
        ("--predictions=p --task=embedding/sts", "--predictions does not go with task embedding"),
        (
            "--model=m --task=embedding/sts --data=x --document_prompt=d",
            "--document_prompt does not go with task embedding/sts",
        ),
        (
            "--model=m --task=embedding/retrieval --data=x --text=a --label=b",
            "--text, --label does not go with task embedding/retrieval",
        ),
        ("--model=m --task=squad --query_prompt=q", "--query_prompt does not go with task squad"),
        ("--model=m --task=glue/sst2 --text=t", "--text does not go with task glue/sst2"),
        ("--predictions=p --task=squad --seq_len=9", "--seq_len does not go with --predictions"),
        ("--workdir=squad --seq_len=9", "--seq_len does not go with --workdir, whose"),
        ("--model=m --task=squad --stride=9", "--stride does not go with task squad"),
        ("--model=m --task=clm --data=x --stride=9", "--stride does not go with task clm"),
        ("--model=m --task=cbt/P --stride=9", "--stride does not go with task cbt/P"),
        ("--model=m --task=cbt --documents=alone", "--documents does not go with task cbt"),
        ("--model=m --task=hellaswag --teacher=t", "--teacher does not go with task hellaswag"),
        ("--predictions=p --task=perplexity", "--predictions does not go with task perplexity"),
        ("--workdir=mlm --task=hellaswag --split=test", "--split does not go with task hellaswag"),
        ("--model=m --task=clm --data=x --out=d", "--out does not go with task clm"),
        ("--workdir=squad --task=agnews", "squad is a run of task 'squad', not 'agnews'"),
        ("--workdir=squad --batch_size=8", "--batch_size does not go with --workdir, whose"),
        ("--workdir=squad --labels=a,b", "--labels does not go with --workdir, whose"),
        ("--workdir=nothing", "nothing: no such folder"),
        ("--model=m --task=mlm", "--model with --task=mlm needs --data"),
        ("--model=m --task=mlm --data=x --split=test", "--split does not go with --model"),
        ("--model=m --task=squad --stage=student", "--stage does not go with --model"),
        ("--workdir=mlm --revision=v1", "--revision does not go with --workdir"),
        ("--workdir=mlm --data=x --split=test", "--split does not go with --data"),
    ],
)
def test_flags_that_do_not_go_together(flags, message, calls, run, monkeypatch, capsys):
    monkeypatch.chdir(Path(run("mlm")).parent)
    run("squad"), run("clm")
    with pytest.raises(SystemExit) as exit:
        evaluate.main(flags.split())
    assert exit.value.code == 1 and calls == []
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_mistake_is_one_line(run, monkeypatch, capsys):
    def fail(*args):
        raise UserError("no such thing")

    monkeypatch.setattr(recipe, "evaluate_stage", fail)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    with pytest.raises(SystemExit) as exit:
        evaluate.main([f"--workdir={run('clm')}"])
    assert exit.value.code == 1 and capsys.readouterr().err == "error: no such thing\n"


@pytest.mark.parametrize("number", ["0", "-8", "2.5", "many"])
def test_a_number_that_is_no_count(number, capsys):
    for flag in ("seq_len", "batch_size", "stride"):
        with pytest.raises(SystemExit):
            evaluate.main(["--model=m", "--task=perplexity", "--data=x", f"--{flag}={number}"])
        assert f"--{flag}: '{number}' is no whole number above 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("set config.task.label to one of: a, b", "set --label to one of: a, b"),
        ("config.data.test.path='x': no such file", "--data='x': no such file"),
        ("x is empty: remove it from config.data.train.path", "x is empty: remove it from --data"),
        ("no column 'text'; set text= to one of: a", "no column 'text'; set --text to one of: a"),
        ("config.task.seq_len=2 must be at least 4", "--seq_len=2 must be at least 4"),
        ("set config.task.name='labelled_text' for", "set --task=text for"),
        ("set config.data.cache_dir or KD_JAX_CACHE to", "set KD_JAX_CACHE to"),
        ("config.data.train is not set, or config.task.labels", "--data is not set, or --labels"),
        ("model.eval.txt: config.json of data.csv", "model.eval.txt: config.json of data.csv"),
    ],
)
def test_messages_name_flags_and_not_the_config(message, shown, run, monkeypatch, capsys):
    def fail(*args):
        raise UserError(message)

    monkeypatch.setattr(recipe, "evaluate_checkpoint", fail)
    monkeypatch.setattr(recipe, "evaluate_stage", fail)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    with pytest.raises(SystemExit):
        evaluate.main(["--model=m", "--task=clm", "--data=x"])
    assert capsys.readouterr().err == f"error: {shown}\n"
    with pytest.raises(SystemExit):  # the config is the run's own there
        evaluate.main([f"--workdir={run('clm')}"])
    assert capsys.readouterr().err == f"error: {message}\n"


def test_a_column_that_is_not_there_names_its_flag(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    file.write_text("sentence,label\ngood,1\nbad,0\n")
    with pytest.raises(SystemExit):
        evaluate.main(["--predictions=p", "--task=text", f"--data={file}"])
    assert capsys.readouterr().err.endswith("set --text to one of: sentence, label\n")
    with pytest.raises(SystemExit):
        evaluate.main(
            ["--predictions=p", "--task=text", f"--data={file}", "--text=sentence", "--label=y"]
        )
    assert capsys.readouterr().err.endswith("set --label to one of: sentence, label\n")


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        evaluate.main(["--help"])
    assert exit.value.code == 0
    assert "python -m kd_jax.evaluate --workdir=" in capsys.readouterr().out
