"""Plans a run: parameters, FLOPs, memory a chip, collectives; no weights, data or accelerator.

    python -m kd_jax.plan --config=configs/pretrain_wikitext.py [--topology=v5e:4x4] [--json=FILE]

With a topology the student's real train step is compiled for those chips, which takes minutes for
a large model: TPUs need libtpu (pip install 'kd_jax[tpu]'), H100s jax[cuda12] (kd_jax[cuda]).
`--config.key=value` changes the config, such as --config.batch_size=512: rows over all chips.
"""

import functools
import json
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from kd_jax import cli
from kd_jax.plans import topology
from kd_jax.recipes.plan import Plan, plan
from kd_jax.report.table import Table

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: configs/NAME.py, or configs/NAME.py:smoke for a tiny one."
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "", f"Chips to compile for; one of {', '.join(topology.names())}."
)
_JSON = flags.DEFINE_string("json", "", "File to write every figure to.")


def table(found: Plan) -> Table:
    """The plan for people."""
    rows = [
        ["teacher", f"{found['params_teacher']:,} parameters"],
        [found["stage"], f"{found['params_student']:,} parameters"],
        ["reduction", f"{found['reduction_percent']:.2f}%"],
        ["batch", f"{found['rows']} x {found['tokens']} tokens, {found['positions']} to the head"],
        ["FLOPs needed a step", f"{found['flops_needed']:.4g}"],
    ]
    if "topology" in found:
        used, memory = found["memory_bytes_per_device"], found["memory_parts"]
        parts = [f"{name} {size / 1e9:.2f}" for name, size in memory.items()]
        ratio = found["flops_compiled"] / found["flops_needed"]
        share = used / found["memory_bytes_of_chip"]
        verdict = "fits" if share <= 1 else "does not fit"
        rows += [
            ["FLOPs compiled", f"{found['flops_compiled']:.4g}, {ratio:.3f} of those needed"],
            ["memory a chip", f"{used / 1e9:.2f} GB ({', '.join(parts)}), {share:.0%}: {verdict}"],
        ]
        for kind, size in found["collective_bytes"].items():
            share = size / found["gradient_bytes"]
            rows.append([kind, f"{size / 1e9:.3f} GB a chip, {share:.3f} of the gradients'"])
        if found["unbounded_loops"]:
            rows.append(["loops counted once", ", ".join(found["unbounded_loops"])])
        rows.append(["compiled in", f"{found['compile_seconds']} s"])
    return Table(found.get("topology", "one step"), ["", f"stage {found['stage']}"], rows)


def phases(found: Plan) -> Table | None:
    """Where blocks are replaced on the way, the model after each swap."""
    if "phases" not in found:
        return None
    rows = [["0", "", "", f"{found['params_teacher']:,}", "0.00%"]]
    for row in found["phases"]:
        first, last = row["steps"]
        rows.append(
            [
                str(row["phase"]),
                f"{first:,} to {last:,}",
                "by importance" if row["blocks"] is None else ", ".join(map(str, row["blocks"])),
                f"{row['parameters']:,}",
                f"{row['reduction_percent']:.2f}%",
            ]
        )
    return Table("phases", ["phase", "steps", "blocks replaced", "parameters", "reduction"], rows)


def _main(argv: list[str]) -> None:
    del argv
    with cli.plain_errors():
        cli.check_file("--json", _JSON.value)
        found = plan(_CONFIG.value, _TOPOLOGY.value)
        for each in filter(None, (phases(found), table(found))):
            each.print()
        if _JSON.value:
            Path(_JSON.value).write_text(json.dumps(found, indent=2) + "\n")


def main() -> None:
    """Runs the command line; does not return."""
    app.run(_main, flags_parser=functools.partial(cli.parse_flags, __doc__))


if __name__ == "__main__":
    main()
