"""The keys of a training config, by section, each with a value of its type.

kd_jax/config.py tells what they mean and sets the defaults. A key that is unknown, missing or of a
wrong type is refused at the start, before it could be overlooked or fail hours later. The sections
`objective`, `stages`, `task`, `data`, `architecture` and `schedule` are checked by what reads them.
"""

from typing import Any

from ml_collections import ConfigDict

from kd_jax.data.settings import settings
from kd_jax.errors import UserError

_MODEL = dict(model="", revision="", architecture={})
_TEACHER = _MODEL | dict(weight=0.0, labels=None)
OPTIM = dict(
    learning_rate=1.0,
    schedule={},
    weight_decay=0.0,
    beta1=0.9,
    beta2=0.999,
    epsilon=1e-8,
    clip_norm=1.0,
    learning_rate_multipliers=(),
)
_STUDENT = _MODEL | dict(init="", layers=None)
_RUN = dict(
    recipe="",
    seed=0,
    precision="",
    batch_size=1,
    accumulate=1,
    remat=False,
    resume="",
    wandb="",
    objective={},
    stages={},
    task={},
    data={},
)
_SECTIONS = {
    "mesh": dict(fsdp=1),
    "student": _STUDENT,
    "tokenizer": dict(path="", train="", vocab_size=1),
    "optim": OPTIM,
    "log": dict(every=1),
}
# What each recipe has besides: numbers and the like, and sections.
_OF_RECIPE = {
    "pretrain": (
        dict(vocab_chunk=0, steps=1),
        {
            "teacher": _MODEL,
            "eval": dict(every=1, batch_size=1),
            "checkpoint": dict(every=1, keep=1),
        },
    ),
    "finetune": (
        dict(epochs=0.0, steps=0, patience=0, average="", teachers={}, intermediate={}),
        {
            "teacher": _TEACHER,
            "assistant": _STUDENT,
            "eval": dict(every=0, batch_size=1),
            "checkpoint": dict(keep=1),
            "cache": dict(max_gb=0.0, folder=""),
            "cost": dict(repeats=1),
        },
    ),
}
_SUBSTITUTION = dict(
    kind="",
    width=0,
    num_heads=1,
    num_kv_heads=1,
    ffn_width=1,
    init="",
    fit_steps=0,
    fit_learning_rate=0.0,
    order=None,
    importance_batches=1,
    blocks=1,
    steps=1,
    target=0.0,
    learning_rate=0.0,
    warmup=0,
)
_PRUNING = {"pruning": dict(target=0.0, ranking="", distil=True)}
_OF_RECIPE["prune"] = (_OF_RECIPE["pretrain"][0], _OF_RECIPE["pretrain"][1] | _PRUNING)
_OF_RECIPE["substitute"] = (
    _OF_RECIPE["prune"][0],
    _OF_RECIPE["prune"][1] | {"substitution": _SUBSTITUTION},
)
_THESEUS = dict(group=0, layers=None, rate=None, steps=None)
for _name in ("substitute", "finetune"):
    _OF_RECIPE[_name][1]["theseus"] = _THESEUS
_ENSEMBLE = dict(
    space="",
    start="",
    rows=0,
    fresh=False,
    top_k=1,
    weights="",
    past_run_dirs=(),
    eval_mean="",
)
_OF_RECIPE["ensemble"] = (
    _OF_RECIPE["pretrain"][0] | dict(rounds=1),
    _OF_RECIPE["pretrain"][1] | {"ensemble": _ENSEMBLE, "cache": dict(max_gb=0.0, folder="")},
)
_OF_RECIPE["sweep"] = (_OF_RECIPE["finetune"][0] | dict(sweep={}), _OF_RECIPE["finetune"][1])


def check(config: ConfigDict) -> None:
    """Raises UserError at the first key that is unknown, missing, of a wrong type or too small."""
    numbers, sections = _OF_RECIPE[config.recipe]
    sections = _SECTIONS | sections
    _check(config, _RUN | numbers | {name: {} for name in sections}, "")
    for name, examples in sections.items():
        _check(config[name], examples, name)
    for name, section in config.get("teachers", {}).items():
        _check(section, _TEACHER, f"teachers.{name}")


def check_optim(config: ConfigDict, where: str) -> None:
    """As `check`, for the settings of an optimizer at config.<where>."""
    _check(config, OPTIM, where)


def _check(section: ConfigDict, examples: dict[str, Any], where: str) -> None:
    settings(section, examples, where)
    path = f"config.{where}." if where else "config."
    missing = [path + key for key in examples if key not in section]
    if missing:
        raise UserError(f"missing from the config: {', '.join(missing)}; kd_jax/config.py has all")
    for key, example in examples.items():
        # Whole numbers are counts, of which there is one at least, but for seed and vocab_chunk.
        if type(example) is int and section[key] < example:
            raise UserError(f"{path}{key}={section[key]} must be at least {example}")
