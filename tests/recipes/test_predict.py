import csv
import dataclasses
import datetime
import decimal
import functools
import json
import math
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers

from kd_jax import plugins
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.precision import Policy
from kd_jax.recipes import predict
from kd_jax.recipes.predict import Options
from kd_jax.tasks import prediction
from tests.models import tiny
from tests.recipes import finetuning

pytestmark = pytest.mark.usefixtures("caches")

TEXTS = [f"row {i} is {'good' if i % 3 else 'bad'}" + " really" * (i % 9) for i in range(70)]
CONTEXT = "the good row is really a bad row " * 9
QUESTIONS = [
    {"id": f"q{i}", "question": f"is row {i} good", "answers": [], "is_impossible": True}
    for i in range(3)
]


def checkpoint(folder, head, labels=("bad", "fair", "good")):
    """A random model, whose answers differ, with its tokenizer."""
    described = tiny.CONFIGS["bert"] | {"initializer_range": 0.5}
    if head == "classification":
        described |= {"id2label": dict(enumerate(labels))}
    kind, config = family.read(described)
    model = family.build(kind, config, head, Policy(), jax.random.key(3))
    hf.save(folder, model.params, kind, config, head)
    tokenizers.train_tokenizer("wordpiece", [*TEXTS, CONTEXT], tiny.VOCAB, folder)
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("classifier"), "classification")


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("reader"), "span")


def predict_file(model, source, target, options):
    """Predicts as the command does."""
    open_model = functools.partial(predict.checkpoint, model, None, options.precision)
    return predict.predict_file(open_model, source, target, options)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_classes_are_pytorch_s(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "AT_ONCE", 32)  # three parts of the file, the last one small
    source, target = tmp_path / "texts.txt", tmp_path / "new" / "out.jsonl"
    source.write_text("\n".join(TEXTS) + "\n\n")
    done = predict_file(classifier, str(source), str(target), Options(batch_size=16))
    assert (done["rows"], done["head"], done["output"]) == (70, "classification", str(target))
    found = lines(target)
    assert [row["index"] for row in found] == list(range(70))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    rows = tokenizers.load_tokenizer(classifier)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        wanted_NC = torch.softmax(model(**rows).logits, -1).numpy()
    ours_NC = [list(row["probabilities"].values()) for row in found]
    np.testing.assert_allclose(ours_NC, wanted_NC, atol=2e-5)
    names = ["bad", "fair", "good"]
    assert [row["label"] for row in found] == [names[i] for i in wanted_NC.argmax(1)]
    assert all(row["probability"] == row["probabilities"][row["label"]] for row in found)
    assert {row["label"] for row in found} > {found[0]["label"]}
    assert list(target.parent.iterdir()) == [target]


def test_labels_that_are_not_finite_are_refused(classifier, tmp_path):
    own = predict.checkpoint(classifier, None, None)
    load = lambda: jax.tree.map(lambda x: np.full(x.shape, np.inf, np.float32), own.params)  # noqa: E731
    spoilt = dataclasses.replace(own, load=load)
    source = write(tmp_path / "texts.jsonl", [{"text": "row"}])
    with pytest.raises(UserError, match="its outputs are not finite; its weights hold NaN"):
        predict.predict_file(lambda: spoilt, source, str(tmp_path / "out.jsonl"), Options())
    assert not (tmp_path / "out.jsonl").exists()


def test_pairs_in_tables_keep_their_ids(classifier, tmp_path):
    rows = [{"id": f"n{i}", "a": a, "b": TEXTS[-i]} for i, a in enumerate(TEXTS[:3], 1)]
    source = write(tmp_path / "pairs.jsonl", rows)
    options = Options(text="a", pair="b", precision="bf16")
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        target = tmp_path / f"out{suffix}"
        predict_file(classifier, source, str(target), options)
        with target.open(newline="") as file:
            found = list(csv.DictReader(file, delimiter=delimiter))
        assert [row["id"] for row in found] == ["n1", "n2", "n3"]
        classes = [f"probability_{name}" for name in ("bad", "fair", "good")]
        assert list(found[0]) == ["index", "id", "label", "probability", *classes]
        assert math.isclose(sum(float(found[1][name]) for name in classes), 1, abs_tol=1e-5)
    alone = tmp_path / "alone.csv"
    predict_file(classifier, source, str(alone), Options(text="a", precision="bf16"))
    assert alone.read_text() != (tmp_path / "out.csv").read_text()


def test_scores_of_a_regression(tmp_path):
    model = checkpoint(tmp_path / "model", "classification", ("score",))
    source, target = tmp_path / "texts.txt", tmp_path / "scores"
    source.write_text(f"{TEXTS[0]}\n{TEXTS[1]}\n")
    predict_file(model, str(source), str(target), Options())
    assert [sorted(row) for row in lines(target)] == [["index", "score"]] * 2
    source.write_text(f"{TEXTS[0]}\n\n{TEXTS[1]}\n")
    scored = lines(target)
    predict_file(model, str(source), str(target), Options(keep_empty=True))
    kept = lines(target)
    assert [row["index"] for row in kept] == [0, 1, 2] and kept[1]["score"] is None
    assert [kept[0]["score"], kept[2]["score"]] == [row["score"] for row in scored]


def test_answers_are_those_of_the_task(reader, tmp_path):
    article = {"title": "T", "paragraphs": [{"context": CONTEXT, "qas": QUESTIONS}]}
    source, target = tmp_path / "squad.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"data": [article]}))
    predict_file(reader, str(source), str(target), Options())
    found = lines(target)
    assert [row["id"] for row in found] == ["q0", "q1", "q2"]
    settings = dict(name="squad", seq_len=40, doc_stride=13, max_question_length=6)
    data = {"test": {"path": str(source)}}
    make = plugins.load("tasks", "squad", "make").make
    tokenizer = tokenizers.load_tokenizer(reader)
    task = make(settings | {"best_non_null": True}, data, tokenizer)
    described = predict.checkpoint(reader, None, "fp32").described
    model = described.abstract().replace(params=described.load(None))
    rows = task.rows("test")
    assert len(rows) > 3  # windows
    batch = rows.batch(np.arange(len(rows)), 40)
    outputs = [
        np.asarray(logits[:, :n])
        for logits, n in zip(model(batch).logits, rows.lengths_N, strict=True)
    ]
    assert {row["id"]: row["answer"] for row in found} == task.predictions("test", outputs)
    odds = {key: best.null_odds for key, best in task._best("test", outputs).items()}
    for row in found:
        assert CONTEXT[row["start"] : row["end"]] == row["answer"] != ""
        assert 0 < row["probability"] + row["no_answer"] < 1
        ratio = math.log(row["no_answer"] / row["probability"])
        assert ratio == pytest.approx(odds[row["id"]], abs=1e-4)


def test_a_threshold_leaves_questions_unanswered(reader, tmp_path):
    rows = [{"question": "is row 1 good", "context": CONTEXT}]
    source, target = write(tmp_path / "questions.jsonl", rows), tmp_path / "out.jsonl"
    predict_file(reader, source, str(target), Options(null_threshold=-1e9))
    (never,) = lines(target)
    predict_file(reader, source, str(target), Options(null_threshold=1e9))
    (always,) = lines(target)
    assert (never["answer"], never["start"], never["end"]) == ("", None, None)
    assert never["probability"] == never["no_answer"] == always["no_answer"]
    assert "id" not in always and always["answer"]
    rows.append({"question": "is row 2 good", "context": "\u200b"})
    source = write(tmp_path / "questions.jsonl", rows)
    predict_file(reader, source, str(target), Options(null_threshold=1e9, keep_empty=True))
    assert lines(target)[0] == always
    assert lines(target)[1] == dict.fromkeys(always) | {"index": 1}


def test_the_same_characters_count_once():
    made = type("Made", (), {})()
    made.question_N, made.first_N, made.count_N = [0, 0], [1, 1], [1, 1]
    made.offsets = lambda row: np.array([[0, 3]])
    question = predict.Question("0", "", "the", "?", ())
    logits = [np.array([[0.0, a], [0.0, a]]) for a in (1.0, 2.0)]
    (found,) = predict.answers_of(made, [question], logits, None)
    assert found["probability"] == pytest.approx(1 / (1 + math.exp(-4)), abs=1e-6)
    assert found["probability"] + found["no_answer"] == pytest.approx(1, abs=2e-6)


def test_mistakes_name_file_and_row(classifier, reader, tmp_path):
    target = tmp_path / "out.jsonl"
    good = write(tmp_path / "good.jsonl", [{"text": "a"}])
    cells = tmp_path / "cells.csv"
    cells.write_text('text\na\n""\nb\n""\n')
    semicolons = tmp_path / "semicolons.csv"
    semicolons.write_text("text;id\na;1\n")
    hidden = write(tmp_path / "hidden.jsonl", [{"question": "a", "context": "\u200b\u00ad"}])
    empty = write(tmp_path / "empty.jsonl", [{"text": "a"}, {"text": " "}])
    blank = tmp_path / "blank.txt"
    blank.write_text("a\n\nb\n")
    asked = write(tmp_path / "asked.jsonl", [{"question": "", "context": "x"}])
    squad = tmp_path / "squad.json"
    squad.write_text(json.dumps({"data": [{"paragraphs": [{"context": "x"}]}]}))
    cases = [
        (classifier, str(tmp_path / "none.csv"), {}, "none.csv: no such file"),
        (classifier, str(blank), {}, "blank.txt, line 2: the text is empty"),
        (classifier, empty, {}, "empty.jsonl, line 2: the text is empty"),
        (
            classifier,
            str(cells),
            {},
            "cells.csv, row 3: the text is empty; remove the row (one of 2)",
        ),
        (classifier, str(semicolons), {}, "row 1: .* set delimiter=';' .*(--delimiter of predict)"),
        (classifier, good, {"text": "x"}, "no column 'x'; set --text to one of: text"),
        (classifier, good, {"pair": "y"}, "no column 'y'; set --pair to one of: text"),
        (classifier, str(blank), {"text": "x"}, "has no columns"),
        (classifier, good, {"null_threshold": 0.0}, "--null_threshold goes with a model that"),
        (classifier, good, {"batch_size": 12}, "--batch_size=12 cannot be divided among 8"),
        (reader, good, {}, "no column 'question'"),
        (reader, asked, {}, "asked.jsonl, line 1: the question is empty"),
        (reader, hidden, {}, "hidden.jsonl, line 1: the context is empty; remove the row"),
        (reader, str(blank), {}, "cannot read .txt here; have: .csv"),
        (reader, str(squad), {}, "squad.json, paragraph 1 has no 'qas'"),
        (reader, good, {"pair": "y"}, "--text and --pair do not go with"),
    ]
    for model, source, options, message in cases:
        with pytest.raises(UserError, match=re.sub("[()]|[*](?=F)", r"\\\g<0>", message)):
            predict_file(model, source, str(target), Options(**options))
    assert not target.exists() and not list(tmp_path.glob("*.tmp"))
    with pytest.raises(UserError, match="none.csv: no such file"):
        predict_file(classifier, str(tmp_path / "none.csv"), good, Options())


def test_output_is_not_the_input_nor_another_format(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "link.jsonl").symlink_to(source)
    for target, message in [
        ("in.jsonl", "is the input; give another file"),
        ("link.jsonl", "is the input; give another file"),
        ("out.xlsx", "cannot write .xlsx; have: .jsonl, .csv, .tsv"),
        ("", "is a folder"),
    ]:
        with pytest.raises(UserError, match=message):
            predict_file("nowhere", source, str(tmp_path / target), Options())  # found first
    assert lines(tmp_path / "in.jsonl") == [{"text": "a"}]


def test_other_heads_are_refused(classifier, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["BertForMaskedLM"]}))
    source = write(tmp_path / "in.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="are BertForMaskedLM; have: .ForSequenceClassification"):
        predict_file(str(folder), source, str(tmp_path / "out.csv"), Options())


def test_nothing_is_left_after_an_error(classifier, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("lost")

    monkeypatch.setattr(predict, "predict", fail)
    source = write(tmp_path / "in.jsonl", [{"text": "a"}])
    (tmp_path / "out.csv").write_text("before")
    with pytest.raises(RuntimeError, match="lost"):
        predict_file(classifier, source, str(tmp_path / "out.csv"), Options())
    assert (tmp_path / "out.csv").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.csv"]


def test_an_empty_row_keeps_its_place_where_that_is_asked_for(classifier, tmp_path):
    source, target = tmp_path / "in.csv", tmp_path / "out.csv"
    source.write_text(f"id;text\na;{TEXTS[0]}\nb;\n;\nd;{TEXTS[2]}\n")
    options = Options(delimiter=";", keep_empty=True)
    predict_file(classifier, str(source), str(target), options)
    with target.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row.pop("id") for row in found] == ["a", "b", "", "d"]
    assert [row["index"] for row in found] == ["0", "1", "2", "3"]
    assert all(value == "" for key, value in found[1].items() if key != "index")
    predict_file(classifier, str(source), str(tmp_path / "out.jsonl"), options)
    kept = lines(tmp_path / "out.jsonl")
    assert kept[1] == dict.fromkeys(kept[0]) | {"index": 1, "id": "b"} | {
        "probabilities": {"bad": None, "fair": None, "good": None}
    }
    source = write(tmp_path / "alone.jsonl", [{"text": TEXTS[0]}, {"text": TEXTS[2]}])
    predict_file(classifier, source, str(target), Options())
    with target.open(newline="") as file:
        alone = list(csv.DictReader(file))
    assert [row | {"index": ""} for row in (found[0], found[3])] == [
        row | {"index": ""} for row in alone
    ]


def test_ids_are_written_as_json_has_them(tmp_path):
    day = datetime.datetime(2024, 1, 2, 3, 4)
    ids = {
        "dates": [day, None],
        "numbers": [1.5, math.nan],
        "money": [decimal.Decimal("1.50"), None],
        "lists": [[day.date()], []],
    }
    want = {
        "dates": ["2024-01-02T03:04:00", None],
        "numbers": [1.5, None],
        "money": ["1.50", None],
        "lists": [["2024-01-02"], []],
    }
    file = tmp_path / "in.parquet"
    for name, values in ids.items():
        pyarrow.parquet.write_table(pyarrow.table({"id": values, "text": ["a", "b"]}), file)
        found = prediction.texts(file, None, None, None, False).ids
        assert found == want[name]
        json.dumps(found, allow_nan=False)


def test_pairs_for_a_model_without_a_second_token_type(classifier, tmp_path):
    model = Path(shutil.copytree(classifier, tmp_path / "model"))
    finetuning.one_token_type(model)
    source = write(tmp_path / "in.jsonl", [{"text": "a", "pair": "b"}])
    with pytest.raises(UserError, match="model .* has 1 token types .* 0 to 1: they do not belong"):
        predict_file(str(model), source, str(tmp_path / "out.csv"), Options(pair="pair"))
    assert not (tmp_path / "out.csv").exists()
