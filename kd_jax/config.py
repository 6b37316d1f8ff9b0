"""Makes and checks configs, from the tables of their keys (kd_jax/sections.py).

Configs start from `base`, `finetuning` and the other functions below. A key that is unknown or
missing, has a wrong type or is out of range is refused at the start, before it could be overlooked
or fail hours later.

A newly added key gets a default that changes nothing, and is listed in `LATER`, so that the configs
of earlier runs can be read.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict, FieldReference

from kd_jax.errors import UserError
from kd_jax.ranges import Free, Whole, settings
from kd_jax.sections import MODEL, MORE, RUN, SECTIONS, Table

OF_ALL = ("mesh", "teacher", "student", "tokenizer", "optim", "eval", "checkpoint", "log")
# What differs where a stage's length may be epochs, and a checkpoint is written with each figure.
IN_EPOCHS: dict[str, dict[str, tuple[Any, str] | None]] = {
    "": dict(steps=(Whole(least=0, default=0), "above 0: so many steps instead of epochs")),
    "eval": dict(every=(Whole(least=0, default=0), "steps; 0: once an epoch")),
    "checkpoint": dict(every=None),
}
OPTIONAL = {"teacher": ("weight", "labels")} | {n: tuple(SECTIONS[n]) for n in ("cache", "sweep")}
_MODELS = ("teacher", "student", "assistant")
LATER = ("teacher.init", *(f"{name}.embedding" for name in _MODELS))

# What a stage is where neither config.stages.NAME nor its name, below, says otherwise.
STAGE: Table = dict(
    kind=("plain", "kd_jax/stages/KIND.py"),
    model=("student", "the section of the config that it trains"),
    objective=("objective", "the key of its terms, learned from the teachers; empty: labels alone"),
    after=("", "the stage whose last parameters it goes on from, where there is such a stage"),
    select=(True, "keeps the checkpoint that is best by held-out figures; else the last one"),
)
OF_RUN = ("epochs", "steps", "batch_size", "optim")  # of the config, which a stage may change

# Stages that are known by their names, in the order in which a run goes through them as far as they
# do not need each other: a ConfigDict sorts its keys, so that config.stages has no order. Others
# come after them, and say their kind. Further teachers (`teachers`) are stages like `teacher`.
STAGES: dict[str, dict[str, Any]] = dict(
    teacher=dict(model="teacher", objective=""),
    assistant=dict(model="assistant"),
    baseline=dict(objective=""),
    intermediate=dict(objective="intermediate", select=False),
    substitute=dict(kind="substitute", model=""),  # "": a model that the stage makes
    prune=dict(kind="prune", model=""),
    theseus=dict(kind="theseus", model=""),
    student=dict(after="intermediate"),
    round=dict(kind="round"),
)

# The stages that reports compare, where the results of a run do not name them.
ROLES = dict(teacher="teacher", baseline="baseline", student="student")


def ranges(keys: Table) -> dict[str, Any]:
    """Converts a table of keys to defaults and ranges without meanings, as `settings` takes it."""
    return {key: default for key, (default, _) in keys.items()}


def names() -> list[str]:
    """Lists all dotted keys: optim, optim.learning_rate."""
    of_sections = [f"{name}.{key}" for name, keys in SECTIONS.items() for key in keys]
    return [*RUN, *MORE, *SECTIONS, *of_sections]


def _section(own: Table, /, **changes: Any) -> ConfigDict:
    """Makes a section of the keys of a table, with their defaults or `changes`."""
    found = settings(None, ranges(own), "") | changes
    free = [key for key, (default, _) in own.items() if isinstance(default, Free)]
    return ConfigDict(found | {key: FieldReference(found[key], field_type=object) for key in free})


def model() -> ConfigDict:
    """Makes a model section: see kd_jax/models/blueprint.py."""
    return _section(MODEL)


def base(recipe: str) -> ConfigDict:
    """Makes a config with the keys of every training recipe."""
    c = _section(RUN | {"vocab_chunk": MORE["vocab_chunk"]}, recipe=recipe)
    for name in OF_ALL:
        c[name] = _section(SECTIONS[name])
    for key in OPTIONAL["teacher"]:
        del c.teacher[key]
    return c


def teacher(name: str) -> ConfigDict:
    """Makes a section of `teachers`, or the section `teacher` in fine-tuning."""
    return _section(SECTIONS["teacher"], model=name)


def cache(max_gb: float) -> ConfigDict:
    """Makes a section `cache`; language models set `logits` as well."""
    return ConfigDict(dict(max_gb=max_gb, folder=""))


def with_embeddings(student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Makes TinyBERT's layer map: embeddings to embeddings, layer i to i x teacher / student."""
    return tuple((i, i * teacher // student) for i in range(student + 1))


def sweep(*keys: tuple) -> ConfigDict:
    """Makes a section of trials over `keys`: pairs of a dotted key and its values."""
    return _section(SECTIONS["sweep"], keys=keys)


def finetuning() -> ConfigDict:
    """Makes a config of fine-tuning: `base` with other defaults and further keys."""
    c = base("finetune")
    del c.vocab_chunk, c.checkpoint.every
    own = ("epochs", "patience", "average", "teachers", "intermediate")
    c.update(_section({key: MORE[key] for key in own}))
    for name in ("assistant", "theseus", "cost"):
        c[name] = _section(SECTIONS[name])
    c.cache = cache(max_gb=10.0)
    c.teacher = teacher("")
    c.batch_size, c.steps, c.eval.every, c.checkpoint.keep = 32, 0, 0, 1
    c.optim.update(learning_rate=2e-5, schedule=dict(kind="linear", warmup=0.1))
    return c


def pruning(c: ConfigDict | None = None) -> ConfigDict:
    """Makes a config of pruning: the keys of `base`, or those of `c`, and those of
    kd_jax/stages/prune.py."""
    c = base("prune") if c is None else c
    c.pruning = _section(SECTIONS["pruning"])
    return c


def substitution(c: ConfigDict | None = None) -> ConfigDict:
    """Makes a config of substitution: the keys of `base`, or those of `c` (`finetuning()`), those
    of kd_jax/stages/swaps.py, and those of what makes a model as small as substitution does."""
    c = pruning(base("substitute") if c is None else c)
    c.pruning.target = 0.0
    c.substitution = _section(SECTIONS["substitution"])
    c.theseus = _section(SECTIONS["theseus"], group=0)
    return c


def on_policy() -> ConfigDict:
    """Makes a config of on-policy distillation: the keys of `base`, and those of
    kd_jax/stages/on_policy.py."""
    c = base("distil")
    c.rollout = _section(SECTIONS["rollout"])
    c.stages = dict(student=dict(kind="on_policy"))
    return c


def ensemble() -> ConfigDict:
    """Makes a config of sequential ensembles, see kd_jax/stages/round.py."""
    c = base("ensemble")
    c.update(_section({"rounds": MORE["rounds"]}))
    c.ensemble = _section(SECTIONS["ensemble"])
    c.cache = cache(max_gb=20.0)
    c.stages, c.student.init = dict(round={}), "model"
    return c


def split(arg: str | None, have: Sequence[str], default: str) -> tuple[str, bool]:
    """Splits a config's argument ("mrpc", "mrpc-smoke" or "smoke") into (variant, whether it is a
    smoke run)."""
    name, _, ending = (arg or default).partition("-")
    if name == "smoke" and not ending:
        return default, True
    if name not in have or ending not in ("", "smoke"):
        raise ValueError(f"unknown variant {arg!r}; have: {', '.join(have)}; each with -smoke")
    return name, ending == "smoke"


def wikitext103() -> dict:
    """Makes config.data of WikiText-103 (Merity et al. 2016, arXiv:1609.07843)."""
    splits = ("train", "validation", "test")
    name = dict(path="Salesforce/wikitext", name="wikitext-103-raw-v1")
    return {split: dict(source="hub", **name) for split in splits}


def table(name: str, config: Mapping) -> Table:
    """Returns the table of keys of a section of this config; of the top level for ""."""
    more = {key: each for key, each in MORE.items() if key in config}
    sections = [each for each in SECTIONS if each in OF_ALL or each in config]
    found = SECTIONS[name] if name else RUN | more | dict.fromkeys(sections, ({}, ""))
    found = found | IN_EPOCHS.get(name, {}) if "epochs" in config else found
    return {key: each for key, each in found.items() if each}


def check(config: ConfigDict) -> None:
    """Raises UserError at the first key that is unknown, missing or of a wrong type, and at the
    first number outside its range."""
    for name in ("", *(each for each in SECTIONS if each in config)):
        check_section(config[name] if name else config, name, name, config)
    _check_parameters(config, "teacher", config.teacher, "teacher")
    for name, section in config.get("teachers", {}).items():
        check_section(section, "teacher", f"teachers.{name}", {})
        _check_parameters(config, name, section, f"teachers.{name}")


def check_section(section: ConfigDict, name: str, where: str, config: Mapping) -> None:
    """Checks that config.<where> has the keys of the section `name`, with legal values."""
    keys = table(name, config)
    settings(section, ranges(keys), where)
    path = f"config.{where}." if where else "config."
    missing = [key for key in keys if key not in section and key not in OPTIONAL.get(name, ())]
    if missing:
        missing = ", ".join(path + key for key in missing)
        raise UserError(f"missing from the config: {missing}; kd_jax/sections.py has all")


def _check_parameters(config: ConfigDict, name: str, teacher: ConfigDict, where: str) -> None:
    """Raises UserError for a teacher that would have random parameters by mistake."""
    if not (teacher.model or teacher.init or name in config.stages):
        raise UserError(
            f"config.{where}.model is empty and no stage trains the {name}, so that it would know "
            f"nothing: name a checkpoint, add the stage {name!r} to config.stages, or set "
            f"config.{where}.init='scratch' to learn from random parameters"
        )


def stories260k() -> tuple[str, str]:
    """Returns where configs expect the model stories260K, in models/ next to $KD_JAX_DATA, and real
    stories, in its lm_text/."""
    data = os.environ.get("KD_JAX_DATA")
    model = os.path.join(data, "..", "models", "stories260K") if data else "stories260K"
    return model, os.path.join(data or "data", "lm_text", "tinystories_197k.txt")


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys that are newer than an earlier run to its config; returns the config."""
    for section, key, default in _later(config):
        section.setdefault(key, default)
    return config


def reduce(config: dict[str, Any]) -> dict[str, Any]:
    """Removes the keys in LATER that are at their defaults, so that the config is the same as in
    earlier runs; returns it."""
    for section, key, default in _later(config):
        if section.get(key) == default:
            del section[key]
    return config


def _later(config: Mapping) -> Iterator[tuple[dict, str, Any]]:
    """Yields every place of a key of LATER in a config: (section, key, default)."""
    for name, key in (each.split(".") for each in LATER):
        more = config.get("teachers", {}).values() if name == "teacher" else ()
        for section in (config.get(name), *more):
            if isinstance(section, dict):
                yield section, key, settings(None, ranges(SECTIONS[name]), "")[key]
