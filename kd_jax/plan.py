"""Plans a run: parameters, FLOPs, memory a chip, collectives; no weights, data or accelerator.

    python -m kd_jax.plan --config=configs/pretrain_wikitext.py [--topology=v5e:4x4] [--json=FILE]

With a topology the student's real train step is compiled for those chips, which takes minutes for
a large model: TPUs need libtpu (pip install 'kd_jax[tpu]'), H100s jax[cuda12] (kd_jax[cuda]).
`--config.key=value` changes the config, such as --config.batch_size=512: rows over all chips.
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
    parser.add_argument("--json", metavar="FILE", help="file to write every figure to")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Plans the run of `argv`, prints tables; exits with status 1 and one line at a mistake."""
    args = parser().parse(argv)
    from kd_jax import cli
    from kd_jax.recipes.plan import phases, plan, table

    with cli.plain_errors():
        config = experiments.read(args.config)
        keys.change(config, args.changes)
        cli.check_file("--json", args.json)
        found = plan(config, args.topology or "")
        for each in filter(None, (phases(found), table(found))):
            each.print()
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
