"""Downloads models from the Hugging Face hub, with one time-out and clear error messages."""

import dataclasses
import functools
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import errors

from kd_jax.errors import UserError, line

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that the hub has for its first answer: with the start of the program less than ten.
ANSWER_WITHIN = 5.0

# Config, tokenizer, indices, and the card, which states licence and language.
_TEXT = ["*.json", "*.txt", "*.model", "*.jinja", "README.md"]
_SAFETENSORS = ["model*.safetensors"]
_TORCH = ["pytorch_model*.bin"]
# Layers behind the base model of an embedder (kd_jax/models/embedder.py), in folders of their own.
_LAYERS = [f"[0-9]_*/{name}" for name in ("model.safetensors", "pytorch_model.bin")]

# Answers of the hub itself, "it" being what was asked for, the special ones first: with any other
# error the cache may still do.
_REFUSALS = {
    errors.GatedRepoError: "it is gated: accept its licence on the hub with the account of "
    "HF_TOKEN",
    errors.RepositoryNotFoundError: "it is unknown to the hub, or private (then HF_TOKEN has to be "
    "set)",
    errors.RevisionNotFoundError: "it has no revision {revision!r} on the hub",
    errors.HFValidationError: "it is neither a folder nor a hub id",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The folder of a checkpoint (config.json, weights, tokenizer files), with its hub commit."""

    path: Path
    commit: str | None


def resolve(
    model: str, revision: str | None = None, setting: str = "teacher.model / student.model"
) -> Source:
    """Finds the folder of `model`: a local folder, or the cached copy of a hub id.

    `setting`: the key of the config, or the flag, that names the model.

    Raises UserError for a revision of a folder and, within 10 seconds, if the hub has no such id or
    revision, requires accepting a licence, or cannot be reached and the cache has no copy, or one
    that may be out of date.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{model}: no config.json; give the folder of an HF checkpoint")
        if revision not in (None, "main"):
            raise UserError(f"{model}: a folder has no revision {revision!r}; leave it out")
        return Source(folder, None)
    if folder.is_file():
        raise UserError(f"{model} is a file; give the folder of the whole checkpoint")
    if model.startswith((".", "~", "/")) or model.count("/") > 1:
        raise UserError(f"{model}: no such folder")
    try:
        return _download(model, revision)
    except UserError:
        raise
    except Exception as error:  # the client's errors of transport have no base class of its own
        cached = "" if isinstance(error, tuple(_REFUSALS)) else "it is not in the local cache, and "
        reason = cached + why_not(error, revision)
    smoke = "" if setting.startswith("--") else ", or try the config with `:smoke`"
    raise UserError(
        f"model {model!r}: {reason}. Check the id and HF_TOKEN, or set {setting} to "
        f"a local folder{smoke}"
    ) from None


def ask(call: Callable[[], T]) -> T:
    """Calls a function of the hub's client and returns its value; TimeoutError after ANSWER_WITHIN
    seconds. HTTP's time-out does not cover a hanging name server, so the call runs in a thread,
    which is then abandoned."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = call()
        except Exception as error:
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(ANSWER_WITHIN)
    if "error" in result:
        raise result["error"]
    if "value" not in result:
        raise TimeoutError(f"no answer in {ANSWER_WITHIN:.0f} s")
    return result["value"]


def why_not(error: Exception, revision: str | None) -> str:
    """Explains an error of the hub's client; "it" stands for the requested repository."""
    for kind, reason in _REFUSALS.items():
        if isinstance(error, kind):
            return reason.format(revision=revision)
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids the hub; unset it"
    if isinstance(error, errors.HfHubHTTPError):
        return f"the hub answers: {line(error)}"
    return f"the hub cannot be reached ({line(error)[:200]})"


@functools.cache
def _download(model: str, revision: str | None) -> Source:
    """Downloads a model's files, or takes the cached ones if the hub cannot be reached. Asks only
    once a process, so that a run has one commit."""
    try:
        ask(lambda: huggingface_hub.HfApi().model_info(model, revision=revision))
    except tuple(_REFUSALS):
        raise
    except Exception as error:  # no network, a proxy, a broken server: the cache may still do
        try:
            folder = _snapshot(model, revision=revision, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            raise error from None
        _check_cached(model, revision, folder.name, error)
    else:
        # By the revision's name and not the commit just learnt: the cache remembers names that way.
        folder = _snapshot(model, revision=revision)
    return Source(folder, folder.name)  # the cache names its folders by commit


def _check_cached(model: str, revision: str | None, commit: str, error: Exception) -> None:
    """Warns that a cached commit is used without asking the hub. Raises UserError if `revision` is
    a name that may by now mean another commit on the hub."""
    if revision == commit:
        return
    reason = why_not(error, revision)
    if isinstance(error, errors.OfflineModeIsEnabled):
        reason = "HF_HUB_OFFLINE is set"
    elif revision not in (None, "main"):
        raise UserError(
            f"model {model!r}: {reason}, and revision {revision!r} need not be commit {commit} of "
            f"the local cache any more: try again, set the revision to that commit, or set "
            f"HF_HUB_OFFLINE=1 to take what is cached"
        )
    log.warning("model %s: %s; taking commit %s of the local cache", model, reason, commit)


def _snapshot(model: str, **options) -> Path:
    """Downloads the files of a model that kd_jax reads; pickled weights only without others."""
    for weights in (_SAFETENSORS, _TORCH):
        patterns = dict(allow_patterns=_TEXT + weights + _LAYERS, ignore_patterns=["[!0-9]*/*"])
        folder = Path(huggingface_hub.snapshot_download(model, **patterns, **options))
        if any(folder.glob(weights[0])):
            break
    return folder
