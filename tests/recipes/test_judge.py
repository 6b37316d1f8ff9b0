"""Figures of checkpoints, of stages and of files of predictions, through the command line."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from kd_jax import cli, evaluate
from kd_jax.data import tokenizers
from kd_jax.smoke import samples
from tests import smoke
from tests.recipes import finetuning

pytestmark = pytest.mark.usefixtures("caches")

NEWS = samples() / "ag_news"


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """The command does not change this process's logging and caches."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)


@dataclasses.dataclass(frozen=True)
class Run:
    folder: Path
    results: dict


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Half precision, in which a model that is stored rounded would differ."""
    folder = tmp_path_factory.mktemp("judge") / "run"
    config = finetuning.config("student", precision="bf16")
    config.task.seq_len = 64  # no row is cut off, as in an export that says nothing of lengths
    return Run(folder, finetuning.run(config, folder))


@pytest.fixture(scope="module")
def student(run):
    return str(run.folder / "export" / "student")


def command(folder, *flags):
    """What --json holds."""
    file = folder / "figures.json"
    with finetuning.quick(), smoke.guards():
        evaluate.main([*map(str, flags), f"--json={file}"])
    return json.loads(file.read_text())


def refused(capsys, *flags):
    """The one line of a mistake."""
    with pytest.raises(SystemExit) as exit:
        evaluate.main([*map(str, flags)])
    # Libraries of an earlier test may speak late, of futures that nobody waited for.
    lines = capsys.readouterr().err.splitlines()
    (line,) = (line for line in lines if line.startswith("error: "))
    assert exit.value.code == 1
    return line.removeprefix("error: ")


def test_an_export_on_the_original_files_gives_the_run_s_figures(run, student, tmp_path, capsys):
    flags = [f"--model={student}", "--task=agnews", f"--data={NEWS}", "--precision=bf16"]
    found = command(tmp_path, *flags, f"--out={tmp_path / 'out'}")
    there = run.results["stages"]["student"]
    same = ("accuracy", "macro_f1", "classes", "confusion")
    assert {name: found[name] for name in same} == {name: there[name] for name in same}
    assert found["loss"] == pytest.approx(there["loss"], abs=1e-6)
    assert found["data"]["digest"] == run.results["data"]["test"]["digest"]
    assert (found["task"], found["split"], found["precision"]) == ("agnews", "test", "bf16")
    assert found["model"] == student and found["seconds"] > 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["classes.md", "confusion.png", "predictions.tsv"]
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "Sci/Tech" in shown and "predictions.tsv" in shown

    # What was written, read again, and by whoever wrote it.
    file = tmp_path / "out" / "predictions.tsv"
    scored = command(tmp_path, f"--predictions={file}", "--task=agnews", f"--data={NEWS}")
    for name in ("accuracy", "macro_f1"):
        assert scored[name] == found[name]
    assert scored["data"] == found["data"] and scored["predictions"] == str(file)
    assert "loss" not in scored


def test_rows_are_cut_as_asked(student, tmp_path):
    flags = [f"--model={student}", "--task=agnews", f"--data={NEWS}"]
    whole, same, short = (
        command(tmp_path, *flags, *more)["loss"] for more in ([], ["--seq_len=64"], ["--seq_len=4"])
    )
    assert whole == same != short


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_a_stage_gives_the_run_s_figures(run, stage, tmp_path):
    found = command(tmp_path, f"--workdir={run.folder}", f"--stage={stage}")
    there = run.results["stages"][stage]
    same = found.keys() & there.keys()
    assert {"loss", "accuracy", "macro_f1", "classes"} <= same
    assert {name: found[name] for name in same} == {name: there[name] for name in same}
    assert (found["stage"], found["split"], found["task"]) == (stage, "test", "agnews")


def test_a_stage_on_other_data(run, tmp_path):
    own = command(tmp_path, f"--workdir={run.folder}", "--split=validation")
    assert own["split"] == "validation"
    assert own["data"]["examples"] == run.results["data"]["validation"]["examples"]
    other = command(tmp_path, f"--workdir={run.folder}", f"--data={NEWS / 'train.csv'}")
    assert other["data"]["examples"] == 160 and other["split"] == "test"


def test_questions(tmp_path):
    folder, config = tmp_path / "run", finetuning.config("student", task="squad", steps=2)
    there = finetuning.run(config, folder)["stages"]
    out = tmp_path / "out"
    for stage in ("teacher", "student"):
        found = command(tmp_path, f"--workdir={folder}", f"--stage={stage}", f"--out={out}")
        for name in ("f1", "exact_match", "HasAns_f1", "null_threshold", "loss"):
            assert found[name] == there[stage][name]
    file, data = out / "predictions.json", config.data.test.path
    scored = command(tmp_path, f"--predictions={file}", "--task=squad", f"--data={data}")
    for name in ("f1", "exact_match"):
        assert scored[name] == found[name]


def test_classes_in_another_order(tmp_path, capsys):
    """A model that was saved with names, without them, and with them given."""
    named = finetuning.checkpoint(classes=finetuning.OTHERS)
    unnamed = finetuning.checkpoint(classes=tuple(f"LABEL_{i}" for i in range(4)))
    flags = ["--task=agnews", f"--data={NEWS / 'test.csv'}"]
    wanted = command(tmp_path, f"--model={named}", *flags)
    names = f"--labels={','.join(finetuning.OTHERS)}"
    found = command(tmp_path, f"--model={unnamed}", *flags, names)
    assert found["confusion"] == wanted["confusion"]
    # The same weights: what is called World there is Sports here, and so on.
    theirs = command(tmp_path, f"--model={finetuning.checkpoint()}", *flags)
    chosen = [np.sum(each["confusion"], axis=0) for each in (theirs, wanted)]
    assert chosen[0][[1, 2, 3, 0]].tolist() == chosen[1].tolist() and chosen[1].max() < 48
    line = refused(capsys, f"--model={unnamed}", *flags)
    assert re.search("calls its classes LABEL_0, .* in its own order, in --labels$", line)
    line = refused(capsys, f"--model={unnamed}", *flags, "--labels=World,Sports")
    assert "4 classes" in line and "--labels 2" in line


def test_own_texts_and_scores(tmp_path):
    rows = "text\tlabel\npoor weak market\tgood\ngreat city\tbad\nfine film\tbad\n"
    (tmp_path / "own.tsv").write_text(rows)
    model = finetuning.checkpoint(classes=("good", "bad"))
    flags = ["--task=text", f"--data={tmp_path / 'own.tsv'}"]
    found = command(tmp_path, f"--model={model}", *flags)
    assert list(found["classes"]) == ["good", "bad"] and found["data"]["examples"] == 3
    scores = finetuning.checkpoint(classes=("score",))
    data = samples() / "STS-B"
    found = command(tmp_path, f"--model={scores}", "--task=glue/stsb", f"--data={data}")
    assert {"pearson", "spearman"} <= found.keys() and "classes" not in found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-2], r"lacks 2 of 48 rows: index 46"),
        (lambda rows: [*rows, "48\tWorld"], r"row 50: index '48'; have: 0 to 47"),
        (lambda rows: [*rows, "3\tWorld"], r"row 50: index 3 is there twice"),
        (lambda rows: [rows[0], "0\tWeather", *rows[2:]], r"row 2: 'Weather' is no label; have:"),
        (lambda rows: rows[1:], r"row 1: the header must be index TAB prediction"),
    ],
)
def test_predictions_that_do_not_fit(change, message, tmp_path, capsys):
    rows = ["index\tprediction", *(f"{i}\tWorld" for i in range(48))]
    file = tmp_path / "predictions.tsv"
    file.write_text("\n".join(change(rows)) + "\n")
    line = refused(capsys, f"--predictions={file}", "--task=agnews", f"--data={NEWS}")
    assert line.startswith(str(file)) and re.search(message, line)


def test_answers_to_unknown_questions(tmp_path, capsys):
    file = tmp_path / "answers.json"
    flags = ["--task=squad", f"--data={samples() / 'squad' / 'dev-v1.1.json'}"]
    file.write_text('{"nobody": "asked"}')
    assert "has no question 'nobody'" in refused(capsys, f"--predictions={file}", *flags)
    file.write_text("{}")
    assert "lacks 24 of 24 questions" in refused(capsys, f"--predictions={file}", *flags)


def test_mistakes(run, student, tmp_path, capsys):
    def line(*flags):
        return refused(capsys, *flags)

    model, data = f"--model={student}", f"--data={NEWS}"
    assert "have: student" in line(f"--workdir={run.folder}", "--stage=pupil")
    assert "is a run of task 'agnews', not 'squad'" in line(
        f"--workdir={run.folder}", "--task=squad"
    )
    assert "did you mean glue/wnli or glue/qnli or glue/mnli?" in line(model, "--task=nli", data)
    assert "; have: glue/cola, glue/sst2, " in line(model, "--task=glue/nli", data)
    assert "--task=text needs --data" in line(model, "--task=text")
    assert "--stage does not go with --model" in line(model, "--task=agnews", "--stage=x")
    rows = "--batch_size=12"
    assert "--batch_size=12 cannot be divided among 8 devices" in line(
        model, "--task=agnews", data, rows
    )
    assert "--seq_len=9999: there are positions for" in line(
        model, "--task=agnews", data, "--seq_len=9999"
    )
    missing = tmp_path / "missing.csv"
    assert str(missing) in line(model, "--task=agnews", f"--data={missing}")


def test_a_checkpoint_with_another_tokenizer_s_files(student, tmp_path, capsys):
    model = Path(finetuning.larger_tokenizer(tmp_path))
    assert tokenizers.has_tokenizer(model)
    line = refused(capsys, f"--model={model}", "--task=agnews", f"--data={NEWS}")
    assert "has a vocabulary of 96, its tokenizer has ids up to" in line


def test_pairs_for_a_checkpoint_without_a_second_token_type(student, tmp_path, capsys):
    model = Path(shutil.copytree(student, tmp_path / "model"))
    finetuning.one_token_type(model)
    rows = "text\tpair\tlabel\npoor market\tgreat city\tWorld\n"
    (tmp_path / "own.tsv").write_text(rows)
    flags = [f"--model={model}", "--task=text", f"--data={tmp_path / 'own.tsv'}"]
    assert "has 1 token types" in refused(capsys, *flags, "--pair=pair")
