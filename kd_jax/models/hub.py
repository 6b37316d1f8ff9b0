"""Where a model comes from: a local folder, or the Hugging Face hub by id and revision."""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from kd_jax.errors import UserError

log = logging.getLogger(__name__)

# Seconds that the hub has for its first answer: with the start of the program less than ten.
ANSWER_WITHIN = 5.0

# Config, tokenizer, indices, and the card, which states licence and language.
_TEXT = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
_SAFETENSORS = ["model*.safetensors"]
_TORCH = ["pytorch_model*.bin"]


@dataclasses.dataclass(frozen=True)
class Source:
    """A folder with config.json, weights and tokenizer files; the hub's commit, if it is a copy."""

    path: Path
    commit: str | None


def resolve(
    model: str, revision: str | None = None, setting: str = "teacher.model / student.model"
) -> Source:
    """The folder of `model`: itself if it is one, else a cached copy of that hub id.

    `setting`: the key of the config, or the flag, that names the model.

    Raises UserError, within 10 seconds, where the hub has no such id or revision, wants a licence
    accepted, or cannot be reached while the cache has no copy, or one that need not be what
    `revision` names by now.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{model}: no config.json; give the folder of an HF checkpoint")
        return Source(folder, None)
    if model.startswith((".", "~", "/")) or model.count("/") > 1:
        raise UserError(f"{model}: no such folder")
    try:
        return _download(model, revision)
    except UserError:
        raise
    except GatedRepoError:
        reason = "is gated: accept its licence on the hub with the account of HF_TOKEN"
    except RepositoryNotFoundError:
        reason = "is unknown to the hub, or private (then HF_TOKEN has to be set)"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r} on the hub"
    except OfflineModeIsEnabled:
        reason = "is not in the local cache, and HF_HUB_OFFLINE forbids the hub; unset it"
    except HFValidationError:
        reason = "is neither a folder nor a hub id"
    except Exception as error:  # the client's errors of transport have no base class of its own
        reason = f"is not in the local cache, and the hub cannot be reached ({_short(error)})"
    smoke = "" if setting.startswith("--") else ", or try the config with `:smoke`"
    raise UserError(
        f"model {model!r} {reason}. Check the id and HF_TOKEN, or set {setting} to "
        f"a local folder{smoke}"
    ) from None


@functools.cache
def _download(model: str, revision: str | None) -> Source:
    """A copy of the hub's files; the cache's where the hub does not answer. Asked once a process,
    so that a run has one commit."""
    try:
        _within(ANSWER_WITHIN, lambda: HfApi().model_info(model, revision=revision))
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # no network, a proxy, a broken server: the cache may still do
        try:
            folder = _snapshot(model, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise error from None
        _check_cached(model, revision, folder.name, error)
    else:
        # By the revision's name and not the commit just learnt: the cache remembers names that way.
        folder = _snapshot(model, revision=revision)
    return Source(folder, folder.name)  # the cache names its folders by commit


def _check_cached(model: str, revision: str | None, commit: str, error: Exception) -> None:
    """Says that a cached commit is taken unseen. UserError where a name was asked for by which the
    hub may mean another commit by now."""
    if revision == commit:
        return
    if isinstance(error, OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    elif revision in (None, "main"):
        reason = f"the hub cannot be reached ({_short(error)})"
    else:
        raise UserError(
            f"model {model!r}: the hub cannot be reached ({_short(error)}), and revision "
            f"{revision!r} need not be commit {commit} of the local cache any more: try again, set "
            f"the revision to that commit, or set HF_HUB_OFFLINE=1 to take what is cached"
        )
    log.warning("model %s: %s; taking commit %s of the local cache", model, reason, commit)


def _snapshot(model: str, **options) -> Path:
    """The folder with the files that kd_jax reads; pickled weights only if there are no others."""
    for weights in (_SAFETENSORS, _TORCH):
        folder = Path(
            snapshot_download(
                model, allow_patterns=_TEXT + weights, ignore_patterns=["*/*"], **options
            )
        )
        if any(folder.glob(weights[0])):
            break
    return folder


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's value, or TimeoutError: a name server that hangs heeds no timeout of HTTP's."""
    result: dict[str, Any] = {}

    def run():
        try:
            result["value"] = call()
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in result:
        raise result["error"]
    if "value" not in result:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return result["value"]


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:120]
