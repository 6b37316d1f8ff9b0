"""The Children's Book Test (Hill et al. 2016, arXiv:1511.02301): twenty sentences of a book, a
21st in which a word is missing, and ten words to choose from.

Two layouts are read: the original .txt, 21 numbered lines an example with a blank line behind them
(the last one is `query TAB answer TAB TAB word|word|...`), and the hub's table with the columns
sentences, question, answer, options.
"""

from collections.abc import Iterator
from pathlib import Path

from kd_jax.data import files
from kd_jax.data.choices import Question
from kd_jax.data.table import Table
from kd_jax.errors import UserError

CLASSES = ("CN", "NE", "P", "V")  # common nouns, named entities, prepositions, verbs
SENTENCES = 20  # before the query
BLANK = "XXXXX"  # stands in the query for the word


def of_file(path: Path, group: str) -> Iterator[tuple[str, Question]]:
    """(place, question) of each example of an original file. UserError names file and line."""
    lines: list[str] = []
    for number, line in enumerate(files.lines(path), 1):
        line = line.rstrip("\r\n")
        if line.strip():
            lines.append(line)
            _check_number(line, len(lines), f"{path}, line {number}")
            if len(lines) <= SENTENCES:
                continue
            place = f"{path}, line {number}"
            yield place, _of_lines(lines, group, place)
            lines = []
        elif lines:
            raise UserError(
                f"{path}, line {number}: an example ends after {len(lines)} lines; it has "
                f"{SENTENCES + 1}, then a blank one"
            )
    if lines:
        raise UserError(
            f"{path}: the last example has {len(lines)} lines, not {SENTENCES + 1}; is the file "
            f"whole?"
        )


def of_table(table: Table, group: str) -> Iterator[tuple[str, Question]]:
    """(place, question) of each row in the hub's layout. UserError names the row."""
    names = ("sentences", "question", "answer", "options")
    columns = [table.column(name, "config.data to the Children's Book Test, not") for name in names]
    for row, (sentences, query, answer, words) in enumerate(zip(*columns, strict=True)):
        place = table.place(row)
        for name, texts in (("sentences", sentences), ("options", words)):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{place}: {name} is {texts!r}, not a list of texts")
        for name, text in (("question", query), ("answer", answer)):
            if not isinstance(text, str):
                raise UserError(f"{place}: {name} is {text!r}, not text")
        if len(sentences) != SENTENCES:
            raise UserError(f"{place}: {len(sentences)} sentences, not {SENTENCES}")
        yield place, _question(sentences, query, answer, words, group, place)


def _check_number(line: str, wanted: int, place: str) -> None:
    number, space, _ = line.partition(" ")
    if number != str(wanted) or not space:
        raise UserError(
            f"{place}: it should begin with {wanted!r} and a space, as line {wanted} of the "
            f"{SENTENCES + 1} of an example, not with {line[:20]!r}"
        )


def _of_lines(lines: list[str], group: str, place: str) -> Question:
    sentences = [line.partition(" ")[2] for line in lines]
    fields = sentences.pop().split("\t")
    if len(fields) != 4:
        raise UserError(
            f"{place}: {len(fields)} fields; there must be query, answer, nothing, and the words "
            f"to choose from, with tabs between them"
        )
    query, answer, _, words = fields
    return _question(sentences, query, answer, words.split("|"), group, place)


def _question(sentences, query, answer, words, group, place) -> Question:
    if BLANK not in query:
        raise UserError(f"{place}: no {BLANK} in the query {query!r}")
    if answer not in words:
        raise UserError(f"{place}: the answer {answer!r} is not among {', '.join(words)}")
    endings = tuple(query.replace(BLANK, word).strip() for word in words)
    return Question(" ".join(sentences), endings, words.index(answer), group)
