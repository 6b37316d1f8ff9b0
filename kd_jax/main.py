"""Runs an experiment: its stages, the export of the student, curves and a table.

    python -m kd_jax.main --config=configs/quickstart.py
    python -m kd_jax.main --config=configs/quickstart.py:smoke --workdir=runs/try
    python -m kd_jax.main --config=configs/quickstart.py --config.seed=1 --config.steps=500

The run directory, printed first, holds everything; the same command continues a run that was
stopped. --config.KEY=VALUE changes any key of the config (kd-jax keys lists them). For a
run of several processes see launch/, and --helpfull for its flags.
"""

import functools
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from kd_jax import cli, plugins
from kd_jax.run import workdir
from kd_jax.train import distributed

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/NAME.py, or configs/NAME.py:smoke for a tiny one."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Run directory, local or gs://; the default is runs/NAME-HASH of the resolved config. The same "
    "command run again continues there.",
)


def _main(argv: list[str]) -> None:
    del argv
    with cli.plain_errors():
        cli.start_jax()
        distributed.initialize()
        config = _CONFIG.value
        file = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")[0]
        recipe = plugins.load("recipes", config.recipe, "run")
        with workdir.enter(config, Path(file).stem, _WORKDIR.value) as place:
            recipe.run(config, place)


def main() -> None:
    """Runs the command line; does not return."""
    app.run(_main, flags_parser=functools.partial(cli.parse_flags, __doc__))


if __name__ == "__main__":
    main()
