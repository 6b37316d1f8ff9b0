"""Warnings of this repository fail its tests; those of other packages do not."""

import warnings

import pytest


def warn_in(module: str) -> None:
    """Warns as if a line of `module` had."""
    exec("import warnings; warnings.warn('old', FutureWarning)", {"__name__": module})


@pytest.mark.parametrize(
    "module",
    [
        "kd_jax",
        "kd_jax.train.loop",
        "configs.quickstart",
        "benchmarks.kill_resume",
        "tests.models.tiny",
        __name__,
        "transformers_modules.student.modeling_kd_jax",
    ],
)
def test_ours_are_errors(module):
    with pytest.raises(FutureWarning, match="old"):
        warn_in(module)


@pytest.mark.parametrize("module", ["transformers.models.gpt2.modeling_gpt2", "kd_jaxlike", "jax"])
def test_those_of_others_are_not(module):
    with warnings.catch_warnings(record=True) as seen:
        warn_in(module)
    assert [str(each.message) for each in seen] == ["old"]
