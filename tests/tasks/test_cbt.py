import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kd_jax.errors import UserError
from kd_jax.tasks import cbt
from tests.tasks.likelihood import book, tokenizer


def made(path, **config):
    return cbt.scoring(config, {"test": {"source": "files", "path": path}})


@pytest.fixture
def folder(tmp_path):
    """The original folder, with two examples of nouns and one of the other classes."""
    data = tmp_path / "CBTest" / "data"
    data.mkdir(parents=True)
    for name in cbt.CLASSES:
        examples = book() * (2 if name == "CN" else 1)
        (data / f"cbtest_{name}_test_2500ex.txt").write_text(examples)
        (data / f"cbtest_{name}_train.txt").write_text(book() * 7)
    (data / "cbt_test.txt").write_text("a book")
    (data / ".ipynb_checkpoints").mkdir()
    (data / ".ipynb_checkpoints" / "cbtest_CN_test-checkpoint.txt").write_text(book())
    return tmp_path


def test_of_a_folder_the_test_splits_are_read(folder):
    task = made(str(folder))
    assert [q.group for q in task.scored.questions] == ["CN", "CN", "NE", "P", "V"]
    assert "cbtest_NE_test_2500ex.txt, " in task.manifest()["name"]
    assert "train" not in task.manifest()["name"]
    assert len(made(str(folder), classes=("NE",)).scored) == 1
    every = made(str(folder / "CBTest" / "data" / "*_CN_*"), classes=("CN",))
    assert len(every.scored) == 9


def test_a_file_of_any_name(tmp_path):
    file = tmp_path / "own.txt"
    file.write_text(book())
    (question,) = made(str(file), classes=("V",)).scored.questions
    assert question.group == "V" and question.endings[1] == "The fox ran home ."


def test_the_hubs_layout_is_the_same(folder, tmp_path):
    sentences = [line.partition(" ")[2] for line in book().split("\n")[:20]]
    row = {"sentences": sentences, "question": "The XXXXX ran home .", "answer": "fox"}
    rows = pyarrow.Table.from_pylist([row | {"options": ["dog", "fox", "hen"]}])
    hub = tmp_path / "hub" / "NE"
    hub.mkdir(parents=True)
    pyarrow.parquet.write_table(rows, hub / "test-00000-of-00001.parquet")
    table = made(str(tmp_path / "hub"), classes=("NE",))
    original = made(str(folder / "CBTest"), classes=("NE",))
    assert table.scored.questions == original.scored.questions


def test_figures_by_class(folder):
    scored = made(str(folder)).encoded(tokenizer(), 500)
    values_N = np.array([-3.0, -1, -2] * 4 + [-1.0, -2, -3])
    found = scored.figures(values_N)
    assert "acc_norm" not in found and found["acc"] == 0.8
    assert {name: group["acc"] for name, group in found["groups"].items()} == {
        "CN": 1.0,
        "NE": 1.0,
        "P": 1.0,
        "V": 0.0,
    }
    assert found["groups"]["CN"]["questions"] == 2 and found["truncated"] == 0
    assert found["chance"] == pytest.approx(1 / 3) and scored.rows.branches == 3
    one = made(str(folder), classes=("NE",)).encoded(tokenizer(), 500)
    assert "groups" not in one.figures(values_N[:3])


def test_the_context_is_cut_and_the_query_is_not(folder):
    scored = made(str(folder), classes=("CN",)).encoded(tokenizer(), 20)
    assert scored.figures(np.zeros(6))["truncated"] == 6
    rows = {
        tuple(row[mask > 0])
        for batch in scored.rows.batches(3)
        for row, mask in zip(batch.tokens_BT, batch.mask_BT, strict=True)
    }
    whole = " ".join(scored._questions.questions[0].context.split(" ") + ["The dog ran home ."])
    ids = tokenizer()(whole)["input_ids"][-21:]
    assert any(row[:20] == tuple(ids[:-1]) for row in rows)


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("nothing*.txt", {}, "path='.*nothing.*': no such file"),
        ("empty", {}, "no file of the Children's Book Test's class CN; its name has CN in it"),
        ("cbtest_P_test.txt", {"classes": ("NE",)}, "no file of .* class NE"),
        ("cbtest_P_test.txt", {"classes": ("N",)}, r"config.task.classes=\['N'\]: have CN, NE, P"),
        ("cbtest_P_test.txt", {"classes": ()}, "have CN, NE, P, V"),
        ("cbtest_P_test.txt", {"class": "P"}, "unknown key config.task.class .did you mean"),
    ],
)
def test_mistakes(path, config, message, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("of something else")
    (tmp_path / "cbtest_P_test.txt").write_text(book())
    with pytest.raises(UserError, match=message):
        _ = made(str(tmp_path / path), **config).scored


def test_the_hub_is_the_default(monkeypatch):
    asked = []
    monkeypatch.setattr(cbt.source, "table", lambda spec, where: asked.append(spec) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ = cbt.scoring({"classes": ("P",)}, None).scored
    (spec,) = asked
    assert (spec["source"], spec["path"], spec["name"], spec["split"]) == (
        "hub",
        "cam-cst/cbt",
        "P",
        "test",
    )


def test_real_examples(data_folder):
    task = made(str(data_folder / "cbt" / "*.txt"))
    questions = task.scored.questions
    assert len(questions) == 12 and {len(q.endings) for q in questions} == {10}
    assert all(q.endings[q.answer].count("XXXXX") == 0 for q in questions)
    assert questions[3].group == "NE" and questions[3].context.startswith("But , son , I am angry")
    assert "the men of the regular Keddah ," in questions[3].endings[questions[3].answer]
