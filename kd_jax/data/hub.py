"""Datasets of the Hugging Face hub by name, and local folders in the hub's layout."""

import logging
import os
import threading
from collections.abc import Iterator
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from kd_jax.data.documents import Documents, from_rows
from kd_jax.data.table import Table
from kd_jax.errors import UserError

log = logging.getLogger(__name__)

_PATIENCE = 9.0  # seconds until the hub counts as unreachable


def documents(spec: dict, where: str) -> Documents:
    """Rows of the column `spec["text"]`; WikiText's rows become articles.

    The commit that the revision stands for is found first and pinned. Raises UserError, within
    10 seconds where the hub cannot be reached, for an unknown or gated id, an unknown revision,
    configuration, split or column, and for a repository that needs a script.
    """
    table, name, commit = _load(spec, where)
    path, column = spec["path"], spec["text"]
    if column not in table.column_names:
        have = ", ".join(table.column_names)
        raise UserError(
            f"dataset {path!r} has no column {column!r}; set config.{where}.text to one of: {have}"
        )
    if table.features[column].dtype not in ("string", "large_string"):
        raise UserError(
            f"column {column!r} of dataset {path!r} holds {table.features[column]}, not text"
        )

    def read() -> Iterator[str]:
        batches = table.select_columns(column).iter(batch_size=1024)
        return from_rows(text or "" for batch in batches for text in batch[column])

    return Documents(name, read, commit)


def rows(spec: dict, where: str) -> Table:
    """All columns of the split, classes as their numbers, None where there is none (the hub's -1).
    Raises UserError like `documents`."""
    table, name, commit = _load(spec, where)
    columns = {column: list(table[column]) for column in table.column_names}
    for column, feature in table.features.items():
        if hasattr(feature, "names"):
            columns[column] = [None if value == -1 else value for value in columns[column]]
    return Table(name, columns, lambda row: f"{name}, row {row}", commit)


def _load(spec, where):
    """(the split, its name, the commit that is pinned)."""
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
            f"config.{where}.split={spec['split']!r}: {_line(error)}"
        ) from error
    except Exception as error:  # the hub's client and its transport have no common class
        raise _unreadable(path, where, _line(error.__cause__ or error)) from error
    return table, ":".join(filter(None, (path, spec["name"], spec["split"]))), commit


def _commit(path: str, revision: str | None, where: str) -> str | None:
    """The commit of a hub dataset; None in offline mode, where the cache must do."""
    try:
        info = _within(_PATIENCE, huggingface_hub.HfApi().dataset_info, path, revision=revision)
    except errors.OfflineModeIsEnabled:
        asked = f"which need not be revision {revision!r}" if revision else "of whatever commit"
        log.warning("dataset %s: HF_HUB_OFFLINE is set; taking the cached copy, %s", path, asked)
        return None
    except errors.RevisionNotFoundError as error:
        reason = f"it has no revision {revision!r} (config.{where}.revision)"
        raise _unreadable(path, where, reason) from error
    except errors.GatedRepoError as error:
        raise _unreadable(path, where, "it is gated") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise _unreadable(path, where, "the hub has no such public dataset") from error
    except errors.HfHubHTTPError as error:
        raise _unreadable(path, where, f"the hub answers: {_line(error)}") from error
    except Exception as error:  # the hub's client and its transport have no common class
        raise _unreadable(path, where, f"the hub cannot be reached: {_line(error)}") from error
    return info.sha


def _within(seconds: float, call, *args, **kwargs) -> Any:
    """The call's result. Its own timeout holds for each address of the host and not for looking
    the host up, so a thread gives the bound; it is left behind when it does not answer."""
    outcome = []

    def run() -> None:
        try:
            outcome.append((call(*args, **kwargs, timeout=seconds), None))
        except Exception as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    result, error = outcome[0] if outcome else (None, TimeoutError(f"no answer in {seconds:.0f} s"))
    if error is not None:
        raise error
    return result


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _unreadable(path: str, where: str, reason: str) -> UserError:
    cached = "set HF_HUB_OFFLINE=1 for what is cached, or"
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        cached = "unset HF_HUB_OFFLINE, or set"
    return UserError(
        f"dataset {path!r} (config.{where}.path): {reason}. Private or gated: set HF_TOKEN to a "
        f"token that may read it. No network: {cached} "
        f"config.{where}.source='files' and config.{where}.path to local files, or put `:smoke` "
        f"behind the config's name"
    )
