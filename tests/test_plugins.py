import sys
import types

import pytest

from kd_jax import objectives, plugins
from kd_jax.errors import UserError


def test_a_module_is_found_by_its_path():
    from kd_jax.objectives import kl

    assert plugins.load("objectives", "kl", "make") is kl


def test_names_are_the_modules_with_the_mark():
    assert {"clm", "glue", "mlm", "squad"} <= set(plugins.names("tasks", "make"))
    assert "task" not in plugins.names("tasks", "make")  # what others share is no task
    assert {"bert", "distilbert", "gpt2", "roberta"} <= set(plugins.names("models", "FAMILY"))
    assert "vocab" not in plugins.names("objectives", "make")  # the engine is no objective


def test_an_unknown_name_lists_what_exists():
    with pytest.raises(UserError, match=r"^unknown tasks plug-in 'sst'; have: agnews, chat, clm, "):
        plugins.load("tasks", "sst", "make")
    with pytest.raises(
        UserError, match=r"'reverse_kll' .did you mean 'reverse_kl'..; have: akl, attention, ce, "
    ):
        plugins.load("objectives", "reverse_kll", "make")


def test_a_module_without_the_mark_is_no_plugin():
    with pytest.raises(
        UserError, match="unknown objectives plug-in 'vocab'; have: akl, attention, ce, "
    ):
        plugins.load("objectives", "vocab", "make")


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """kd_jax.objectives.broken, which imports a package that is not installed."""
    (tmp_path / "broken.py").write_text("import no_such_package\n\ndef make(): ...\n")
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])


def test_what_a_plugin_cannot_import_is_not_hidden(broken, monkeypatch):
    monkeypatch.setattr(plugins, "names", lambda *_: ["kl"])  # which would import it as well
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        plugins.load("objectives", "broken", "make")
    assert "kd_jax.objectives.broken" not in sys.modules


def test_a_plugin_may_come_from_elsewhere(monkeypatch):
    """No list has to be edited: what can be imported by that path is there."""
    module = types.ModuleType("kd_jax.objectives.mine")
    module.make = lambda: None
    monkeypatch.setitem(sys.modules, "kd_jax.objectives.mine", module)
    assert plugins.load("objectives", "mine", "make") is module


def test_a_plugin_may_have_other_names():
    from kd_jax.recipes import distil

    assert plugins.load("recipes", "prune", "run") is distil
    assert {"distil", "prune"} <= set(plugins.names("recipes", "run"))
