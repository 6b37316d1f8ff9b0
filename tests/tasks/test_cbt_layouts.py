import pytest

from kd_jax.data.source import Table
from kd_jax.errors import UserError
from kd_jax.tasks import cbt

QUERY = "The XXXXX ran .\tfox\t\tdog|fox|hen"


def lines(query=QUERY, count=20):
    return [f"{n} Sentence {n} ." for n in range(1, count + 1)] + [f"{count + 1} {query}"]


def read(tmp_path, *examples, end="\n"):
    file = tmp_path / "cbtest_NE_test.txt"
    file.write_text("\n\n".join("\n".join(example) for example in examples) + end)
    return list(cbt.of_file(file, "NE"))


def table(**changes):
    row = {
        "sentences": [f"Sentence {n} ." for n in range(1, 21)],
        "question": "The XXXXX ran .",
        "answer": "fox",
        "options": ["dog", "fox", "hen"],
    } | changes
    return Table("cbt", {key: [value] for key, value in row.items()}, lambda row: f"cbt, row {row}")


def test_both_layouts_say_the_same(tmp_path):
    for end in ("\n", "\n\n", ""):
        (first, question), (second, other) = read(tmp_path, lines(), lines(), end=end)
        assert question == other and question.group == "NE"
        assert first.endswith("test.txt, line 21") and second.endswith("line 43")
    assert question.context == " ".join(f"Sentence {n} ." for n in range(1, 21))
    assert question.endings == ("The dog ran .", "The fox ran .", "The hen ran .")
    assert question.answer == 1
    assert list(cbt.of_table(table(), "NE")) == [("cbt, row 0", question)]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (lines(count=19), "line 21: an example ends after 20 lines; it has 21"),
        (lines(count=21), "line 21: 1 fields; there must be query, answer, nothing"),
        (lines()[1:], "line 1: it should begin with 1 and a space, .*not with '2 Sentence 2 .'"),
        (lines()[:4] + lines()[5:], "line 5: it should begin with 5 and"),
        (lines("The fox ran .\tfox\t\tdog|fox"), "line 21: no XXXXX in the query 'The fox ran .'"),
        (
            lines("The XXXXX ran .\tcow\t\tdog|fox"),
            "line 21: the answer 'cow' is not among dog, fo",
        ),
        (lines("The XXXXX ran .\tfox"), "line 21: 2 fields; there must be"),
    ],
)
def test_mistakes_name_the_line(example, message, tmp_path):
    with pytest.raises(UserError, match=rf"cbtest_NE_test.txt, {message}"):
        read(tmp_path, example, lines())


def test_a_file_that_breaks_off(tmp_path):
    with pytest.raises(UserError, match="test.txt: the last example has 7 lines, not 21"):
        read(tmp_path, lines(), lines()[:7])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sentences": ["a"] * 19}, "row 0: 19 sentences, not 20"),
        ({"sentences": "a b"}, "row 0: sentences is 'a b', not a list of texts"),
        ({"options": ["fox", None]}, r"row 0: options is \['fox', None\], not a list"),
        ({"question": None}, "row 0: 'question' holds None, not text"),
        ({"question": "It ran ."}, "row 0: no XXXXX in the query"),
        ({"answer": "cow"}, "row 0: the answer 'cow' is not among dog, fox, hen"),
    ],
)
def test_mistakes_name_the_row(changes, message):
    with pytest.raises(UserError, match=message):
        list(cbt.of_table(table(**changes), "NE"))


def test_a_column_is_missing():
    wrong = Table("news", {"text": ["a"]}, str)
    with pytest.raises(UserError, match="news has no column 'sentences'.*Children's Book Test"):
        list(cbt.of_table(wrong, "NE"))
