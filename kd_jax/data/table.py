"""Tables: all columns of a split, from the same sources as text (data/source.py)."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from kd_jax.data import source
from kd_jax.errors import UserError

DEFAULTS = {key: value for key, value in source.DEFAULTS.items() if key != "text"}


def blank(text: str) -> bool:
    """Whether a text shows nothing: white space, control characters, zero-width ones."""
    return not any(char.isprintable() and not char.isspace() for char in text)


@dataclasses.dataclass(frozen=True)
class Table:
    """A split's columns, equally long."""

    name: str  # for messages and the run's manifest
    columns: dict[str, list]
    place: Callable[[int], str]  # where row i stands, for messages: "train.csv, row 7"
    commit: str | None = None  # of a hub repository

    @classmethod
    def of_records(cls, name: str, records: Iterable[tuple[str, dict]]) -> "Table":
        """From (place, row) pairs. Raises UserError where there are none, and where a row has
        other columns than the first one."""
        places, columns = [], {}
        for place, row in records:
            columns = columns if places else {column: [] for column in row}
            if row.keys() != columns.keys():
                raise UserError(
                    f"{place} has the columns {', '.join(row)}; before it they were: "
                    f"{', '.join(columns)}"
                )
            places.append(place)
            for column, value in row.items():
                columns[column].append(value)
        if not places:
            raise UserError(f"{name} holds no rows")
        return cls(name, columns, places.__getitem__)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def column(self, name: str, key: str) -> list:
        """A column's values. UserError lists the columns there are; `key` says what to set."""
        if name not in self.columns:
            raise UserError(
                f"{self.name} has no column {name!r}; set {key} to one of: "
                f"{', '.join(self.columns)}"
            )
        return self.columns[name]

    def texts(self, name: str, key: str) -> list[str]:
        """A column of text. UserError names the first row that holds none."""
        values = self.column(name, key)
        for row, value in enumerate(values):
            if not isinstance(value, str):
                raise UserError(f"{self.place(row)}: {name!r} holds {value!r}, not text")
        return values

    def lists(self, name: str, key: str) -> list[list[str]]:
        """A column of lists of text. UserError names the first row that holds none."""
        values = self.column(name, key)
        for row, texts in enumerate(values):
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise UserError(f"{self.place(row)}: {name} is {texts!r}, not a list of texts")
        return values


def read(config: Mapping, where: str) -> Table:
    """The table of `config`, which stands at config.<where>, such as "data.train".

    Raises UserError for whatever is wrong with the config or the source.
    """
    rows, spec = source.open_source(config, DEFAULTS, where, "rows")
    table = rows(spec, where)
    if not len(table):
        raise UserError(f"{table.name} (config.{where}) holds no rows")
    return table
