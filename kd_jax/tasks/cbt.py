"""The Children's Book Test (Hill et al. 2016, arXiv:1511.02301): which of ten words is missing from
the sentence after twenty others.

The context is the twenty sentences, joined by spaces. The whole query line is scored with each of
the ten words in place of XXXXX; the likeliest line is the prediction, without normalizing by
length. A context that does not fit is cut on the left, the query never: a question whose query is
longer than the model's context is left out, and counted.

config.task:
    name     "cbt"
    classes  which of the word classes CN (common nouns), NE (named entities), P (prepositions) and
             V (verbs); of several, there are figures for each and for all together
    seq_len  positions of the model that are used; None: all of them
config.data as in tasks/likelihood.py: original .txt files (a file, a glob or a list of them; or a
folder, of which those of the classes' test splits are taken, as their names say), or tables in the
hub's layout. The default is the hub's cam-cst/cbt, its split test.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from kd_jax.data import continuations, files, source
from kd_jax.data.continuations import Question
from kd_jax.data.source import Table
from kd_jax.data.splits import Questions
from kd_jax.errors import UserError
from kd_jax.ranges import settings
from kd_jax.tasks.likelihood import POSITIONS, MultipleChoice

CLASSES = ("CN", "NE", "P", "V")  # common nouns, named entities, prepositions, verbs
SENTENCES = 20  # before the query
BLANK = "XXXXX"  # placeholder of the missing word in the query

DEFAULTS = dict(name="cbt", classes=CLASSES, seq_len=POSITIONS)
HUB = dict(source="hub", path="cam-cst/cbt", split="test")
_TABLES = (".parquet", ".jsonl", ".json")


class ChildrensBookTest(MultipleChoice):
    defaults = DEFAULTS
    variant, variants = "classes", CLASSES

    def __init__(self, config, data) -> None:
        super().__init__(config, data)
        self.classes = tuple(self.config["classes"])
        unknown = [name for name in self.classes if name not in CLASSES]
        if unknown or not self.classes:
            have = ", ".join(CLASSES)
            raise UserError(f"config.task.classes={list(self.classes)!r}: have {have}")

    def _read(self) -> Questions:
        return continuations.together(
            [part for name in self.classes for part in self._of_class(name)]
        )

    def _of_class(self, name: str) -> list[Questions]:
        spec = settings(self.data["test"] or HUB, source.OF_TABLES, "data.test")
        if spec["source"] != "files":
            # The hub's configurations are the classes.
            return [_of_table(spec | {"name": spec["name"] or name}, name)]
        paths = [spec["path"]] if isinstance(spec["path"], str | Path) else list(spec["path"] or ())
        found = [file for path in paths for file in _files(str(path), name)]
        if not found:
            raise UserError(
                f"config.data.test.path={spec['path']!r}: no file of the Children's Book Test's "
                f"class {name}; its name has {name} in it, as in cbtest_{name}_test_2500ex.txt"
            )
        return [
            _of_table(spec | {"path": str(file)}, name)
            if file.suffix in _TABLES
            else continuations.questions(str(file), of_file(file, name))
            for file in found
        ]


def _files(path: str, name: str) -> list[Path]:
    """Finds the files of a word class: in a folder by class and "test" in their names; of a file or
    glob all but those named after another class."""
    found = files.find(path, "data.test", (".txt", *_TABLES))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return [file for file in found if {name, "test"} <= _words(file.relative_to(folder))]
    told = [_words(Path(file.parent.name) / file.name) & set(CLASSES) for file in found]
    return [file for file, names in zip(found, told, strict=True) if name in (names or {name})]


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^A-Za-z0-9]+", str(path)))


def _of_table(spec: dict, name: str) -> Questions:
    found = source.table(spec, "data.test")
    return continuations.questions(found.name, of_table(found, name), found.commit)


def of_file(path: Path, group: str) -> Iterator[tuple[str, Question]]:
    """Reads (place, question) of each example of an original file. UserError names file and
    line."""
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
    """Reads (place, question) of each row in the hub's layout. UserError names the row."""
    key = "config.data to the Children's Book Test, not"
    readers = table.lists, table.texts, table.texts, table.lists
    names = "sentences", "question", "answer", "options"
    columns = [read(name, key) for read, name in zip(readers, names, strict=True)]
    for row, (sentences, query, answer, words) in enumerate(zip(*columns, strict=True)):
        place = table.place(row)
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


scoring = ChildrensBookTest
