"""Compiles the plans that docs/scaling.md shows, for chips that are not here: results/plans.json.

    python benchmarks/plans.py [--only=TEXT] [--again]

Each row is `kd_jax.plan --stage=student` of one config, with the changes that its name states, in a
process of its own. A row takes minutes and is kept as soon as it is there; rows that the current
commit has made already are not made again, so that the same command goes on where it was stopped.
What does not fit is a row as well, with the compiler's reason.
"""

import argparse
import dataclasses
from typing import Any

import results
from kd_jax import experiments, keys
from kd_jax.errors import UserError
from kd_jax.recipes.plan import plan
from kd_jax.run import workdir


@dataclasses.dataclass(frozen=True)
class Row:
    """A config, a topology, and what is changed in the config."""

    title: str
    config: str
    topology: str
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The row's name in the table."""
        changes = ", ".join(f"{key}={value}" for key, value in self.changes)
        return f"{self.config} on {self.topology}" + (f", {changes}" if changes else "")


def _rows(rows: int, accumulate: int, **mesh: int) -> tuple[tuple[str, Any], ...]:
    """Changes of a config: rows of a micro-batch on all chips, micro-batches, mesh axes."""
    axes = tuple((f"mesh.{axis}", size) for axis, size in mesh.items())
    return (*axes, ("accumulate", accumulate), ("batch_size", rows * accumulate))


QWEN, LLAMA = "Qwen2.5-7B to 1.5B, 1 x 2,048", "Llama-3.1-8B to 3.2-1B, 1 x 4,096"
LARGE = "Llama-3.1-70B to 8B, 1 x 2,048"
ROWS = [
    *(
        Row(QWEN, "distil_qwen:7b", "v5e:4x4", _rows(16, accumulate, fsdp=fsdp))
        for fsdp in (16, 8, 4)
        for accumulate in (1, 4)
    ),
    Row(LLAMA, "distil_llama:8b", "v5e:4x4", _rows(16, 1)),
    Row(LARGE, "distil_llama:70b", "v5e:8x8", _rows(64, 1)),
    Row("BERT-large to 6 layers, 32 x 512", "pretrain_wikitext", "v5e:4x4"),
    Row("GPT-2 to 6 layers, 2 x 4 x 1,024", "pretrain_gpt2", "v5e:4x4"),
]
KEPT = (
    *("params_teacher", "params_student", "rows", "tokens", "chunk", "memory_estimate"),
    *("memory_bytes_per_device", "memory_bytes_of_chip", "memory_by_kind", "largest"),
    *("flops_needed", "flops_compiled", "gradient_bytes", "collective_bytes"),
    *("total_tokens", "total_flops", "hours", "chip_hours", "compile_cpu_seconds"),
)


def measure(row: Row) -> dict[str, Any]:
    """Makes a row's plan, or says why it does not fit."""
    config = experiments.read(row.config)
    keys.change(config, [(key, str(value)) for key, value in row.changes])
    found = {"plan": row.name, "title": row.title, "topology": row.topology}
    found |= {"accumulate": config.accumulate, "mesh": dict(config.mesh.items())}
    try:
        (stage,) = plan(config, row.topology, ["student"])["stages"]
    except UserError as error:
        if "does not fit" not in str(error):
            raise
        return found | {"error": str(error)}
    return found | {key: stage[key] for key in KEPT if key in stage}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name has this text")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    args = parser.parse_args()
    commit = workdir.manifest()["commit"]
    have = {row["plan"]: row for row in results.rows_of("plans")}
    for row in ROWS:
        made = have.get(row.name, {}).get("commit")
        if args.only not in row.name or (made == commit and not args.again):
            continue
        print(row.name, flush=True)
        have[row.name] = measure(row) | {"commit": commit}
        rows = [have[each.name] for each in ROWS if each.name in have]
        note = "Rows are compiled for absent chips and have not been run."
        results.keep_rows("plans", rows, "python benchmarks/plans.py", note)


if __name__ == "__main__":
    main()
