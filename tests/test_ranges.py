"""Numbers of the config: what may stand there, what is said of what may not."""

import importlib
import math
import pkgutil
import re

import pytest

import kd_jax.data
import kd_jax.tasks
from kd_jax.errors import UserError
from kd_jax.ranges import Choice, Real, Whole, settings


@pytest.mark.parametrize(
    ("within", "value", "says"),
    [
        (Real(least=0), -1.0, "k=-1.0 must be at least 0"),
        (Real(above=0, below=1), 0, "k=0 must be above 0 and below 1"),
        (Real(above=0, below=1), 1, "k=1 must be above 0 and below 1"),
        (Real(least=0.01, most=100), 1e4, "k=10000.0 must be at least 0.01 and at most 100"),
        (Real(least=0), math.nan, "k=nan must be finite"),
        (Real(), -math.inf, "k=-inf must be finite"),
        (Real(), 1e300, "k=1e+300 must be at most 1e+30"),
        (Real(), True, "k=True should be a number"),
        (Real(), None, "k=None should be a number"),
        (Whole(), 1.0, "k=1.0 should be a whole number"),
        (Whole(), 10**400, "must be at most 2147483647"),
        (
            Whole(least=0, most=2**32 - 1),
            2**32,
            "k=4294967296 must be at least 0 and at most 42949",
        ),
    ],
)
def test_numbers_that_are_refused(within, value, says):
    with pytest.raises(UserError, match=re.escape(says)):
        within.check(value, "k")


def test_numbers_that_are_taken():
    for within, value in (
        (Real(least=0), 0),
        (Real(least=0.01, most=100), 100.0),
        (Real(default=None), None),
        (Whole(least=0, most=2**32 - 1), 2**32 - 1),
    ):
        assert within.check(value, "k") is value


def test_a_range_stands_for_its_default():
    defaults = dict(a=Whole(least=1, default=3), b=Real(default=None), c=Real(least=0))
    assert settings(None, defaults, "x") == dict(a=3, b=None)
    assert settings(dict(b=1.5, c=0.5), defaults, "x") == dict(a=3, b=1.5, c=0.5)


def test_every_number_among_the_defaults_of_tasks_and_data_has_a_range():
    found = 0
    for package in (kd_jax.tasks, kd_jax.data):
        for each in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"{package.__name__}.{each.name}")
            for name, table in vars(module).items():
                if not name.isupper() or not isinstance(table, dict):
                    continue
                for key, value in table.items():
                    bare = isinstance(value, int | float) and not isinstance(value, bool)
                    assert not bare, f"{module.__name__}.{name}: {key}={value} has no range"
                    found += isinstance(value, Real)
    assert found > 20


def test_names_of_which_one_is_taken():
    assert Choice("a", "b").default == Choice("b", "a", default="a").default == "a"
    assert Choice("", "b").check("b", "k") == "b"
    for bad in ("c", None, 1):
        with pytest.raises(UserError, match=f"k={bad!r}: have a, b$"):
            Choice("a", "b").check(bad, "k")
    with pytest.raises(UserError, match="k='c': have b, or leave it empty"):
        Choice("", "b").check("c", "k")
