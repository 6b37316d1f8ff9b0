"""GLUE (Wang et al. 2018, arXiv:1804.07461): nine tasks on sentences and pairs of sentences.

config.task: name, seq_len, and `task`: cola, sst2, mrpc, stsb, qqp, mnli (its test split is the
matched one), mnli_mismatched, qnli, rte or wnli.

config.data as in data/splits.py. Sources that are left out are the hub's nyu-mll/glue: train,
and as test its validation split, since the labels of GLUE's own test split are secret. A file or
folder in GLUE's original layout is read too, source="files": a folder's train.tsv for train,
dev.tsv (dev_matched.tsv, dev_mismatched.tsv) for the rest, or <split>.tsv.

The metrics, and the one that selects checkpoints, are those of the papers' tables: Matthews'
correlation for CoLA, F1 for MRPC and QQP, Spearman's correlation for STS-B, else accuracy.
"""

import dataclasses
from pathlib import Path

from absl import logging

from kd_jax.data import files, source
from kd_jax.data.source import Table
from kd_jax.ranges import Choice, Whole
from kd_jax.tasks.classification import ClassificationTask, Texts, classes, numbers, shipped_file
from kd_jax.tasks.task import local

HUB = dict(source="hub", path="nyu-mll/glue")


@dataclasses.dataclass(frozen=True)
class _Task:
    """The columns of a GLUE task: on the hub and, if different, in the original files."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)  # the first one selects
    file_texts: tuple[str, ...] | None = None
    file_label: str = "label"
    named: bool = False  # whether files hold the names of the classes, not their numbers
    dev: str = "dev"
    hub_name: str | None = None
    hub_split: str = "validation"


_PAIR = ("sentence1", "sentence2")
_MNLI = _Task(
    ("premise", "hypothesis"),
    ("entailment", "neutral", "contradiction"),
    file_texts=_PAIR,
    file_label="gold_label",
    named=True,
    dev="dev_matched",
    hub_split="validation_matched",
)
TASKS = {
    "cola": _Task(
        ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")
    ),
    "sst2": _Task(("sentence",), ("negative", "positive")),
    "mrpc": _Task(
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("f1", "accuracy"),
        file_texts=("#1 String", "#2 String"),
        file_label="Quality",
    ),
    "stsb": _Task(_PAIR, ("score",), ("spearman", "pearson"), file_label="score"),
    "qqp": _Task(
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("f1", "accuracy"),
        file_label="is_duplicate",
    ),
    "mnli": _MNLI,
    "mnli_mismatched": dataclasses.replace(
        _MNLI, dev="dev_mismatched", hub_name="mnli", hub_split="validation_mismatched"
    ),
    "qnli": _Task(("question", "sentence"), ("entailment", "not_entailment"), named=True),
    "rte": _Task(_PAIR, ("entailment", "not_entailment"), named=True),
    "wnli": _Task(_PAIR, ("not_entailment", "entailment")),
}
DEFAULTS = dict(
    name="glue", task=Choice(*TASKS, default="sst2"), seq_len=Whole(least=8, default=128)
)


class Glue(ClassificationTask):
    """One of GLUE's tasks."""

    defaults, own_data = DEFAULTS, HUB
    variant, variants = "task", tuple(TASKS)

    def __init__(self, config, data, tokenizer) -> None:
        super().__init__(config, data, tokenizer)
        self.task = self.config["task"]
        self.layout = TASKS[self.task]
        self.labels = self.layout.labels
        self.metrics = self.layout.metrics
        self.primary = self.metrics[0]
        self.regression = self.task == "stsb"

    @classmethod
    def smoke(cls, task, data, samples):
        folders = {"stsb": "STS-B", "cola": "CoLA", "mrpc": "MRPC"}
        return dict(seq_len=16), local(*[samples / folders.get(task["task"], "SST-2")] * 2)

    @property
    def written(self):
        """Lists the classes as GLUE's server wants them: names if the files have names, else
        numbers."""
        if self.layout.named:
            return self.labels
        return tuple(map(str, range(len(self.labels))))

    def _read(self, key):
        where, spec = self._spec(key)
        path = shipped_file(spec, where, "train" if key == "train" else self.layout.dev, ".tsv")
        if path is not None:
            return self._texts(_original(path, self.task), original=True)
        if spec["source"] == "hub" and spec["path"] == HUB["path"] and spec["name"] is None:
            spec["name"] = self.layout.hub_name or self.task
        if spec["split"] is None:
            spec["split"] = "train" if key == "train" else self.layout.hub_split
        return self._texts(source.table(spec, where), original=False)

    def _texts(self, found: Table, original: bool) -> Texts:
        layout = self.layout
        columns = (original and layout.file_texts) or layout.texts
        label = layout.file_label if original else "label"
        key = "config.data to files whose columns are those of GLUE, not"
        texts = [found.texts(column, key) for column in columns]
        first, second = texts if len(texts) == 2 else (texts[0], None)
        values = found.columns.get(label)
        if original and "index" in found.columns and values is None:  # test.tsv
            labels_N = None
        elif not original and all(v in (None, -1) for v in found.column(label, key)):
            labels_N = None  # the hub's test split
        elif self.regression:
            labels_N = numbers(found.column(label, key), found.place, 0.0, 5.0)
        else:
            known = {name: row for row, name in enumerate(self.labels)}
            known |= {str(row): row for row in range(len(self.labels))}
            labels_N = classes(found.column(label, key), known, found.place)
        texts = Texts(found.name, first, second, labels_N, found.place, found.commit)
        return texts if self.task == "qqp" else texts.checked()  # a few of QQP's are empty


def _original(path: Path, task: str) -> Table:
    """Reads an original .tsv of GLUE: fields between tabs, no quoting, a header except in CoLA's
    labelled files. QQP's train.tsv has rows that break off at a line's end: these are left out."""
    headless = task == "cola" and next(files.lines(path), "").rstrip() != "index\tsentence"
    header = ("source", "label", "original", "sentence") if headless else ()
    broken: list[str] | None = [] if task == "qqp" else None
    found = Table.of_records(str(path), files.records(path, header=header, incomplete=broken))
    if broken:
        logging.warning("%s: %d broken rows are left out", path, len(broken))
    return found


make = Glue
