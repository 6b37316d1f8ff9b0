import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kd_jax.errors import UserError
from kd_jax.tasks import hellaswag
from kd_jax.tasks.hellaswag import cleaned
from tests.tasks.likelihood import swag, tokenizer


def made(tmp_path, *rows, name="val.jsonl"):
    file = tmp_path / name
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"test": {"source": "files", "path": str(file)}}
    return hellaswag.scoring({"name": "hellaswag"}, data)


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (" Go [title] Home [step] now ", "Go. Home now"),  # two spaces that brackets leave are one
        ("[header] How to go [title]Find a way", " How to go. Find a way"),
        ("a   b", "a  b"),  # in one pass, as the harness has it
        ("[title] Stay", " Stay"),
    ],
)
def test_texts_are_cleaned(raw, wanted):
    assert cleaned(raw) == wanted


def test_a_question(tmp_path):
    question = made(tmp_path, swag()).scored.questions[0]
    # "capitalised" lowers what follows, too.
    assert question.context == "Going home: A man saw the dog. The dog"
    assert question.endings == ("ran home.", "sat to bed.", "saw the hen.", "quickly sat again.")
    assert question.answer == 2
    how = made(tmp_path, swag(ctx_b="")).scored.questions[0]
    assert how.context == "Going home: A man saw the dog."


def test_the_hubs_layout_is_the_same(tmp_path):
    task = made(tmp_path, swag())
    hub = made(tmp_path, swag(label="2"), name="validation-00000.parquet")
    assert hub.scored.questions == task.scored.questions
    assert hub.manifest()["digest"] == task.manifest()["digest"]
    assert task.manifest() | {"name": ""} == {
        "name": "",
        "commit": None,
        "digest": task.scored.digest,
        "examples": 1,
    }


def test_figures(tmp_path):
    scored = made(tmp_path, swag(), swag(label=3), swag(label="")).encoded(tokenizer(), 64)
    assert len(scored.counts_N) == 12 and scored.chance == 0.25
    # By the endings' 9, 11, 12 and 18 characters, the last of the first four is the likeliest.
    values_N = np.array([-9.0, -10, -10, -12.5] * 3)
    assert {name: hits.tolist() for name, hits in scored.hits(values_N).items()} == {
        "acc": [False, False],
        "acc_norm": [False, True],
    }
    found = scored.figures(values_N)
    assert (found["acc"], found["acc_norm"]) == (0.0, 0.5)
    assert found["acc_norm_error"] == pytest.approx((0.25 / 2) ** 0.5)
    assert (found["questions"], found["endings"], found["truncated"]) == (3, 12, 0)
    records = list(scored.records(values_N))
    assert records[7] == {
        "question": 1,
        "ending": 3,
        "text": "quickly sat again.",
        "log_likelihood": -12.5,
        "tokens": int(scored.counts_N[7]),
        "answer": True,
        "group": "",
    }
    assert records[11]["answer"] is None


def test_a_test_set_without_labels(tmp_path):
    rows = [{key: value for key, value in swag().items() if key != "label"}]
    for task in (made(tmp_path, *rows), made(tmp_path, swag(label=""))):
        scored = task.encoded(tokenizer(), 64)
        assert scored.hits(np.zeros(4)) == {} and scored.chance is None
        assert "acc" not in scored.figures(np.zeros(4))


def test_endings_that_are_too_long_are_left_out(tmp_path):
    long = swag(endings=["ran home", "again and again " * 9, "sat", "saw"], label=0)
    scored = made(tmp_path, long, swag()).encoded(tokenizer(), 16)
    values_N = np.where(scored.rows.left_out_N, np.nan, -1.0)
    assert np.isnan(values_N).tolist() == [n == 1 for n in range(8)]
    found = scored.figures(values_N)
    assert (found["questions"], found["left_out"], found["endings"]) == (1, 1, 4)
    assert found["truncated"] == 7  # the context has 16 tokens or so itself
    assert list(scored.records(values_N))[1]["log_likelihood"] is None
    with pytest.raises(UserError, match="val.jsonl: each question has an ending of more than 16"):
        made(tmp_path, long).encoded(tokenizer(), 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"endings": ["one"]}, "line 2: 1 endings, there must be two or more"),
        ({"endings": "one"}, "line 2: endings is 'one', not a list of texts"),
        ({"endings": ["one", 2]}, r"line 2: endings is \['one', 2\], not a list of texts"),
        ({"label": 4}, "line 2: the label is 4; with 4 endings it must be one of 0 to 3"),
        ({"label": "-1"}, "line 2: the label is -1; with 4 endings"),
        ({"label": "two"}, "line 2: the label is 'two', not the number of an ending"),
        ({"label": 1.0}, "line 2: the label is 1.0, not the number"),
        ({"ctx_b": None}, "line 2: 'ctx_b' holds None, not text"),
    ],
)
def test_mistakes_name_file_and_row(changes, message, tmp_path):
    with pytest.raises(UserError, match=rf"val.jsonl, {message}"):
        _ = made(tmp_path, swag(), swag(**changes)).scored


def test_other_files(tmp_path):
    with pytest.raises(UserError, match="no column 'activity_label'; set config.data to HellaSwag"):
        _ = made(tmp_path, {"text": "a"}).scored
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(swag()) + "\n{'ind': 3}\n")
    task = hellaswag.scoring({}, {"test": {"source": "files", "path": str(broken)}})
    with pytest.raises(UserError, match="broken.jsonl, line 2"):
        _ = task.scored
    with pytest.raises(UserError, match="config.task.seq_len=0 must be at least 1"):
        hellaswag.scoring({"seq_len": 0}, None)


def test_the_hub_is_the_default(monkeypatch):
    asked = []
    monkeypatch.setattr(hellaswag.source, "table", lambda spec, where: asked.append(spec) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        _ = hellaswag.scoring({}, None).scored
    assert asked == [{"source": "hub", "path": "Rowan/hellaswag", "split": "validation"}]
