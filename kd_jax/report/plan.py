"""Makes tables of a run's plan (kd_jax/recipes/plan.py has its keys)."""

from typing import Any

from kd_jax.report.table import Table

Plan = dict[str, Any]


def table(found: Plan) -> Table:
    """Makes a table of a stage's plan."""
    rows = [
        ["teacher", f"{found['params_teacher']:,} parameters"],
        [found["stage"], f"{found['params_student']:,} parameters"],
        ["reduction", f"{found['reduction_percent']:.2f}%"],
        ["batch", f"{found['rows']} x {found['tokens']} tokens, {found['positions']} to the head"],
        ["FLOPs needed a step", f"{found['flops_needed']:.4g}"],
    ]
    if "writing_flops" in found:
        rows.append(["FLOPs of writing a batch", f"{found['writing_flops']:.4g}"])
    if found["steps"]:
        total = f"{found['steps']:,} steps, {found['total_tokens']:.3g} tokens"
        rows.append(["altogether", f"{total}, {found['total_flops']:.3g} FLOPs"])
    if found["chunk"]["rows"]:
        rows.append(["rows with logits at a time", f"{found['chunk']['rows']:,} a device"])
    if "topology" in found:
        used, memory = found["memory_bytes_per_device"], found["memory_parts"]
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items())
        ratio = found["flops_compiled"] / found["flops_needed"]
        share = used / found["memory_bytes_of_chip"]
        verdict = "fits" if share <= 1 else "does not fit"
        rows += [
            ["FLOPs compiled", f"{found['flops_compiled']:.4g}, {ratio:.3f} of those needed"],
            ["memory a chip", f"{used / 1e9:.2f} GB ({parts}), {share:.0%}: {verdict}"],
        ]
        if "writing_bytes_per_device" in found:
            size = found["writing_bytes_per_device"]
            share = size / found["memory_bytes_of_chip"]
            verdict = "fits" if share <= 1 else "does not fit"
            rows.append(["memory a chip, writing", f"{size / 1e9:.2f} GB, {share:.0%}: {verdict}"])
        for kind, size in found["collective_bytes"].items():
            share = size / found["gradient_bytes"]
            rows.append([kind, f"{size / 1e9:.3f} GB a chip, {share:.3f} of the gradients'"])
        if found["unbounded_loops"]:
            rows.append(["loops counted once", ", ".join(found["unbounded_loops"])])
        rows.append(["compiled in", f"{found['compile_seconds']} s"])
    return Table(found.get("topology", "one step"), ["", f"stage {found['stage']}"], rows)


def memory_table(found: Plan) -> Table:
    """Makes a table of a stage's memory by kind, as estimated and, if compiled, at the program's
    peak, with the largest arrays that are alive there."""
    estimated, real = found["memory_estimate"], found.get("memory_by_kind", {})
    kinds = {kind: (estimated.get(kind), real.get(kind)) for kind in {**estimated, **real}}
    largest = found.get("largest", [])
    rows = [[kind, *map(_gigabytes, sizes)] for kind, sizes in kinds.items()]
    rows.append(["all", *(_gigabytes(sum(each.values()) or None) for each in (estimated, real))])
    rows += [[f"{each['kind']} {each['shape']}", "", _gigabytes(each["bytes"])] for each in largest]
    header = ["GB a device", "estimated", "compiled"]
    if not real:
        header, rows = header[:2], [row[:2] for row in rows]
    return Table(f"stage {found['stage']}", header, rows)


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e9:.3f}"


def totals(found: Plan) -> Table:
    """Makes a table of a run's tokens, FLOPs and hours, a row for each stage and one for all."""
    rows = [[each["stage"], *_total(each, found)] for each in found["stages"]]
    if len(rows) > 1:
        rows.append(["all", *_total(found["total"], found)])
    where = f"{found['devices']} chips, {found['mfu']:.0%} MFU" if found["topology"] else "the run"
    return Table(where, ["stage", "tokens", "FLOPs", "hours", "chip-hours"], rows)


def _total(each: Plan, found: Plan) -> list[str]:
    if not each["total_flops"]:
        return ["by epochs", "", "", ""]
    hours = [
        f"{each['chip_hours'] / n:,.2f}" for n in (found["devices"], 1) if "chip_hours" in each
    ]
    counts = [f"{each[key]:.3g}" for key in ("total_tokens", "total_flops")]
    return [*counts, *(hours or ["", ""])]


def phases(found: Plan) -> Table | None:
    """Makes a table of the model after each swap; None if no blocks are replaced in training."""
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
