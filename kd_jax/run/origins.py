"""Records the data, models and tokenizers of a run, by digest or commit, to detect changes.

Data and tokenizers are identified by their contents, models in local folders by their files; a file
with an unchanged size and time is not read again. For data files in the config, size and time are
kept as well, so that a finished run can be checked without reading them.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from kd_jax import storage
from kd_jax.errors import UserError
from kd_jax.run.run import Run


def of(run: Run, data: Mapping[str, Mapping], known: Mapping) -> dict:
    """Describes the data, models and tokenizers of a run before it starts or continues; `known`:
    the description from its first start."""
    models = dict(known.get("models", {}))
    if jax.process_index() == 0:  # reads the files for all
        files = {name: each for model in models.values() for name, each in model["files"].items()}
        given = {name: model for name, model in run.models.items() if model.folder is not None}
        models = {name: _model(model, files) for name, model in given.items()}
    return {
        "data": data,
        "files": {path: _stamp(Path(path)) for path in sorted(_named(run.config.data))},
        "models": models,
        "tokenizers": _tokenizers(run.tokenizers),
    }


def changed(folder: epath.Path, began: Mapping, now: Mapping) -> list[str]:
    """Names the data, models and tokenizers that changed since the run in `folder` began."""
    changed = []
    for split, then in began.get("data", {}).items():
        if now["data"].get(split, {}).get("digest") != then.get("digest"):
            changed.append(f"data.{split} ({then['name']})")
    for name, then in began.get("models", {}).items():
        changed += _differing(name, then, now["models"].get(name, {"files": {}}))
    for name, then in began.get("tokenizers", {}).items():
        if now["tokenizers"].get(name) != then:
            own = folder / "tokenizer"
            where = f" ({own}: remove it, and it is trained again)" if own.exists() else ""
            changed.append(f"the tokenizer of {name}{where}")
    return changed


def changed_since(folder: epath.Path) -> list[str]:
    """Lists the files of a finished run's data and models that changed since."""
    path = folder / "manifest.json"
    try:
        began = storage.read_json(path).get("of", {}) if path.exists() else {}
    except UserError:
        return [os.fspath(path)]
    models = [model["files"] for model in began.get("models", {}).values()]
    stamps = {
        name: stamp for files in (began.get("files", {}), *models) for name, stamp in files.items()
    }
    return [
        name
        for name, then in stamps.items()
        if Path(name).exists()
        and _stamp(Path(name)) != {key: then[key] for key in ("size", "time")}
    ]


def _differing(name: str, then: Mapping, now: Mapping) -> list[str]:
    if then["commit"] != now.get("commit"):
        return [f"{name} (commit {then['commit']} then, {now.get('commit')} now)"]
    files = sorted({*then["files"], *now["files"]})
    digests = [
        [each["files"].get(file, {}).get("digest") for file in files] for each in (then, now)
    ]
    return [f"{name} ({file})" for file, a, b in zip(files, *digests, strict=True) if a != b]


def _model(model: Any, known: dict[str, Mapping]) -> dict:
    """Describes a model; adds its files to those that are known."""
    files = {}
    for path in sorted(model.folder.iterdir()) if model.commit is None else ():
        if path.suffix not in (".json", ".safetensors", ".bin") or not path.is_file():
            continue
        then, stamp = known.get(str(path), {}), _stamp(path)
        same = all(then.get(key) == value for key, value in stamp.items())
        digest = then["digest"] if same else storage.digest(path)
        files[str(path)] = known[str(path)] = stamp | {"digest": digest}
    return {"name": model.name, "commit": model.commit, "files": files}


def _tokenizers(tokenizers: Mapping[str, Any]) -> dict[str, str]:
    found = {id(each): each for each in tokenizers.values()}
    digests = {key: _tokenizer(each) for key, each in found.items()}
    return {name: digests[id(each)] for name, each in tokenizers.items()}


def _tokenizer(tokenizer: Any) -> str:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {"truncation": None, "padding": None}  # as its last call left them
    parts = state, tokenizer.chat_template, tokenizer.special_tokens_map
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _stamp(path: Path) -> dict[str, int]:
    found = path.stat()
    return {"size": found.st_size, "time": found.st_mtime_ns}


def _named(section: Any) -> Iterator[str]:
    """Yields the local files that a section of the config names, by path, folder or glob."""
    for key, value in section.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from _named(value)
        elif key in ("path", "without"):
            paths = value if isinstance(value, list | tuple) else [value or ""]
            for path in (Path(each).expanduser() for each in paths):
                found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path)))
                yield from (str(file.absolute()) for file in found if file.is_file())
