"""Distills language models in JAX.

    config = kd_jax.configure("finetune_text", {"teacher.model": "runs/teacher", "epochs": 3})
    run = kd_jax.distil(config, train={"text": texts, "label": labels})
    run.model().predict(["A text."])

docs/python.md walks through it. The names load on first use, so that `import kd_jax` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_jax.api import (
        Config,
        Model,
        Run,
        UserError,
        compare_runs,
        configure,
        distil,
        forecast,
        list_experiments,
        load,
        open_run,
    )

__version__ = "0.1.0"
__all__ = [
    "Config",
    "Model",
    "Run",
    "UserError",
    "compare_runs",
    "configure",
    "distil",
    "forecast",
    "list_experiments",
    "load",
    "open_run",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(
            f"module 'kd_jax' has no attribute {name!r}; have {', '.join(__all__)}"
        )
    import kd_jax.api

    globals().update({each: getattr(kd_jax.api, each) for each in __all__})
    return globals()[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
