"""Sets keys of a config by --config.KEY=VALUE, and prints all keys.

kd-jax keys                # every section
kd-jax keys optim          # one of them
"""

import ast
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_jax import config
from kd_jax.errors import UserError
from kd_jax.ranges import Real, settings

Change = tuple[str, Any]  # dotted key, value or its text

# Sections that are open: what reads them knows their keys, and refuses others. `cache` may be new.
_OPEN = {"stages", "task", "data", "teachers", "architecture", "embedding", "schedule"}
_OPEN |= {"objective", "intermediate"}

_TYPES = {int: "a whole number", float: "a number", bool: "True or False"}

_TITLE = """# Keys of a config

`kd-jax keys > docs/config.md` writes this page, `kd-jax keys optim` prints one section. Each key
with its default, its range and its meaning; recipes have the sections that they read, and some
defaults of their own (`kd_jax/config.py`). `--config.optim.learning_rate=1e-4` sets one, also where
the config file has no such key yet: `--config.objective.hidden.weight=1`."""


def taken(argv: Sequence[str]) -> tuple[list[str], list[Change]]:
    """Splits arguments into (other arguments, keys to set by --config.KEY=VALUE or --config.KEY
    VALUE); a key without a value is set to true."""
    left, found, rest = [], [], list(argv)
    while rest:
        argument = rest.pop(0)
        given = re.fullmatch(r"--config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if not given:
            left.append(argument)
            continue
        value = given[2]
        if value is None:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        found.append((given[1], value))
    return left, found


def change(found: ConfigDict, changes: Iterable[Change]) -> None:
    """Sets keys of a config, also legal ones that it lacks; a list's key may be repeated.

    Raises UserError for an unknown key, with similar ones, and for a value of another type.
    """
    lists: dict[str, tuple] = {}
    with found.unlocked():
        for key, given in changes:
            *path, name = key.split(".")
            section = found
            for depth, part in enumerate(path):
                if not _legal(section, path[:depth], part):
                    raise UserError(_unknown(found, key))
                if part not in section:
                    section[part] = config.teacher("") if path[0] == "teachers" else ConfigDict()
                section = section[part]
            if not _legal(section, path, name):
                raise UserError(_unknown(found, key))
            value = _read(section, name, key, given)
            if isinstance(section.get(name), tuple | list):
                value = tuple(value) if isinstance(value, tuple | list) else (value,)
                value = lists[key] = (*lists.get(key, ()), *value)
            section[name] = value


def _legal(section: Any, path: Sequence[str], key: str) -> bool:
    """Tells whether the section at `path` has a key, or may have it."""
    may_come = _OPEN & set(path) or (*path, key)[0] == "cache"
    return isinstance(section, ConfigDict) and bool(key in section or may_come)


def _read(section: ConfigDict, name: str, key: str, given: Any) -> Any:
    """Converts the value of a key, or its text, to the type of the present value, if any."""
    kind = section.get_type(name) if name in section else object
    value = value_of(given) if isinstance(given, str) and kind is not str else given
    if issubclass(kind, ConfigDict):
        if isinstance(value, Mapping):  # the whole section anew
            return ConfigDict(value)
        raise UserError(f"--config.{key}={given}: a section; set its keys, one by one")
    whole = float if kind is float and type(value) is int else type(value)
    if kind in _TYPES and whole is not kind:
        raise UserError(f"--config.{key}={given} should be {_TYPES[kind]}")
    return value


def value_of(text: str) -> Any:
    """Converts a text to a number, true or false, a list (comma-separated), or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        pass
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "," in text:
        return [value_of(each.strip()) for each in text.strip("[]()").split(",")]
    return text


def like(key: str, names: Iterable[str]) -> list[str]:
    """Finds up to three dotted keys that are similar to `key`: with the same last name, or else a
    similar one."""
    ends: dict[str, list[str]] = {}
    for each in names:
        ends.setdefault(each.rpartition(".")[2], []).append(each)
    name = key.rpartition(".")[2]
    if name in ends:
        likeness = {each: difflib.SequenceMatcher(None, key, each).ratio() for each in ends[name]}
        return sorted(likeness, key=likeness.get, reverse=True)[:3]
    return [ends[end][0] for end in difflib.get_close_matches(name, ends, n=2)]


def _unknown(found: ConfigDict, key: str) -> str:
    """Makes the message for an unknown key, with similar keys and those of its section."""
    there = list(_dotted(found.to_dict()))
    close = [f"--config.{each}" for each in like(key, there)]
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    section = key
    while section and section not in there:
        section = section.rpartition(".")[0]
    have = found[section] if section else found
    have = ", ".join(have) if isinstance(have, ConfigDict) else ""
    where = f"config.{section}".rstrip(".")
    return f"config: no key {key!r}{hint}; {where} has {have or 'no keys'}"


def _dotted(section: Mapping, path: str = "") -> Iterator[str]:
    """Yields the dotted names of all sections and keys of a config: optim, optim.learning_rate."""
    for key, value in section.items():
        yield f"{path}{key}"
        if isinstance(value, dict):
            yield from _dotted(value, f"{path}{key}.")


def page(section: str | None = None) -> str:
    """Writes the keys of one section, or all, in Markdown, with defaults, ranges and meanings.

    Raises UserError if there is no such section.
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
    """Prints the keys of all sections, or of the section that the first argument names."""
    try:
        help_wanted = sys.argv[1:2] in (["-h"], ["--help"])
        print(__doc__ if help_wanted else page(*sys.argv[1:2]), end="")
    except UserError as error:
        sys.exit(f"error: {error}")
