"""Reads the settings of a run's stages, and the order in which they run, from the config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_jax import config as defaults
from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.ranges import settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a stage: config.stages.NAME, with defaults from kd_jax/config.py."""

    name: str
    kind: str
    model: str  # the run's model that it trains
    makes_model: bool  # of the teacher; otherwise a section of the config describes it
    objective: str  # the key of the config with its terms; "": the labels alone
    after: str  # the stage whose last parameters it goes on from; "": none
    select: bool  # its best checkpoint by held-out figures, or the last one
    steps: int
    epochs: float  # of its data; 0.0 for text, where steps count
    batch_size: int
    optim: ConfigDict
    own: Mapping[str, Any]  # the kind's SETTINGS


def read(config: ConfigDict, teachers: Sequence[str]) -> list[Settings]:
    """Reads `config.stages` in an order in which they can run: teachers first, then an assistant, a
    stage after the one that it continues; otherwise as in kd_jax/config.py, then other names.

    Raises UserError for unknown names, kinds and keys.
    """
    known = dict.fromkeys(teachers, {}) | defaults.STAGES
    known |= {name: {"model": name, "objective": ""} for name in teachers}
    have = {name: section for name, section in known.items() if _possible(config, section)}
    given = list(config.stages)
    if not given or [n for n in given if n not in have and "kind" not in config.stages[n]]:
        raise UserError(f"config.stages={given}: have {', '.join(have)}; of others give the kind")
    names = [*(n for n in known if n in given), *(n for n in given if n not in known)]
    left = [_settings(config, name, known.get(name, {})) for name in names]
    left.sort(key=lambda each: (each.model not in teachers, each.model != "assistant"))
    found = []
    while left:
        waiting = [each.name for each in left]
        able = [i for i, each in enumerate(left) if each.after not in waiting]
        if not able:
            raise UserError(f"config.stages: {', '.join(waiting)} go on from each other; see after")
        found.append(left.pop(able[0]))
    models = {each.name: each.model for each in found}
    for each in found:
        if each.after and models[each.after] != each.model:
            other = f"trains {models[each.after]}, and {each.name} goes on with {each.model}"
            raise UserError(f"config.stages.{each.name}.after={each.after!r}, which {other}")
    return found


def _possible(config: ConfigDict, section: Mapping[str, Any]) -> bool:
    """Tells whether the config has the sections that a stage reads."""
    own = defaults.ranges(defaults.STAGE) | section
    named = own["model"], own["objective"], getattr(kind_of(own["kind"]), "SECTION", "")
    return all(not name or name in config or name in config.get("teachers", {}) for name in named)


def kind_of(name: str) -> Any:
    """Loads the module of a kind of stage by its name."""
    return plugins.load("stages", name, "make")


def _settings(config: ConfigDict, name: str, of_name: Mapping[str, Any]) -> Settings:
    where = f"stages.{name}"
    given, usual = config.stages[name], defaults.ranges(defaults.STAGE) | of_name
    kind = given.get("kind", usual["kind"]) if hasattr(given, "get") else usual["kind"]
    of_run = defaults.ranges(defaults.table("", config))
    of_run = {key: of_run[key] for key in defaults.OF_RUN if key in of_run}
    of_kind = dict(getattr(kind_of(kind), "SETTINGS", {}))
    whole = settings(given, usual | of_run | of_kind, where)
    own = ConfigDict(config.optim.to_dict(), type_safe=False)
    own.update(whole["optim"])
    defaults.check_section(own, "optim", f"{where}.optim", config)
    whole |= {key: given.get(key, config[key]) for key in of_run} | {"optim": own}
    whole["own"] = {key: whole.pop(key) for key in of_kind if key in whole}
    section = whole["model"]
    if section and section not in config and section not in config.get("teachers", {}):
        raise UserError(f"config.{where}.model={section!r}: the config has no section {section!r}")
    if whole["objective"] and whole["objective"] not in config:
        raise UserError(f"config.{where}.objective={whole['objective']!r}: not in the config")
    whole["after"] = whole["after"] if whole["after"] in config.stages else ""
    usual = {"name": name, "epochs": 0.0, "makes_model": not section}
    return Settings(**(usual | whole | {"model": section or name}))
