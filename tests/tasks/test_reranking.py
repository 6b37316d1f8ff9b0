"""Reranking by scores of pairs."""

import json

import numpy as np
import pytest

from kd_jax.tasks import command, reranking

ROWS = [
    {"query": f"q {i}", "positive": [f"p {i}"], "negative": [f"n {i}", f"m {i}"][: 1 + i % 2]}
    for i in range(10)
]


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, ROWS)))
    return {"train": {"path": str(file)}, "held_out": 0.2}


def test_a_row_is_a_query_with_one_of_its_documents(data):
    found = command.build("reranking", {}, data["train"]).examples("test")
    assert found.pairs[:5] == [
        ("q 0", "p 0"), ("q 0", "n 0"), ("q 1", "p 1"), ("q 1", "n 1"), ("q 1", "m 1")
    ]  # fmt: skip
    assert found.labels_N.tolist() == [1.0, 0.0, 1.0, 0.0, 0.0] * 5
    assert found.place(4).endswith("rows.jsonl, line 2")


def test_whole_queries_are_held_out(data):
    task = reranking.make({"name": "reranking"}, data, None)
    train, held = (set(task.examples(split).first) for split in ("train", "validation"))
    assert not train & held and len(train) + len(held) == 10 and len(held) == 2
    assert (task.head, task.regression, task.primary) == ("classification", True, "map")


def test_the_order_of_scores_is_scored(data):
    task = command.build("reranking", {}, data["train"])
    # The positive is the first of those with two documents, and the second of those with three.
    scores = np.array([3.0, 1.0, 2.0, 9.0, -1.0] * 5, np.float32)
    expected = {"map": pytest.approx(0.75), "mrr@10": pytest.approx(0.75)}
    assert task.score("test", list(scores[:, None])) == expected
    assert task.score_predictions("test", (7 * scores - 3).tolist()) == expected


def test_rows_of_the_same_query_stay_apart_in_any_order(tmp_path):
    found = []
    for order in ((0, 1, 2), (0, 2, 1)):
        rows = [dict(ROWS[i], query="q" if i < 2 else "r") for i in order]
        file = tmp_path / f"{order}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        task = command.build("reranking", {}, {"path": str(file)})
        scores = {"p 0": 1.0, "n 0": 2.0, "p 1": 9.0, "n 1": 8.0, "m 1": 7.0, "p 2": 1, "n 2": 0}
        found.append(
            task.score_predictions("test", [scores[x] for x in task.examples("test").second])
        )
    assert found[0] == found[1] == {"map": pytest.approx(5 / 6), "mrr@10": pytest.approx(5 / 6)}
