"""Runs an experiment: its stages, the export of the student, curves and a table.

    python -m kd_jax.main --config=configs/quickstart.py
    python -m kd_jax.main --config=configs/quickstart.py:smoke --workdir=runs/try
    python -m kd_jax.main --config=configs/quickstart.py --config.seed=1 --config.steps=500

The run directory, printed first, holds everything; the same command continues a run that was
stopped. --config.KEY=VALUE changes any key of the config (kd-jax keys lists them). For a
run of several processes see launch/.
"""

from collections.abc import Sequence
from pathlib import Path

from kd_jax import experiments, flags, keys


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("main", __doc__, has_config=True)
    parser.add_argument(
        "--workdir",
        metavar="RUN",
        help="run directory, local or gs://; the default is runs/NAME-HASH of the resolved config. "
        "The same command run again continues there",
    )
    parser.add_processes()
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment named in `argv`; exits with status 1 and one line at a mistake."""
    args = parser().parse(argv)
    from kd_jax import cli, plugins
    from kd_jax.run import workdir
    from kd_jax.train import distributed

    with cli.plain_errors():
        config = experiments.read(args.config)
        keys.change(config, args.changes)
        cli.start_jax()
        distributed.initialize(
            args.coordinator, args.process_id, args.process_count, args.start_timeout
        )
        recipe = plugins.load("recipes", config.recipe, "run")
        name = Path(args.config.partition(":")[0]).stem
        with workdir.enter(config, name, args.workdir) as place:
            recipe.run(config, place)


if __name__ == "__main__":
    main()
