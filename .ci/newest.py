"""Imports every module and runs smoke variants, in an installation like a user's: without pytest.

    python .ci/newest.py one PART PARTS      # one config of each recipe
    python .ci/newest.py others PART PARTS   # all other configs

PARTS such processes share the configs.
"""

import importlib
import pkgutil
import sys
import time

import kd_jax
from tests import smoke
from tests.configs.smokes import NAMES, load


def main(which: str, part: int, parts: int) -> None:
    for module in pkgutil.walk_packages(kd_jax.__path__, "kd_jax."):
        importlib.import_module(module.name)
    of_recipe = {load(name).recipe: name for name in NAMES}.values()
    names = [name for name in NAMES if (name in of_recipe) == (which == "one")]
    for name in names[part::parts]:
        start = time.monotonic()
        smoke.run(name)
        print(f"{time.monotonic() - start:5.1f} s  {name}:smoke", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
