import zipfile

import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.errors import UserError

NAMES = ("neutral", "positive", "neutral", "negative")
LINES = [f"Profit rose to {i} mn @ home £@{NAMES[i % 4]}" for i in range(40)]


def make(data, **keys):
    config = {"name": "phrasebank", **keys}
    return plugins.load("tasks", "phrasebank", "make").make(config, data, None)


@pytest.fixture
def folder(tmp_path):
    content = ("\r\n".join(LINES) + "\r\n").encode("latin-1")
    (tmp_path / "Sentences_AllAgree.txt").write_bytes(content)
    return tmp_path


def texts(task):
    return {split: set(task.examples(split).first) for split in task.splits}


def test_latin_1_and_the_last_at_sign(folder):
    task = make({"train": {"path": str(folder)}})
    found = task._file("train")
    assert found.first[0] == "Profit rose to 0 mn @ home £"
    assert found.labels_N[:4].tolist() == [1, 2, 1, 0]
    assert task.labels == ("negative", "neutral", "positive") and task.primary == "macro_f1"


def test_a_test_split_is_taken_out_of_train(folder):
    task = make({"train": {"path": str(folder)}, "held_out": 0.25})
    counts = {split: found["examples"] for split, found in task.prepare().items()}
    assert counts == {"train": 24, "validation": 8, "test": 8}
    assert np.bincount(task.examples("test").labels_N).tolist() == [2, 4, 2]
    found = texts(task)
    assert len(set.union(*found.values())) == 40 == sum(map(len, found.values()))
    data = {"train": {"path": str(folder)}, "test_share": 0.5}
    assert len(make(data).examples("test")) == 20
    other = make(data | {"test_seed": 1})
    assert texts(other)["test"] != texts(make(data))["test"]
    assert texts(make(data)) == texts(make(data))


def test_a_test_file_of_its_own(folder):
    source = {"path": str(folder / "Sentences_AllAgree.txt")}
    task = make({"train": source, "test": source})
    assert len(task.examples("test")) == 40 and len(task.examples("train")) == 36
    alone = make({"test": source})
    assert alone.splits == ("test",) and list(alone.prepare()) == ["test"]


def test_the_zip(folder):
    with zipfile.ZipFile(folder / "bank.zip", "w") as archive:
        inside = "FinancialPhraseBank-v1.0/Sentences_AllAgree.txt"
        archive.writestr(f"__MACOSX/{inside}", "no")
        archive.write(folder / "Sentences_AllAgree.txt", inside)
    found = make({"train": {"path": str(folder / "bank.zip")}})._file("train")
    assert found.first == make({"train": {"path": str(folder)}})._file("train").first
    assert found.place(3).endswith(
        "bank.zip/FinancialPhraseBank-v1.0/Sentences_AllAgree.txt, line 4"
    )
    with pytest.raises(UserError, match="bank.zip .* holds no Sentences_50Agree.txt; have: Fin"):
        make({"train": {"path": str(folder / "bank.zip")}}, level="50Agree").examples("train")
    (folder / "bad.zip").write_text("x")
    with pytest.raises(UserError, match="bad.zip .config.data.train. is no zip"):
        make({"train": {"path": str(folder / "bad.zip")}}).examples("train")


def test_mistakes(folder):
    with pytest.raises(UserError, match="config.task.level='All': have AllAgree, 75Agree"):
        make(None, level="All")
    with pytest.raises(UserError, match="config.data.test_share=1.0 must be above 0 and below 1"):
        make({"test_share": 1.0})
    with pytest.raises(
        UserError, match="config.data.train: PhraseBank is read from source='files'"
    ):
        make({"train": {"source": "hub", "path": "x"}}).examples("train")
    with pytest.raises(UserError, match="config.data.train is not set"):
        make({}).examples("train")
    file = folder / "Sentences_AllAgree.txt"
    with pytest.raises(UserError, match="AllAgree.txt .* is not of config.task.level='66Agree'"):
        make({"train": {"path": str(file)}}, level="66Agree").examples("train")
    with pytest.raises(UserError, match="Sentences_66Agree.txt .* does not exist"):
        make({"train": {"path": str(folder)}}, level="66Agree").examples("train")
    file.write_text("one@neutral\n\ntwo@good\n")
    with pytest.raises(UserError, match="AllAgree.txt, line 3: 'good' is no label; have: neg"):
        make({"train": {"path": str(folder)}}).examples("train")
    file.write_text("no label\n")
    with pytest.raises(UserError, match="line 1: 'no label' is no label"):
        make({"train": {"path": str(folder)}}).examples("train")
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no sentences"):
        make({"train": {"path": str(folder)}}).examples("train")


@pytest.mark.parametrize("level, count", [("AllAgree", 2_264), ("50Agree", 4_846)])
def test_the_real_files(data_folder, level, count):
    task = make({"train": {"path": str(data_folder / "financial_phrasebank")}}, level=level)
    counts = {split: found["examples"] for split, found in task.prepare().items()}
    assert sum(counts.values()) == count
    found = texts(task)
    assert not found["test"] & (found["train"] | found["validation"])  # repeated ones stay together
    assert not found["train"] & found["validation"]


def test_an_encrypted_zip(folder):
    file = folder / "bank.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(folder / "Sentences_AllAgree.txt", "Sentences_AllAgree.txt")
    content = bytearray(file.read_bytes())
    for start, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(start) + flags] |= 1
    file.write_bytes(content)
    with pytest.raises(
        UserError, match="bank.zip .* is encrypted, .*; unpack it and name the fold"
    ):
        make({"train": {"path": str(file)}}).prepare()
