"""HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which of four endings goes on from a context.

Texts are cleaned up, joined, tokenized and scored as by the task `hellaswag` of EleutherAI's
lm-evaluation-harness (version 0.4): the context is "activity: ctx_a ctx_b" with ctx_b capitalised,
"acc" takes the likeliest ending, "acc_norm" the one of the highest log-likelihood a character.

config.task:
    name     "hellaswag"
    seq_len  positions of the model that are used; None: all of them
config.data as in tasks/likelihood.py: the original .jsonl, or a table of these columns, such as the
hub's Rowan/hellaswag (the default, its split validation). A label may be text; if it is empty, as
in the test split, there are likelihoods but no accuracies.
"""

import re
from collections.abc import Iterator
from typing import Any

from kd_jax.data import continuations, source
from kd_jax.data.continuations import Question
from kd_jax.data.source import Table
from kd_jax.data.splits import Questions
from kd_jax.errors import UserError
from kd_jax.tasks.likelihood import POSITIONS, MultipleChoice

DEFAULTS = dict(name="hellaswag", seq_len=POSITIONS)
HUB = dict(source="hub", path="Rowan/hellaswag", split="validation")

_BRACKETS = re.compile(r"\[.*?\]")  # marks that WikiHow's part has kept


def cleaned(text: str) -> str:
    """Removes WikiHow's markup: " [title]" becomes the end of a sentence, other brackets vanish."""
    text = text.strip().replace(" [title]", ". ")
    return _BRACKETS.sub("", text).replace("  ", " ")


class HellaSwag(MultipleChoice):
    defaults, by_character = DEFAULTS, True

    def _read(self) -> Questions:
        found = source.table(self.data["test"] or HUB, "data.test")
        return continuations.questions(found.name, _questions(found), found.commit)


def _questions(found: Table) -> Iterator[tuple[str, Question]]:
    key = "config.data to HellaSwag, not"
    activities, firsts, seconds = (
        found.texts(name, key) for name in ("activity_label", "ctx_a", "ctx_b")
    )
    lists = found.lists("endings", key)
    labels = found.columns.get("label", [None] * len(found))  # the original test file has none
    rows = zip(activities, firsts, seconds, lists, labels, strict=True)
    for row, (activity, first, second, endings, label) in enumerate(rows):
        place = found.place(row)
        context = cleaned(f"{activity}: {first} {second.capitalize()}")
        yield place, Question(context, tuple(map(cleaned, endings)), _label(label, place))


def _label(value: Any, place: str) -> int | None:
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, bool | float):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise UserError(f"{place}: the label is {value!r}, not the number of an ending")


scoring = HellaSwag
