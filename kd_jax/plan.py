"""Plans a run: parameters, FLOPs, hours, memory a chip, collectives; no weights, data or chips.

    python -m kd_jax.plan --config=configs/pretrain_wikitext.py [--topology=v5e:4x4] [--json=FILE]

With a topology each stage's real train step is compiled for those chips, which takes minutes for a
large model: TPUs need libtpu (pip install 'kd_jax[tpu]'), GPUs jax[cuda12] (kd_jax[cuda]).
--estimate leaves that out: memory by arithmetic alone, in seconds. `--config.key=value` changes the
config, such as --config.batch_size=512: rows over all chips. A model may be the path of a
config.json: --config.teacher.model=PATH/config.json.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from kd_jax import experiments, flags, keys


def parser() -> flags.Parser:
    """Makes the command's argument parser."""
    parser = flags.Parser("plan", __doc__, has_config=True)
    parser.add_argument(
        "--topology", help="chips to compile for, such as v5e:4x4; a wrong name lists them"
    )
    parser.add_argument("--estimate", action="store_true", help="compiles nothing")
    parser.add_argument(
        "--stage", action="append", default=[], help="one of the run's stages to plan, not all"
    )
    parser.add_argument(
        "--mfu", type=share, default=0.4, help="share of the peak FLOP/s to expect (default 0.4)"
    )
    parser.add_argument("--json", metavar="FILE", help="file to write every figure to")
    return parser


def share(text: str) -> float:
    """Converts a flag to a number above 0 and up to 1."""
    if not 0 < (number := float(text)) <= 1:
        raise ValueError(text)
    return number


def main(argv: Sequence[str] | None = None) -> None:
    """Plans the run of `argv`, prints tables; exits with status 1 and one line at a mistake."""
    args = parser().parse(argv)
    from kd_jax import cli
    from kd_jax.recipes.plan import plan
    from kd_jax.report.plan import memory_table, phases, table, totals

    with cli.plain_errors():
        config = experiments.read(args.config)
        keys.change(config, args.changes)
        cli.check_file("--json", args.json)
        found = plan(config, args.topology or "", args.stage, args.mfu, not args.estimate)
        for stage in found["stages"]:
            for each in filter(None, (phases(stage), table(stage), memory_table(stage))):
                each.print()
        totals(found).print()
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
