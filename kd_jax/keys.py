"""Keys of a config on the command line: sets those that the config file lacks, prints them all.

kd-jax keys                # every section
kd-jax keys optim          # one of them
"""

import ast
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_jax import config, plugins
from kd_jax.errors import UserError
from kd_jax.objectives.objective import term_keys
from kd_jax.ranges import Real, settings

# Sections that are open: what reads them knows their keys. Terms say which theirs are.
_TERMS = ("objective", "intermediate")
_OPEN = {"stages", "task", "data", "teachers", "architecture", "schedule", *_TERMS}

_TITLE = """# Keys of a config

`kd-jax keys > docs/config.md` writes this page, `kd-jax keys optim` prints one section. Each key
with its default, its range and its meaning; recipes have the sections that they read, and some
defaults of their own (`kd_jax/config.py`). `--config.optim.learning_rate=1e-4` sets one, also where
the config file has no such key yet: `--config.objective.hidden.weight=1`."""


def taken(found: ConfigDict, argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Takes --config.KEY=VALUE out of the arguments where the config lacks the key although it is
    legal, and where its value is a list.

    Returns the arguments that are left, and the values by dotted key.
    """
    left, values, rest = [], {}, iter(argv)
    for argument in rest:
        given = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        there = _there(found, given[1]) if given else False
        if there is False:
            left.append(argument)
            continue
        value = value_of(next(rest, "") if given[2] is None else given[2])
        if isinstance(there, tuple | list):  # may be given one by one
            value = tuple(value) if isinstance(value, tuple | list) else (value,)
            value = (*values.get(given[1], ()), *value)
        values[given[1]] = value
    return left, values


def put(found: ConfigDict, values: Mapping[str, Any]) -> None:
    """Sets dotted keys of a config, and makes the sections that they are in."""
    with found.unlocked():
        for key, value in values.items():
            *path, last = key.split(".")
            section = found
            for above, part in zip(["", *path], path, strict=False):
                if part not in section:
                    section[part] = config.teacher("") if above == "teachers" else ConfigDict()
                section = section[part]
            section[last] = value


def value_of(text: str) -> Any:
    """Reads a number, true or false, a list of them between commas, or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "," in text:
        return [value_of(each.strip()) for each in text.strip("[]()").split(",")]
    return text


def of_term(path: Sequence[str]) -> list[str]:
    """The keys of a term of an objective, where `path` is that of one; otherwise none."""
    if len(path) != 2 or path[0] not in _TERMS:
        return []
    return term_keys(plugins.load("objectives", path[1], "make").make)


def _there(found: Any, key: str) -> Any:
    """What `taken` takes: a list, None for a legal key that is not there; False for others."""
    path = key.split(".")
    for depth, part in enumerate(path):
        if not hasattr(found, "items"):
            return False
        if part not in found:
            above = path[:depth]
            closed = [] if "term" in found else of_term(above)
            legal = _OPEN & set(above) and (not closed or part in closed)
            return None if legal else False
        found = found[part]
    return found if isinstance(found, tuple | list) else False


def page(section: str | None = None) -> str:
    """Writes the keys of a section, or of all, with defaults, ranges and meanings, in Markdown.

    Raises UserError where there is no such section.
    """
    tables = {"config": config.RUN | config.MORE, **config.SECTIONS, "stages.NAME": config.STAGE}
    if section is not None and section not in tables:
        raise UserError(f"no section {section!r}; have {', '.join(tables)}")
    parts = [_TITLE] if section is None else []
    for name in tables if section is None else [section]:
        rows = "\n".join(_row(key, *each) for key, each in tables[name].items())
        parts.append(f"## {name}\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def _row(key: str, default: Any, meaning: str) -> str:
    value = settings(None, {key: default}, "")[key]
    within = f" ({default})" if isinstance(default, Real) and str(default) else ""
    shown = '""' if value == "" else value
    return f"- `{key}` = `{shown}`{within}: {meaning}"


def main() -> None:
    """Prints the keys of all sections, or of the one that the first argument names."""
    try:
        help_wanted = sys.argv[1:2] in (["-h"], ["--help"])
        print(__doc__ if help_wanted else page(*sys.argv[1:2]), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
