"""What all command lines have in common: flags, help, mistakes."""

import importlib
import subprocess
import sys

import pytest

from kd_jax import __main__ as command
from kd_jax import flags
from tests import forked

HEAVY = "jax numpy scipy sklearn optax flax orbax transformers datasets matplotlib optuna".split()
HEAVY += ["tensorflow_datasets", "pyarrow", "torch"]
LATER = "torch tensorboardX matplotlib datasets pandas sklearn pyarrow scipy.stats optuna".split()
OWN_PARSERS = [verb for verb in command.VERBS if verb not in ("configs", "keys")]


def test_help_of_every_verb_imports_nothing_heavy():
    """In one process, for speed: what one verb does not import, all do not."""
    program = f"""
import contextlib, importlib, io, sys
for verb in {list(command.VERBS)}:
    sys.argv = ["kd-jax", verb, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        importlib.import_module("kd_jax.__main__").main()
    assert "kd" in shown.getvalue(), verb
print(*sorted({set(HEAVY)} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=forked.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize("experiment", ["quickstart", "distil_chat"])
def test_a_run_starts_without_what_it_needs_later(experiment, tmp_path):
    """Until the data is ready: what pictures, exports and other sources need is imported then."""
    program = f"""
import logging, sys
class Ready(logging.Filter):
    def filter(self, record):
        if "stage 1 of" in record.getMessage():
            print(*sorted({set(LATER)} & set(sys.modules)), flush=True)
            raise SystemExit
        return True
logging.getLogger("kd_jax.recipes.distil").addFilter(Ready())
from kd_jax import main
main.main(["--config=configs/{experiment}.py:smoke", "--workdir={tmp_path}"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=forked.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"run directory: {tmp_path}", ""]


@pytest.mark.parametrize("verb", OWN_PARSERS)
def test_help_ends_with_status_0_and_shows_the_commands(verb, capsys):
    module = importlib.import_module(f"kd_jax.{verb}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and f"python -m kd_jax.{verb} " in shown
    assert module.__doc__.splitlines()[0] in shown


@pytest.mark.parametrize("verb", OWN_PARSERS)
def test_a_flag_that_there_is_not_is_one_line(verb, capsys):
    module = importlib.import_module(f"kd_jax.{verb}")
    needed = {
        "predict": ["--model=a", "--input=b", "--output=c"],
        "generate": ["--model=a", "--input=b", "--output=c"],
        "embed": ["--model=a", "--input=b", "--output=c"],
        "export": ["--model=a", "--out=b"],
        "evaluate": ["--model=a"],
        "compare": ["a"],
    }
    with pytest.raises(SystemExit) as ended:
        module.main([*needed.get(verb, ["--config=quickstart"]), "--htlp=3"])
    assert ended.value.code == 1
    line = "error: unknown flag --htlp (did you mean --help?); --help lists them\n"
    assert capsys.readouterr().err == line


def parser() -> flags.Parser:
    made = flags.Parser("example", "Shows something.", has_config=True)
    made.add_argument("--workdir")
    made.add_argument("--query_prompt")
    made.add_argument("--rows", type=flags.positive)
    return made


@pytest.mark.parametrize("config", [["--config=a.py:smoke"], ["--config", "a.py:smoke"]])
@pytest.mark.parametrize("key", [["--config.steps=3"], ["--config.steps", "3"]])
def test_values_behind_a_sign_or_a_space(config, key):
    given = [*key, *config, "--workdir=x", "--query_prompt=", "--config.teacher.model="]
    found = parser().parse(given)
    assert (found.config, found.workdir, found.query_prompt) == ("a.py:smoke", "x", "")
    assert found.changes == [("steps", "3"), ("teacher.model", "")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir="], "--workdir is empty; give it a value, or leave it out"),
        (["--rows=0"], "argument --rows: '0' is no whole number above 0"),
        (["--workdi=x"], "unknown flag --workdi (did you mean --workdir?); --help lists them"),
        (["--learning_rate=1"], "unknown flag --learning_rate (did you mean --config.optim.learn"),
        (["config.steps=3"], "'config.steps=3' is no flag; did you mean --config.steps=3?"),
        (["smoke"], "'smoke' is no flag; flags begin with --"),
    ],
)
def test_mistakes(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse(["--config=a.py", *arguments])
    error = capsys.readouterr().err
    assert ended.value.code == 1 and error.startswith(f"error: {message}")
    assert len(error.splitlines()) == 1
