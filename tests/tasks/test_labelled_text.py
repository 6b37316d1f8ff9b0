"""Tasks of labelled texts: own files, and all that they share with the other data sets."""

import json
import math

import jax
import ml_collections
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.data import encoded, tokenizers
from kd_jax.data.loader import lengths_of_pass
from kd_jax.errors import UserError
from kd_jax.metrics import classification

ROWS = [
    {"text": f"row {i} is {'good' if i % 3 else 'bad'} " + "really " * (i % 9), "label": c}
    for i, c in enumerate(["no", "yes", "perhaps"] * 20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [row["text"] for row in ROWS]
    return tokenizers.train_tokenizer("wordpiece", texts, 80, tmp_path_factory.mktemp("tokenizer"))


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(path)}


@pytest.fixture
def data(tmp_path):
    return {
        "train": write(tmp_path / "train.jsonl", ROWS),
        "test": write(tmp_path / "test.jsonl", ROWS[:7]),
        "held_out": 0.2,
    }


def make(data, tokenizer=None, **keys):
    config = {"name": "labelled_text", "seq_len": 24, **keys}
    module = plugins.load("tasks", "labelled_text", "make")
    return module.make(
        ml_collections.ConfigDict(config), ml_collections.ConfigDict(data), tokenizer
    )


def outputs_of(task, split, right=True):
    """Logits of one row each that choose the right class, or the next one."""
    labels = task.examples(split).labels_N
    chosen = labels if right else (labels + 1) % len(task.labels)
    return list(3 * np.eye(len(task.labels), dtype=np.float32)[chosen])


def test_labels_come_from_the_training_data(data):
    task = make(data)
    assert (task.head, task.labels, task.regression) == (
        "classification",
        ("no", "perhaps", "yes"),
        False,
    )
    assert task.metrics == ("accuracy", "macro_f1") and task.primary == "accuracy"
    assert task.examples("test").labels_N.tolist() == [0, 2, 1, 0, 2, 1, 0]


def test_all_files_are_read_before_one_is_tokenized(data, tokenizer, monkeypatch):
    data["test"]["path"] += ".gone"
    monkeypatch.setattr(encoded, "encode", lambda *args: pytest.fail("tokenized"))
    with pytest.raises(UserError, match="config.data.test.path=.*no such file"):
        make(data, tokenizer).prepare()


def test_a_stratified_part_of_train_is_held_out(data):
    manifest = make(data).prepare()
    assert {name: found["examples"] for name, found in manifest.items()} == {
        "train": 48,
        "validation": 12,
        "test": 7,
    }
    task = make(data)
    assert np.bincount(task.examples("validation").labels_N).tolist() == [4, 4, 4]
    train, held = (set(task.examples(s).first) for s in ("train", "validation"))
    assert not train & held and train | held == {row["text"] for row in ROWS}
    assert set(task.texts("train")) == train
    assert make(data).prepare() == manifest
    assert len({found["digest"] for found in manifest.values()}) == 3
    own = make({**data, "validation": data["test"]}).prepare()
    assert [own[s]["examples"] for s in ("train", "validation", "test")] == [60, 7, 7]
    del data["train"]
    assert list(make(data, labels=["no", "perhaps", "yes"]).prepare()) == ["test"]


def test_a_manifest_counts_classes_rows_and_what_is_cut(data, tokenizer):
    found = make(data, tokenizer, seq_len=8).prepare()["train"]
    assert found["classes"] == {"no": 16, "perhaps": 16, "yes": 16}
    assert found["examples"] == found["rows"] == 48
    texts = make(data).examples("train").first
    whole = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert found["longest"] == max(whole)
    assert 0 < found["cut"] == sum(length > 8 for length in whole) < 48
    assert not {"rows", "cut"} & make(data).prepare()["train"].keys()  # no tokenizer


def test_the_same_text_is_not_on_both_sides(data, tmp_path):
    data["train"] = write(tmp_path / "twice.jsonl", ROWS + ROWS[::-1])
    task = make(data)
    assert not set(task.examples("train").first) & set(task.examples("validation").first)
    assert len(task.examples("train")) == 96


def test_batches_have_the_shapes_that_are_promised(data, tokenizer):
    task = make(data, tokenizer)
    stream = task.train(4, seed=0)
    seen = set()
    for step in range(stream.steps_per_epoch):
        batch = stream[step]
        shapes = task.shapes(4, batch.tokens_BT.shape[1])
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        seen.add(batch.tokens_BT.shape[1])
        labels = task.examples("train").labels_N[batch.ids_B]
        assert (batch.labels[:, 0] == labels).all()
    assert seen <= set(task.buckets) and len(seen) > 1
    assert task.shapes(4).tokens_BT.shape == (4, task.buckets[-1])
    assert make(data).shapes(4).tokens_BT.shape == (4, 24)  # neither tokenizer nor data
    held = [batch.ids_B for batch in task.held_out("validation", 5).batches()]
    ids = np.concatenate(held)
    assert sorted(ids[ids >= 0].tolist()) == list(range(12))
    seen = {b.tokens_BT.shape[1] for b in task.held_out("test", 4).batches()}
    assert seen == set(lengths_of_pass(task.rows("test").lengths_N, 24, 4))


def test_another_tokenizer_reads_the_same_examples(data, tokenizer, tmp_path):
    task = make(data, tokenizer)
    task.rows("train")
    pieces = tokenizers.train_tokenizer("bpe", [row["text"] for row in ROWS], 300, tmp_path / "bpe")
    other = task.with_tokenizer(pieces)
    assert other.examples("train") is task.examples("train")
    assert other.rows("train").types_F is None and task.rows("train").types_F is not None
    assert (other.rows("train").labels_NP == task.rows("train").labels_NP).all()
    first = pieces.decode(other.rows("train").tokens_F[: other.rows("train").lengths_N[0]])
    assert first == task.examples("train").first[0]
    assert other.shapes(2).types_BT is None


def test_scores_and_reports(data):
    task = make(data)
    right, wrong = outputs_of(task, "test"), outputs_of(task, "test", right=False)
    found = task.score("test", right)
    assert found["accuracy"] == found["macro_f1"] == 1.0
    assert found["loss"] == pytest.approx(np.log(1 + 2 * np.exp(-3)), rel=1e-5)
    assert list(found) == ["loss", *task.metrics]
    mixed = right[:3] + wrong[3:]
    assert task.score("test", mixed)["accuracy"] == pytest.approx(3 / 7)
    report = task.report("test", mixed)
    assert list(report["classes"]) == ["no", "perhaps", "yes"]
    assert np.sum(report["confusion"]) == 7 and np.trace(report["confusion"]) == 3
    assert task.predictions("test", right) == [row["label"] for row in ROWS[:7]]
    with pytest.raises(ValueError, match="3 outputs of 7 rows"):
        task.score("test", right[:3])


def test_predictions_of_another_system_score_the_same(data, tmp_path):
    task = make(data)
    mixed = outputs_of(task, "test")[:4] + outputs_of(task, "test", right=False)[4:]
    file = tmp_path / "predictions.tsv"
    task.write_submission("test", mixed, str(file))
    assert file.read_text().startswith("index\tprediction\n0\tno\n1\tyes\n")
    read = task.read_predictions("test", str(file))
    assert read == task.predictions("test", mixed)
    scored = task.score("test", mixed)
    assert task.score_predictions("test", read) == {name: scored[name] for name in task.metrics}
    shuffled = file.read_text().splitlines()
    file.write_text("\n".join(shuffled[:1] + shuffled[:0:-1]))
    assert task.read_predictions("test", str(file)) == read


@pytest.mark.parametrize(
    "lines, message",
    [
        (["index,prediction"], "row 1: the header must be index TAB prediction"),
        (["index\tprediction", "0\tno", "0\tno"], "row 3: index 0 is there twice"),
        (["index\tprediction", "7\tno"], "row 2: index '7'; have: 0 to 6"),
        (["index\tprediction", "0\tNO"], "row 2: 'NO' is no label; have: no, perhaps, yes"),
        (["index\tprediction", "0"], "row 2: 1 fields"),
        (["index\tprediction", "0\tno", "2\tno"], "lacks 5 of 7 rows: index 1"),
    ],
)
def test_broken_files_of_predictions(data, tmp_path, lines, message):
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=f"p.tsv.*{message}"):
        make(data).read_predictions("test", str(tmp_path / "p.tsv"))
    with pytest.raises(UserError, match="none.tsv cannot be read"):
        make(data).read_predictions("test", str(tmp_path / "none.tsv"))


def test_pairs_names_and_two_classes(tmp_path, tokenizer):
    rows = [{"a": f"good {i}", "b": "bad row", "y": i % 2} for i in range(8)]
    data = {"train": write(tmp_path / "a.jsonl", rows), "test": write(tmp_path / "b.jsonl", rows)}
    keys = dict(text="a", pair="b", label="y")
    task = make(data, tokenizer, labels={"1": "alike", "0": "other"}, **keys)
    assert task.labels == ("other", "alike")
    assert task.examples("test").labels_N.tolist() == [0, 1] * 4
    assert make(data, labels=["1", "0"], **keys).examples("test").labels_N.tolist() == [1, 0] * 4
    assert task.metrics == ("accuracy", "macro_f1", "f1", "matthews_correlation")
    assert make(data, labels=["0", "1"], primary="f1", **keys).primary == "f1"
    row = task.rows("test").batch(np.array([0]), 24)
    assert row.types_BT.sum() == len(tokenizer.tokenize("bad row")) + 1
    assert make(data, **keys).labels == ("0", "1")
    outputs = [np.array([0.0, float(i == 1)]) for i in range(8)]
    found = make(data, **keys).score("test", outputs)
    assert found["f1"] == pytest.approx(0.4) and found["accuracy"] == pytest.approx(5 / 8)


def test_a_regression(tmp_path, tokenizer):
    rows = [{"text": f"row {i}", "label": str(i / 4)} for i in range(10)]
    data = {"train": write(tmp_path / "a.jsonl", rows), "test": write(tmp_path / "b.jsonl", rows)}
    task = make(data, tokenizer, labels=["score"])
    assert (task.labels, task.regression, task.primary) == (("score",), True, "spearman")
    batch = task.train(4, seed=0)[0]
    assert batch.labels.dtype == np.float32
    assert (batch.labels[:, 0] == task.examples("train").labels_N[batch.ids_B]).all()
    outputs = [np.array([i / 4 + 1], np.float32) for i in range(10)]
    found = task.score("test", outputs)
    assert found == pytest.approx({"loss": 1.0, "spearman": 1.0, "pearson": 1.0})
    assert task.report("test", outputs) == {}
    task.write_submission("test", outputs, str(tmp_path / "p.tsv"))
    read = task.read_predictions("test", str(tmp_path / "p.tsv"))
    assert task.score_predictions("test", read) == pytest.approx(found)
    (tmp_path / "p.tsv").write_text("index\tprediction\n0\tx")
    with pytest.raises(UserError, match="p.tsv, row 2: label 'x' is no number"):
        task.read_predictions("test", str(tmp_path / "p.tsv"))
    data["test"] = write(tmp_path / "c.jsonl", [*rows, {"text": "x", "label": "nan"}])
    with pytest.raises(UserError, match="c.jsonl, line 11: label 'nan' is no number"):
        make(data, labels=["score"]).examples("test")


def test_loss_does_not_depend_on_evaluation_order(data):
    task = make(data)
    rng = np.random.default_rng(0)
    outputs = list(rng.normal(size=(7, 3)).astype(np.float32))
    want = classification.cross_entropy(np.stack(outputs), task.examples("test").labels_N)
    assert task.score("test", outputs)["loss"] == want


def test_mistakes(data, tmp_path):
    rows = [*ROWS, {"text": "x", "label": "maybe"}]
    broken = {**data, "test": write(tmp_path / "c.jsonl", rows)}
    with pytest.raises(UserError, match="c.jsonl, line 61: 'maybe' is no label; have: no, perhaps"):
        make(broken).prepare()
    broken = {**data, "test": write(tmp_path / "d.jsonl", [{"text": " ", "label": "no"}])}
    with pytest.raises(UserError, match="d.jsonl, line 1: the text is empty"):
        make(broken).prepare()
    with pytest.raises(
        UserError, match="no column 'body'; set config.task.text to .*: text, label"
    ):
        make(data, text="body").prepare()
    with pytest.raises(UserError, match="no column 'y'; set config.task.label to one of"):
        make(data, label="y").labels  # noqa: B018
    with pytest.raises(UserError, match="config.task.primary='f1'; have: accuracy, macro_f1"):
        make(data, primary="f1")
    with pytest.raises(UserError, match="config.task.labels='no' must be a list of names"):
        make(data, labels="no")
    with pytest.raises(UserError, match="unknown key config.data.trian"):
        make({"trian": None})
    with pytest.raises(UserError, match="config.data.held_out=1 must be above 0 and below 1"):
        make({**data, "held_out": 1})
    with pytest.raises(UserError, match="seq_len=7 must be at least 8"):
        make(data, seq_len=7)
    with pytest.raises(UserError, match="unknown split 'dev'; have: train, validation, test"):
        make(data).examples("dev")
    with pytest.raises(UserError, match="config.data.test is not set"):
        make({"train": data["train"]}).examples("test")
    one = {"train": write(tmp_path / "one.jsonl", ROWS[:1])}
    with pytest.raises(UserError, match="one.jsonl .config.data.train. is too small to hold"):
        make(one, labels=["no", "yes"]).examples("train")
    with pytest.raises(UserError, match="one.jsonl: all labels are no; there must be two classes"):
        make(one).labels  # noqa: B018


def labels_of(path, *values, **keys):
    """The classes and their indices, of a file with these labels."""
    rows = [{"text": f"text {i}", "label": value} for i, value in enumerate(values)]
    task = make({"train": write(path, rows)}, **keys)
    return task.labels, task._whole("train").labels_N.tolist()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("a", "b", None), r"line 3: the label is missing \(null\); give the row one or remove it"),
        (("a", "b", math.nan), r"line 3: the label is missing \(nan\)"),
        ((0.0, 1.0, math.nan), r"line 3: the label is missing \(nan\)"),
        (("a", "", "b"), r"line 2: the label is missing \(''\)"),
        (("a", "\t", "b"), "line 2: the label is missing"),
        (([0, 2], [1]), r"line 1: the label is a list, \[0, 2\]; a row has one class"),
        (("a", {"k": 0}), "line 2: the label is a dict, {'k': 0}"),
        ((0, 0.37, 1), r"line 2: the label 0.37 is a real number; .* \('score',\) for a regr"),
        (("0.5", "1.5"), "line 1: the label '0.5' is a real number"),
        (("a", "nan"), "line 2: the label 'nan' is a real number"),
        (("good", "bad", "good "), "line 3: the label 'good ' is 'good' but for white space or"),
        (("Good", "bad", "good"), "line 3: the label 'good' is 'Good' but for"),
        (("a", "b", 1), r"line 3: the label 1 is of another kind than 'a' \(.*line 1\)"),
        ((True, False, 2), "line 3: the label 2 is of another kind than True"),
    ],
)
def test_labels_that_cannot_be_meant_are_no_classes(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        labels_of(tmp_path / "a.jsonl", *values)


def test_a_number_is_one_class_however_it_is_written(tmp_path):
    file = tmp_path / "a.jsonl"
    assert labels_of(file, 1, 0.0, 1.0, 0) == (("0", "1"), [1, 0, 1, 0])
    assert labels_of(file, "1.0", "0", "1", "10") == (("0", "1", "10"), [1, 0, 1, 2])
    assert labels_of(file, "01", "1") == (("01", "1"), [0, 1])
    assert labels_of(file, True, False) == (("False", "True"), [1, 0])
    found = labels_of(file, 0.5, 1.0, "1.50", labels=("0.5", "1.0", "1.50"))
    assert found == (("0.5", "1.0", "1.50"), [0, 1, 2])
    spelled = {"good": "good", "good ": "good", "bad": "bad"}
    assert labels_of(file, "good ", "bad", "good", labels=spelled) == (("bad", "good"), [1, 0, 1])
    with pytest.raises(UserError, match=r"line 2: the label is missing \(null\)"):
        labels_of(file, "a", None, labels=("a", "b"))


def test_texts_that_show_nothing_are_empty(tmp_path):
    rows = [{"text": text, "label": i} for i, text in enumerate(["a", "\u200b"])]
    with pytest.raises(UserError, match="line 2: the text is empty; remove the row"):
        make({"train": write(tmp_path / "a.jsonl", rows)}).prepare()
