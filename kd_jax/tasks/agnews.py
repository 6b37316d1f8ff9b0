"""AG News (Zhang et al. 2015): news in four classes, from title and description.

config.task: name, seq_len. config.data as in data/splits.py. Sources that are left out are the
hub's fancyzhang/ag_news. With source="files", the original .csv (no header; class 1 to 4, title,
description), a folder that holds train.csv and test.csv, or a .tsv of `text TAB class name`; a
classes.txt beside them must name the same classes.
"""

import csv
from pathlib import Path

from kd_jax.data import files, source
from kd_jax.errors import UserError
from kd_jax.ranges import Whole, settings
from kd_jax.tasks.classification import ClassificationTask, Texts, classes, shipped_file

DEFAULTS = dict(name="agnews", seq_len=Whole(least=8, default=128))
HUB = dict(source="hub", path="fancyzhang/ag_news")


class AGNews(ClassificationTask):
    """Title and description are one text, with a space between them, as on the hub."""

    labels = ("World", "Sports", "Business", "Sci/Tech")
    metrics = ("accuracy", "macro_f1")
    primary = "accuracy"
    defaults, hub = DEFAULTS, HUB

    def _read(self, key):
        where = f"data.{key}"
        spec = settings(self.data[key], source.OF_TABLES, where)
        path = shipped_file(spec, where, key, ".csv", ".tsv")
        if path is not None:
            return self._original(path)
        found = source.table(spec, where)
        known = {str(row): row for row in range(4)} | self._known
        labels_N = classes(found.column("label", "config.data"), known, found.place)
        texts = found.texts("text", "config.data")
        return Texts(found.name, texts, None, labels_N, found.place, found.commit).checked()

    @property
    def _known(self):
        return {name: row for row, name in enumerate(self.labels)}

    def _original(self, path: Path) -> Texts:
        self._check_classes(path.parent / "classes.txt")
        if path.suffix == ".csv":
            layout, known = "class, title, description", {str(row + 1): row for row in range(4)}
            fields, label = 3, 0
            try:
                rows = list(csv.reader(files.lines(path), strict=True))
            except csv.Error as error:
                raise UserError(f"{path}: {error}") from None
        else:
            layout, known = "text TAB class name", self._known
            rows = [line.rstrip("\r\n").split("\t") for line in files.lines(path)]
            fields, label = 2, 1

        def place(row: int) -> str:
            return f"{path}, row {row + 1}"

        for number, row in enumerate(rows):
            if len(row) != fields:
                raise UserError(f"{place(number)}: {len(row)} fields instead of {layout}")
        labels_N = classes([row[label] for row in rows], known, place)
        texts = [" ".join(row[:label] + row[label + 1 :]) for row in rows]
        return Texts(str(path), texts, None, labels_N, place).checked()

    def _check_classes(self, file: Path) -> None:
        if file.is_file():
            names = tuple(filter(None, map(str.strip, files.lines(file))))
            if names != self.labels:
                raise UserError(
                    f"{file} names {', '.join(names)}; AG News has {', '.join(self.labels)}: use "
                    f"config.task.name='labelled_text' for other classes"
                )


make = AGNews
