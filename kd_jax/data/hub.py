"""Reads datasets of the Hugging Face hub by name, and local folders in the hub's layout."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from kd_jax import hub
from kd_jax.data import identity
from kd_jax.data.source import Documents, Records, check_text, from_rows, needed
from kd_jax.errors import UserError, line

log = logging.getLogger(__name__)


def documents(spec: dict, where: str) -> Documents:
    """Opens documents, one for each row of the column `spec["text"]`; WikiText's rows become
    articles.

    The revision's commit is looked up first and pinned. Raises UserError, within
    10 seconds where the hub cannot be reached, for an unknown or gated id, an unknown revision,
    configuration, split or column, and for a repository that needs a script.
    """
    table, name, commit = _load(spec, where)
    column, texts = spec["text"], ("string", "large_string")
    columns = {each: feature.dtype in texts for each, feature in table.features.items()}
    check_text(f"dataset {spec['path']!r}", columns, column, where)

    def read() -> Iterator[str]:
        batches = table.select_columns(column).iter(batch_size=1024)
        return from_rows(text or "" for batch in batches for text in batch[column])

    return Documents(name, read, commit, lambda: _stamp(table, commit))


def rows(spec: dict, where: str) -> Records:
    """Opens the rows of a split, with `spec["columns"]` alone if these are given and there; classes
    are read as numbers, a missing class (-1 on the hub) as None. Raises UserError like `documents`.
    """
    table, name, commit = _load(spec, where)
    table = table.select_columns(needed(table.column_names, spec.get("columns", ())))
    of_classes = [name for name, feature in table.features.items() if hasattr(feature, "names")]

    def read() -> Iterator[tuple[str, dict]]:
        number = 0
        for batch in table.iter(batch_size=1024):
            for column in of_classes:
                batch[column] = [None if value == -1 else value for value in batch[column]]
            for values in zip(*batch.values(), strict=True):
                yield f"{name}, row {number}", dict(zip(batch, values, strict=True))
                number += 1

    return Records(name, read, commit, lambda: _stamp(table, commit))


def _stamp(table: Any, commit: str | None) -> identity.Stamp | None:
    files = [each["filename"] for each in table.cache_files]
    return (commit,) if commit else identity.of_files(files) or None


def _load(spec, where):
    """Loads a split: returns (the split, its name, the pinned commit)."""
    path = spec["path"]
    commit = None if os.path.isdir(path) else _commit(path, spec["revision"], where)
    import datasets  # takes a second

    try:
        table = datasets.load_dataset(
            path, spec["name"], split=spec["split"], revision=commit or spec["revision"]
        )
    except (ValueError, RuntimeError) as error:  # the messages list what there is
        raise UserError(
            f"dataset {path!r} with config.{where}.name={spec['name']!r} and "
            f"config.{where}.split={spec['split']!r}: {line(error)}"
        ) from error
    except Exception as error:  # the hub's client and its transport have no common class
        raise _unreadable(path, where, line(error.__cause__ or error)) from error
    return table, ":".join(filter(None, (path, spec["name"], spec["split"]))), commit


def _commit(path: str, revision: str | None, where: str) -> str | None:
    """Looks up the commit of a hub dataset; None in offline mode, where only the cache is read."""
    try:
        return hub.ask(lambda: huggingface_hub.HfApi().dataset_info(path, revision=revision)).sha
    except errors.OfflineModeIsEnabled:
        asked = f"which need not be revision {revision!r}" if revision else "of whatever commit"
        log.warning("dataset %s: HF_HUB_OFFLINE is set; taking the cached copy, %s", path, asked)
        return None
    except Exception as error:  # the hub's client and its transport have no common class
        raise _unreadable(path, where, hub.why_not(error, revision)) from error


def _unreadable(path: str, where: str, reason: str) -> UserError:
    cached = "set HF_HUB_OFFLINE=1 for what is cached, or"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        cached = "unset HF_HUB_OFFLINE, or set"
    return UserError(
        f"dataset {path!r} (config.{where}.path): {reason}. Check it, config.{where}.revision and "
        f"HF_TOKEN. No network: {cached} config.{where}.source='files' and config.{where}.path to "
        f"local files, or put `:smoke` behind the config's name"
    )
