"""Sets for retrieval: BEIR's folders, the hub's, and SQuAD."""

import json

import pytest

from kd_jax.data import retrieval, source
from kd_jax.data.source import OF_TABLES, Records
from kd_jax.errors import UserError

CORPUS = [
    {"_id": "d1", "title": "Cats", "text": "purr"},
    {"_id": "d2", "title": "", "text": "Dogs bark"},
    {"_id": "d3", "text": "Fish swim", "metadata": {}},
]
QUERIES = [{"_id": key, "text": f"what {key}", "metadata": {}} for key in ("q1", "q2", "q3")]
QRELS = [("q3", "d2", 2), ("q1", "d1", 1), ("q1", "d3", 0)]


def write(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, split="test"):
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def read(path, key="test", **keys):
    return retrieval.read(OF_TABLES | {"path": str(path)} | keys, f"data.{key}")


def test_a_folder_of_beir(tmp_path):
    found = read(write(tmp_path / "set"))
    assert found.documents == {"d1": "Cats purr", "d2": "Dogs bark", "d3": "Fish swim"}
    assert found.queries == {"q1": "what q1", "q3": "what q3"}  # q2 is not judged
    assert found.grades == {"q3": {"d2": 2.0}, "q1": {"d1": 1.0, "d3": 0.0}}
    assert found.name.endswith("set/qrels/test.tsv") and found.commit is None
    write(tmp_path / "dev", split="dev")
    assert read(tmp_path / "dev", "validation").grades == found.grades
    assert read(tmp_path / "dev", split="dev").grades == found.grades
    assert read(tmp_path / "dev" / "qrels" / "dev.tsv").grades == found.grades


def test_what_is_missing_is_named(tmp_path):
    write(tmp_path / "dev", split="dev")
    with pytest.raises(
        UserError, match=r"test.tsv \(config.data.test\) does not .*one of: .*dev.t"
    ):
        read(tmp_path / "dev")
    (tmp_path / "dev" / "queries.jsonl").unlink()
    with pytest.raises(UserError, match="queries.jsonl .* does not exist: for retrieval a folder"):
        read(tmp_path / "dev", split="dev")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(corpus=[*CORPUS, CORPUS[0]]), "corpus.jsonl, line 4: the _id 'd1' is there twice"),
        (dict(corpus=[{"_id": "d1", "title": " ", "text": ""}]), "line 1: the text is empty"),
        (dict(corpus=[{"id": "d1", "text": "x"}]), "line 1 has no '_id'; have: id, text"),
        (dict(queries=[{"_id": "q1", "text": 3}]), "line 1 has no 'text'; .* must be text"),
        (dict(qrels=[("q9", "d1", 1)]), "test.tsv, row 2: there is no query with the _id 'q9'"),
        (dict(qrels=[("q1", "d9", 1)]), "test.tsv, row 2: there is no document with the _id 'd9'"),
        (dict(qrels=[("q1", "d1", "x")]), "test.tsv, row 2: the score 'x' is no finite number"),
        (dict(qrels=[("q1", "d1", "nan")]), "row 2: the score 'nan' is no finite number"),
        (
            dict(qrels=[("q1", "d1", 1), ("q1", "d2", 1), ("q1", "d1", 0)]),
            "test.tsv, row 4: query 'q1' and document 'd1' are there twice",
        ),
        (dict(qrels=[]), "test.tsv judges no documents"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path / "set", **changes))


def test_a_set_of_the_hub(monkeypatch):
    tables = {"corpus": CORPUS, "queries": QUERIES}
    names = ("query-id", "corpus-id", "score")
    qrels = [dict(zip(names, row, strict=True)) for row in QRELS]
    asked = []

    def records(spec, where, *columns):
        asked.append((spec["name"], spec["split"], columns[0]))
        rows = tables.get(spec["name"], qrels)
        return Records("some/set", lambda: ((f"row {i}", r) for i, r in enumerate(rows)), "c0ffee")

    monkeypatch.setattr(source, "records", records)
    found = read("some/set", source="hub")
    assert asked == [
        ("corpus",) * 2 + ("_id",),
        ("queries",) * 2 + ("_id",),
        (None, "test", names[0]),
    ]
    assert len(found.documents) == 3 and found.grades["q3"] == {"d2": 2.0}
    assert found.commit == "c0ffee"


def test_squad_is_a_set_of_paragraphs(tmp_path):
    def asked(key, context, text="red", **more):
        answers = [] if more else [{"text": text, "answer_start": context.index(text)}]
        return {"id": key, "question": f"what {key}?", "answers": answers, **more}

    contexts = ["It is red.", "All red.", "It is red."]
    articles = [
        {"title": "A", "paragraphs": [{"context": c, "qas": [asked(f"{i}", c)]}]}
        for i, c in enumerate(contexts)
    ]
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"data": articles}))
    found = read(file)
    assert list(found.documents.values()) == contexts[:2]  # equal paragraphs are one document
    texts = {key: [found.documents[d] for d in grades] for key, grades in found.grades.items()}
    assert texts == {str(i): [context] for i, context in enumerate(contexts)}
    for article in articles:
        article["paragraphs"][0]["qas"][0]["is_impossible"] = False
    articles[1]["paragraphs"][0]["qas"] = [asked("1", contexts[1], is_impossible=True)]
    file.write_text(json.dumps({"data": articles}))
    found = read(file)
    assert set(found.queries) == set(found.grades) == {"0", "2"} and len(found.documents) == 2
