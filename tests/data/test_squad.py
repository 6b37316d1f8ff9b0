import json

import pytest

from kd_jax.data import source, squad
from kd_jax.errors import UserError

CONTEXT = "Ann met Bob in Oslo."


def entry(key="q1", question="Who?", answers=((0, "Ann"),), **keys):
    found = [{"answer_start": start, "text": text} for start, text in answers]
    return {"id": key, "question": question, "answers": found, **keys}


def write(path, *entries, context=CONTEXT):
    paragraphs = [{"context": context, "qas": list(entries)}]
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))
    return path


def test_both_versions(tmp_path):
    both = entry(answers=((0, "Ann"), (8, "Bob")))
    found = squad.read(write(tmp_path / "a.json", both, entry("q2")))
    assert len(found) == 2 and not found.unanswerable
    assert found.questions[0] == squad.Question(
        "q1", "T", CONTEXT, "Who?", (squad.Answer(0, "Ann"), squad.Answer(8, "Bob"))
    )
    assert found.golds == {"q1": ["Ann", "Bob"], "q2": ["Ann"]}
    assert found.pairs == [("Who?", CONTEXT)] * 2
    possible = entry(is_impossible=False)
    none = entry("q2", answers=(), is_impossible=True)
    second = squad.read(write(tmp_path / "b.json", possible, none))
    assert second.unanswerable and second.golds == {"q1": ["Ann"], "q2": []}
    part = second.part([False, True], "part")
    assert part.golds == {"q2": []} and part.unanswerable
    assert len({found.digest, second.digest, part.digest}) == 3


def test_columns_like_the_hubs(tmp_path):
    rows = [
        {
            "id": "a",
            "title": "T",
            "context": CONTEXT,
            "question": "Who?",
            "answers": {"text": ["Bob"], "answer_start": [8]},
        },
        {
            "id": "b",
            "title": "T",
            "context": CONTEXT,
            "question": "Why?",
            "answers": {"text": [], "answer_start": []},
        },
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def read():
        return squad.of_table(source.table({"path": str(tmp_path / "a.jsonl")}, "data.train"))

    assert read().golds == {"a": ["Bob"], "b": []} and read().unanswerable
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    assert not read().unanswerable
    rows[0]["answers"]["answer_start"] = [9]
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(rows[0]))
    with pytest.raises(UserError, match="a.jsonl, line 2: the answer 'Bob' .* character 9 of"):
        read()
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "x"}')
    with pytest.raises(UserError, match="a.jsonl has no column 'title'; .*: id, text"):
        read()


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            [entry(answers=((1, "Ann"),))],
            "question 'q1': the answer 'Ann' .* character 1 of its con",
        ),
        ([entry(answers=((-3, "Ann"),))], "question 'q1': the answer 'Ann' .* character -3"),
        ([entry(answers=((0, ""),))], "question 'q1': the answer '' does not stand"),
        ([entry(answers=(("0", "Ann"),))], "question 'q1': the answer 'Ann' .* character '0'"),
        ([entry(), entry()], "the question id 'q1' is there twice"),
        ([entry(question=" ")], "question 'q1': the question is ' ', there must be text"),
        ([entry(answers=())], "question 'q1' has 0 answers, and is_impossible is False"),
        ([entry(is_impossible=True)], "question 'q1' has 1 answers, and is_impossible is True"),
        ([{"id": "q", "question": "x"}], "question 'q' has no 'answers'; have: id, question"),
        ([{"question": "x"}], "paragraph 1 has no 'id'; have: question"),
        ([7], "paragraph 1 has no 'id'; have: no JSON object"),
        ([], "holds no questions"),
    ],
)
def test_bad_questions_are_named(tmp_path, entries, message):
    with pytest.raises(UserError, match=f"a.json.*{message}"):
        squad.read(write(tmp_path / "a.json", *entries))


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="none.json does not exist"):
        squad.read(tmp_path / "none.json")
    for text, message in (
        ("[", "is not JSON"),
        ("[]", "has no 'data'; have: no JSON object"),
        ('{"version": 1}', "has no 'data'; have: version"),
        ('{"data": [{"title": "T"}]}', "article 'T' has no 'paragraphs'"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UserError, match=f"a.json.* {message}"):
            squad.read(tmp_path / "a.json")
    with pytest.raises(UserError, match="paragraph 1: |the context is ''"):
        squad.read(write(tmp_path / "a.json", entry(), context=""))


@pytest.mark.parametrize("context", ["\u200b\u00ad", "\x02 \t"])
def test_a_context_that_shows_nothing_is_empty(tmp_path, context):
    file = write(tmp_path / "a.json", entry(answers=(), is_impossible=True), context=context)
    with pytest.raises(UserError, match="a.json, question 'q1': the context is .* must be text"):
        squad.read(file)


def test_json_is_read_as_strictly_as_elsewhere(tmp_path):
    file = write(tmp_path / "a.json", entry(), context=CONTEXT + " \ud83d")
    with pytest.raises(UserError, match=r"a.json holds half of a character, \\ud83d, after "):
        squad.read(file)
    (tmp_path / "b.json").write_text('{"data": [], "data": []}')
    with pytest.raises(UserError, match="b.json: an object has the key 'data' twice"):
        squad.read(tmp_path / "b.json")
