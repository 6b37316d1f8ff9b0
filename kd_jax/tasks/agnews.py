"""AG News (Zhang et al. 2015): news in four classes, from title and description.

config.task: name, seq_len. config.data as in data/splits.py. Sources that are left out are the
hub's fancyzhang/ag_news. With source="files", the original .csv (no header; class 1 to 4, title,
description), a folder that holds train.csv and test.csv, or a .tsv of `text TAB class name`; a
classes.txt in their folder must name the same classes.
"""

from pathlib import Path

from kd_jax.data import files, source
from kd_jax.data.source import Table
from kd_jax.errors import UserError
from kd_jax.ranges import Whole
from kd_jax.tasks.classification import ClassificationTask, Texts, classes, shipped_file
from kd_jax.tasks.task import local

DEFAULTS = dict(name="agnews", seq_len=Whole(least=8, default=128))
HUB = dict(source="hub", path="fancyzhang/ag_news")


class AGNews(ClassificationTask):
    """AG News; title and description are joined by a space into one text, as on the hub."""

    labels = ("World", "Sports", "Business", "Sci/Tech")
    metrics = ("accuracy", "macro_f1")
    primary = "accuracy"
    defaults, own_data = DEFAULTS, HUB

    @classmethod
    def smoke(cls, task, data, samples):
        return dict(seq_len=16), local(*[samples / "ag_news"] * 2)

    def _read(self, key):
        where, spec = self._spec(key)
        by_name = {name: row for row, name in enumerate(self.labels)}
        path = shipped_file(spec, where, key, ".csv", ".tsv")
        if path is None:
            found = source.table(spec, where)
            label, parts = "label", ["text"]
            known = {str(row): row for row in range(4)} | by_name
        else:
            self._check_classes(path.parent / "classes.txt")
            original = path.suffix == ".csv"
            label, parts = "class", ["title", "description"] if original else ["text"]
            known = {str(row + 1): row for row in range(4)} if original else by_name
            header = [label, *parts] if original else [*parts, label]
            found = Table.of_records(str(path), files.records(path, header=header))
        labels_N = classes(found.column(label, "config.data"), known, found.place)
        columns = [found.texts(name, "config.data") for name in parts]
        texts = [" ".join(row) for row in zip(*columns, strict=True)]
        return Texts(found.name, texts, None, labels_N, found.place, found.commit).checked()

    def _check_classes(self, file: Path) -> None:
        if file.is_file():
            names = tuple(filter(None, map(str.strip, files.lines(file))))
            if names != self.labels:
                raise UserError(
                    f"{file} names {', '.join(names)}; AG News has {', '.join(self.labels)}: use "
                    f"config.task.name='labelled_text' for other classes"
                )


make = AGNews
