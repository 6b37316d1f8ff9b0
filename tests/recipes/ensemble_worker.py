"""One process of an ensemble's run: `ensemble_worker.py --folder=DIR FLAGS`."""

import pathlib
import sys

from absl import flags

from kd_jax.cli import start_jax
from kd_jax.recipes import ensemble
from kd_jax.run import workdir
from kd_jax.train import distributed
from tests.recipes import ensembles


def main() -> None:
    where = flags.DEFINE_string("folder", None, "of text and run")
    flags.FLAGS(sys.argv)
    start_jax()
    distributed.initialize()
    folder = pathlib.Path(where.value)
    config = ensembles.two_rounds(folder)
    with workdir.enter(config, "example", str(folder / "run")) as place:
        ensemble.run(config, place)


if __name__ == "__main__":
    main()
