"""One process of an ensemble's run: `ensemble_worker.py --folder=DIR FLAGS`."""

import pathlib
from unittest import mock

from kd_jax import flags
from kd_jax.cli import start_jax
from kd_jax.recipes import ensemble
from kd_jax.run import measure, workdir
from kd_jax.train import distributed
from tests.recipes import ensembles


def main() -> None:
    parser = flags.Parser("worker", __doc__)
    parser.add_argument("--folder", required=True, help="of text and run")
    parser.add_processes()
    args = vars(parser.parse())
    folder = pathlib.Path(args.pop("folder"))
    start_jax()
    distributed.initialize(**args)
    config = ensembles.two_rounds(folder)
    once = mock.patch.object(measure, "CALLS", 1)
    with ensembles.quick(), once, workdir.enter(config, "example", str(folder / "run")) as place:
        ensemble.run(config, place)


if __name__ == "__main__":
    main()
