"""The keys of a training config, by section, each with its range or a value of its type.

kd_jax/config.py tells what they mean and sets the defaults. A key that is unknown, missing, of a
wrong type or a number outside its range is refused at the start, before it could be overlooked or
fail hours later. The sections `objective`, `stages`, `task`, `data`, `architecture` and `schedule`
are checked by what reads them.
"""

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from kd_jax.data.settings import settings
from kd_jax.errors import UserError
from kd_jax.ranges import UNSET, Real, Whole

ROWS = Whole(least=1, most=2**20)  # of a batch: more are a slip of the hand
COUNT = Whole(least=1)
COUNT_OR_ZERO = Whole(least=0)
NOT_NEGATIVE = Real(least=0)

_MODEL = dict(model="", revision="", architecture={})
_TEACHER = _MODEL | dict(init="", weight=NOT_NEGATIVE, labels=None)
_STUDENT = _MODEL | dict(init="", layers=None)
OPTIM = dict(
    learning_rate=NOT_NEGATIVE,
    schedule={},
    weight_decay=NOT_NEGATIVE,
    beta1=Real(least=0, below=1),
    beta2=Real(least=0, below=1),
    # Of 0, and of what float32 takes for it, an update of a gradient of 0 is 0 / 0.
    epsilon=Real(least=1e-30),
    clip_norm=NOT_NEGATIVE,
    learning_rate_multipliers=(),
)
# What `config.stages` may say for one stage, where the config itself has it.
OF_STAGE = dict(epochs=Real(least=0, most=1e6), steps=COUNT_OR_ZERO, batch_size=ROWS, optim={})
_RUN = dict(
    recipe="",
    seed=Whole(least=0, most=2**32 - 1),
    precision="",
    batch_size=ROWS,
    accumulate=COUNT,
    remat=False,
    steps=COUNT,
    resume="",
    wandb="",
    objective={},
    stages={},
    task={},
    data={},
)
_SECTIONS = {
    "mesh": dict(fsdp=COUNT),
    "teacher": _TEACHER,
    "student": _STUDENT,
    "tokenizer": dict(path="", train="", vocab_size=COUNT),
    "optim": OPTIM,
    "eval": dict(every=COUNT, batch_size=ROWS),
    "checkpoint": dict(every=COUNT, keep=COUNT),
    "log": dict(every=COUNT),
}
# What a config may have besides: numbers and the like, and sections.
_MAY_RUN = dict(
    vocab_chunk=COUNT_OR_ZERO,
    epochs=OF_STAGE["epochs"],
    patience=COUNT_OR_ZERO,
    average="",
    teachers={},
    intermediate={},
    sweep={},
    rounds=COUNT,
)
_MAY_SECTIONS = {
    "assistant": _STUDENT,
    "cache": dict(max_gb=NOT_NEGATIVE, folder=""),
    "cost": dict(repeats=COUNT),
    "pruning": dict(target=Real(least=0, below=1), ranking="", distil=True),
    "substitution": dict(
        kind="",
        width=COUNT_OR_ZERO,
        num_heads=COUNT,
        num_kv_heads=COUNT,
        ffn_width=COUNT,
        init="",
        fit_steps=COUNT_OR_ZERO,
        fit_learning_rate=NOT_NEGATIVE,
        order=None,
        importance_batches=COUNT,
        blocks=COUNT,
        steps=COUNT,
        target=Real(least=0, below=1),
        learning_rate=NOT_NEGATIVE,
        warmup=COUNT_OR_ZERO,
    ),
    "theseus": dict(group=COUNT_OR_ZERO, layers=None, rate=None, steps=Real(above=0)),
    "ensemble": dict(
        space="",
        start="",
        rows=COUNT_OR_ZERO,
        fresh=False,
        top_k=COUNT,
        weights="",
        past_run_dirs=(),
        eval_mean="",
    ),
}
# Where a stage's length may be epochs, steps of 0 leave it to them, and a figure is taken and a
# checkpoint written once an epoch.
_IN_EPOCHS = {
    "": dict(steps=COUNT_OR_ZERO),
    "eval": dict(every=COUNT_OR_ZERO),
    "checkpoint": dict(every=UNSET),
}
_OPTIONAL = {"teacher": ("weight", "labels")}


def check(config: ConfigDict) -> None:
    """Raises UserError at the first key that is unknown, missing or of a wrong type, and at the
    first number outside its range."""
    may = {key: each for key, each in _MAY_RUN.items() if key in config}
    sections = _SECTIONS | {key: each for key, each in _MAY_SECTIONS.items() if key in config}
    _check(config, _ranges(config, "", _RUN) | may | {name: {} for name in sections}, "")
    for name, ranges in sections.items():
        _check(config[name], _ranges(config, name, ranges), name, _OPTIONAL.get(name, ()))
    _check_parameters(config, "teacher", config.teacher, "teacher")
    for name, section in config.get("teachers", {}).items():
        _check(section, _TEACHER, f"teachers.{name}")
        _check_parameters(config, name, section, f"teachers.{name}")


def _ranges(config: ConfigDict, section: str, usual: dict[str, Any]) -> dict[str, Any]:
    """The ranges of a section where stages may be epochs long, or the usual ones."""
    changes = _IN_EPOCHS.get(section, {}) if "epochs" in config else {}
    return {key: each for key, each in (usual | changes).items() if each is not UNSET}


def check_optim(config: ConfigDict, where: str) -> None:
    """As `check`, for the settings of an optimizer at config.<where>."""
    _check(config, OPTIM, where)


def _check_parameters(config: ConfigDict, name: str, teacher: ConfigDict, where: str) -> None:
    """Refuses a teacher whose parameters would be random without a word in the config."""
    if teacher.init not in ("", "scratch"):
        raise UserError(f"config.{where}.init={teacher.init!r}: have scratch, or leave it empty")
    if not (teacher.model or teacher.init or name in config.stages):
        raise UserError(
            f"config.{where}.model is empty and no stage trains the {name}, so that it would know "
            f"nothing: name a checkpoint, add the stage {name!r} to config.stages, or set "
            f"config.{where}.init='scratch' to learn from random parameters"
        )


def _check(
    section: ConfigDict, ranges: dict[str, Any], where: str, optional: Sequence[str] = ()
) -> None:
    settings(section, ranges, where)
    path = f"config.{where}." if where else "config."
    missing = [path + key for key in ranges if key not in section and key not in optional]
    if missing:
        raise UserError(f"missing from the config: {', '.join(missing)}; kd_jax/config.py has all")
