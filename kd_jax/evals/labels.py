"""Names that tell configurations apart."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MOST = 3  # differences in a label


def differences(configs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """What each configuration has that others have not: "kl.weight=0.3", the last two parts of a
    key with its value, or "objective.hidden", a section that others lack. Seeds do not count."""
    found = [*_walk({i: {**config, "seed": None} for i, config in enumerate(configs)}, "")]
    keys = {key for _, key, _ in found}
    short = {key: ".".join(key.split(".")[-2:]) for key in keys}
    if len(set(short.values())) < len(keys):
        short = {key: key for key in keys}
    labels: list[list[str]] = [[] for _ in configs]
    for number, key, value in found:
        shown = '""' if value == "" else value
        labels[number].append(key if isinstance(value, dict) else f"{short[key]}={shown}")
    return labels


def _walk(found: Mapping[int, Any], path: str) -> Iterator[tuple[int, str, Any]]:
    """(configuration, key, value) of every difference between those that are given."""
    values = list(found.values())
    if all(value == values[0] for value in values):
        return
    if not all(isinstance(value, dict) for value in values):
        yield from ((i, path, value) for i, value in found.items())
        return
    for key in sorted({key for value in values for key in value}):
        having = {i: value[key] for i, value in found.items() if key in value}
        inner, own = f"{path}.{key}" if path else key, list(having.values())
        if len(having) < len(found) and all(value == own[0] for value in own):
            yield from ((i, inner, value) for i, value in having.items())
        else:
            yield from _walk(having, inner)
