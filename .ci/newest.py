"""Imports every module and runs smoke variants, in an installation like a user's: without pytest.

    python .ci/newest.py one PART PARTS      # a config of each recipe
    python .ci/newest.py others PART PARTS   # one of each recipe and families of models besides

PARTS such processes share them. The tests run every config, with the versions of constraints.txt.
"""

import importlib
import pkgutil
import sys
import time

import kd_jax
from kd_jax.run.run import build
from tests import smoke
from tests.configs.smokes import NAMES, load


def families(name: str) -> tuple[str, ...]:
    """Lists the kinds of models of a config: newer packages may break how they load and export."""
    models = build(load(name, "smoke")).models.values()
    return tuple(sorted({model.family.name for model in models}))


def main(which: str, part: int, parts: int) -> None:
    for module in pkgutil.walk_packages(kd_jax.__path__, "kd_jax."):
        importlib.import_module(module.name)
    names = list({load(name).recipe: name for name in NAMES}.values())
    if which == "others":
        kinds = {(load(name).recipe, families(name)): name for name in NAMES}
        names = [name for name in kinds.values() if name not in names]
    for name in names[part::parts]:
        start = time.monotonic()
        smoke.run(name)
        print(f"{time.monotonic() - start:5.1f} s  {name}:smoke", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
