import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kd_jax import plugins
from kd_jax.data import tokenizers
from kd_jax.errors import UserError

# Rows of the original layouts: header (None in CoLA), rows with labels 1 and 0 or their names.
LAYOUTS = {
    "cola": (None, ['x1\t1\t\tA "quoted sentence.', "x1\t0\t*\tTwo."]),
    "sst2": ("sentence\tlabel", ['a "fine film \t1', "bad \t0"]),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        ['1\t7\t8\tHe " said\tShe', "0\t1\t2\tA\tB"],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        ['1\t1\t2\tA "b?\tC?\t1', "2\t3\t4\tbroken off", "3\t3\t4\tD?\tE?\t0"],
    ),
    "mnli": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        [
            '0\t1\t1n\tf\t(\t(\t(\t(\tA "b\tC\tneutral\tneutral',
            "1\t1\t1n\tf\t(\t(\t(\t(\tD\tE\tneutral\tentailment",
        ],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel",
        ['0\tA "b?\tC\tnot_entailment', "1\tD?\tE\tentailment"],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel",
        ['0\tA "b\tC\tnot_entailment', "1\tD\tE\tentailment"],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel", ['0\tA "b\tC\t1', "1\tD\tE\t0"]),
}


def make(task, data, tokenizer=None):
    config = {"name": "glue", "task": task, "seq_len": 32}
    return plugins.load("tasks", "glue", "make").make(config, data, tokenizer)


def files(folder, **contents):
    for name, lines in contents.items():
        (folder / f"{name}.tsv").write_text("\n".join(filter(None, lines)) + "\n")
    return {"path": str(folder)}


@pytest.mark.parametrize("name", LAYOUTS)
def test_original_layouts(tmp_path, name):
    header, rows = LAYOUTS[name]
    dev = "dev_matched" if name == "mnli" else "dev"
    folder = files(tmp_path, train=[header, *rows], **{dev: [header, *rows[-1:]]})
    task = make(name, {"train": folder, "test": folder})
    found = task._whole("train")
    assert found.labels_N.tolist() == [1, 0]  # the second and the first class
    assert task.examples("test").labels_N.tolist() == [0]
    assert any('"' in part for part in found.pairs[0])  # quotes are nothing special
    pair = name not in ("cola", "sst2")
    assert all(len(texts) == 1 + pair for texts in found.pairs)
    number = len(rows) + (header is not None)
    assert found.place(1) == f"{tmp_path}/train.tsv, row {number}"
    assert task.splits == ("train", "validation", "test")
    assert task.primary == task.metrics[0]


def test_stsb(tmp_path):
    header = (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore"
    )
    rows = [f"{i}\tg\tf\ty\to\ts\ts\tA {i}\tB\t{i / 2:.3f}" for i in range(11)]
    folder = files(tmp_path, train=[header, *rows], dev=[header, *rows])
    task = make("stsb", {"train": folder, "test": folder})
    assert task.regression and task.labels == ("score",) and task.primary == "spearman"
    assert task.examples("test").labels_N.tolist() == [i / 2 for i in range(11)]
    outputs = [np.array([i], np.float32) for i in range(11)]
    assert task.score("test", outputs)["pearson"] == pytest.approx(1)
    files(tmp_path, dev=[header, rows[0].replace("0.000", "5.5")])
    with pytest.raises(UserError, match="dev.tsv, row 2: label '5.5' is no number between 0 and 5"):
        make("stsb", {"train": folder, "test": folder}).examples("test")


def test_mnli_has_two_test_splits(tmp_path):
    header, rows = LAYOUTS["mnli"]
    folder = files(tmp_path, dev_matched=[header, rows[0]], dev_mismatched=[header, rows[1]])
    data = {"train": folder, "test": folder}
    assert make("mnli", data).examples("test").labels_N.tolist() == [1]
    assert make("mnli_mismatched", data).examples("test").labels_N.tolist() == [0]
    chosen = {"train": folder, "test": folder | {"split": "dev_mismatched"}}
    assert make("mnli", chosen).examples("test").labels_N.tolist() == [0]
    with pytest.raises(
        UserError, match="train.tsv .* does not exist: .* has dev_matched.tsv, dev_mis"
    ):
        make("mnli", data).examples("train")


def test_empty_questions_of_qqp_stay(tmp_path):
    header, rows = LAYOUTS["qqp"]
    folder = files(tmp_path, dev=[header, rows[0].replace("C?", ""), rows[2]])
    found = make("qqp", {"train": folder, "test": folder}).examples("test")
    assert found.second == ["", "E?"] and len(found.pairs) == 2


def test_submissions_are_written_as_glue_wants_them(tmp_path):
    for name, written in (("qnli", "entailment"), ("sst2", "0")):
        header, rows = LAYOUTS[name]
        folder = files(tmp_path, dev=[header, *rows])
        task = make(name, {"train": folder, "test": folder})
        outputs = [np.array([2.0, 1.0]), np.array([3.0, 1.0])]
        task.write_submission("test", outputs, str(tmp_path / "out.tsv"))
        assert (tmp_path / "out.tsv").read_text() == (
            f"index\tprediction\n0\t{written}\n1\t{written}\n"
        )
        read = task.read_predictions("test", str(tmp_path / "out.tsv"))
        assert read == task.predictions("test", outputs) == [task.labels[0]] * 2


def test_a_test_file_without_labels_can_be_predicted_but_not_scored(tmp_path):
    tokenizer = tokenizers.train_tokenizer("wordpiece", ["one two"], 40, tmp_path / "tokenizer")
    for name, header in (("cola", "index\tsentence"), ("sst2", "index\tsentence")):
        folder = files(tmp_path, test=[header, "0\tone", "1\ttwo"])
        data = {"train": folder, "test": folder | {"split": "test"}}
        task = make(name, data, tokenizer)
        outputs = [np.array([0.0, 1.0])] * 2
        assert task.examples("test").first == ["one", "two"] and len(task.rows("test")) == 2
        assert task.predictions("test", outputs) == [task.labels[1]] * 2
        with pytest.raises(UserError, match="test.tsv .config.data.test. has no labels"):
            task.score("test", outputs)


def test_the_hubs_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0], "idx": [0, 1]}
    for split in ("train", "validation_matched", "validation_mismatched"):
        pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / f"{split}.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n" + "".join(
        f"  - {{split: {s}, path: {s}.parquet}}\n"
        for s in ("train", "validation_matched", "validation_mismatched")
    )
    (tmp_path / "README.md").write_text(card + "---\n")
    source = {"source": "hub", "path": str(tmp_path)}
    task = make("mnli_mismatched", {"train": source, "test": source})
    assert task.examples("test").labels_N.tolist() == [2, 0]
    assert task.examples("test").name.endswith(":validation_mismatched")
    assert task._whole("train").pairs == [("a", "c"), ("b", "d")]


def test_sources_that_are_left_out_are_the_hubs(monkeypatch):
    asked = []

    def refuse(spec, where):
        asked.append((spec["path"], spec["name"], spec["split"]))
        raise UserError("no network")

    monkeypatch.setattr("kd_jax.data.hub.rows", refuse)
    for name in ("mrpc", "mnli_mismatched"):
        for split in ("train", "test"):
            with pytest.raises(UserError, match="no network"):
                make(name, None).examples(split)
    hub = "nyu-mll/glue"
    assert asked == [
        (hub, "mrpc", "train"),
        (hub, "mrpc", "validation"),
        (hub, "mnli", "train"),
        (hub, "mnli", "validation_mismatched"),
    ]


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="config.task.task='sst': have cola, sst2, mrpc"):
        make("sst", None)
    for lines, message in (
        (["sentence\tlabel", "x\t2"], "row 2: '2' is no label; have: negative, positive, 0, 1"),
        (["sentence\tlabel", "x"], "row 2: 1 fields instead of 2 .sentence, label."),
        (["text\tlabel", "x\t1"], "no column 'sentence'; .*: text, label"),
        (["sentence\tlabel", " \t1"], "row 2: the text is empty"),
        (["sentence\tlabel"], " holds no rows"),
    ):
        folder = files(tmp_path, dev=lines)
        with pytest.raises(UserError, match=f"dev.tsv.*{message}"):
            make("sst2", {"train": folder, "test": folder}).examples("test")


@pytest.mark.parametrize(
    "name, folder, train, dev",
    [
        ("sst2", "SST-2", 67_349, 872),
        ("cola", "CoLA", 8_551, 1_043),
        ("mrpc", "MRPC", 3_668, 408),
        ("stsb", "STS-B", 5_749, 1_500),
    ],
)
def test_the_real_files(data_folder, name, folder, train, dev):
    source = {"path": str(data_folder / "glue" / folder)}
    task = make(name, {"train": source, "test": source})
    manifest = task.prepare()
    held = manifest["validation"]["examples"]
    assert manifest["train"]["examples"] + held == train and manifest["test"]["examples"] == dev
    assert held == pytest.approx(train / 10, rel=0.02)
    labels_N = task.examples("test").labels_N
    if not task.regression:
        assert set(labels_N.tolist()) == {0, 1}
        shares = [task.examples(s).labels_N.mean() for s in ("train", "validation")]
        assert shares[0] == pytest.approx(shares[1], abs=0.01)
