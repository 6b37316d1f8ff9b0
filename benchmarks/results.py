"""Keeps the figures of finished runs under results/, and the tables of README and docs/ in step.

    python benchmarks/results.py record NAME RUN...    # results/NAME.json from run directories
    python benchmarks/results.py benchmark NAME FILE   # the same from a benchmark's --json=FILE
    python benchmarks/results.py tables                # makes all tables again

Tables stand between `<!-- results: NAME -->` and `<!-- end -->`; the primary figures of several
results, a row for each, between `<!-- summary: NAME NAME -->` and `<!-- end -->`; ways to a small
model, as scored into RUN/perplexity.json and RUN/hellaswag.json, between
`<!-- methods: NAME NAME -->` and `<!-- end -->`; the ends of ensembles and of what they are
compared with between `<!-- ensembles: NAME NAME -->` and `<!-- end -->`. A test renders every one
again and compares.
"""

import argparse
import json
import os
import re
import statistics
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from kd_jax.models import surgery
from kd_jax.report import quantities, runs, table, tables
from kd_jax.run import workdir

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
KEPT = ("config", "config_hash", "commit", "seed", "machine", "versions", "split", "stages")
KEPT += ("task", "primary", "roles", "rounds", "trend", "weights")
Row = dict[str, Any]  # of a benchmark, as its --json has it


def record(name: str, workdirs: list[str], note: str) -> Path:
    """Writes results/NAME.json; every run must be finished and of the same config but the seed."""
    found = [runs.read(workdir) for workdir in workdirs]
    configs = [run.config | {"seed": None} for run in found]
    if any(config != configs[0] for config in configs):
        raise SystemExit("error: the runs differ in more than the seed; record them apart")
    entry = {
        "note": note,
        "command": (found[0].workdir / "command.txt").read_text().splitlines()[0].split(" ", 1)[1],
        "config": configs[0],
        "runs": [_kept(run) for run in found],
    }
    return _write(name, entry)


def _kept(run: runs.Run) -> dict:
    kept = {key: run.results[key] for key in KEPT if key in run.results}
    scored = tables.read_scores(run.workdir)
    return kept | ({"scores": scored} if scored else {})


def _write(name: str, entry: dict) -> Path:
    page = json.dumps(entry, indent=1)
    # Not where data and runs lay on this machine.
    if folder := os.environ.get("KD_JAX_DATA"):
        page = page.replace(folder, "$KD_JAX_DATA")
    page = re.sub(r"/[^\s\"=]*/(?=runs/)", "", page)
    path = ROOT / "results" / f"{name}.json"
    path.write_text(page + "\n")
    return path


def keep_rows(name: str, rows: list[Row], command: str, note: str) -> Path:
    """Writes results/NAME.json from the rows that a benchmark measured here."""
    stated = workdir.manifest()
    entry = {
        "note": note,
        "command": command,
        "commit": stated["commit"],
        "machine": stated["machine"],
        "rows": rows,
    }
    return _write(name, entry)


def keep_benchmark(name: str, file: str, command: str, note: str) -> Path:
    """Writes results/NAME.json from the rows in a benchmark's --json=FILE."""
    rows = json.loads(Path(file).read_text())
    return keep_rows(name, rows if isinstance(rows, list) else [rows], command, note)


def rows_of(name: str) -> list[Row]:
    """Reads the rows of results/NAME.json; none if there is no such file."""
    return _entry(name)["rows"] if (ROOT / "results" / f"{name}.json").exists() else []


def _table(rows: list[Row]) -> str:
    """Markdown of the rows of one benchmark, which their keys tell."""
    if not rows:
        return "No row has been made yet.\n"
    for key, make in _TABLES.items():
        if key in rows[0]:
            return make(rows)
    raise ValueError(f"no benchmark writes rows with {', '.join(rows[0])}")


def _pretraining(rows: list[Row]) -> str:
    header = ["case", "precision", "system", "s/step", "tokens/s", "peak GB", "times kd_jax's"]
    found = []
    for row in rows:
        times = "" if row["system"] == "kd_jax" else f"{row['ratio']:.2f}"
        speed = [f"{row['median_s']:.3f}", f"{row['tokens_per_s']:,.0f}"]
        found.append([row["case"], row["precision"], row["system"], *speed, _memory(row), times])
    return _with_allocators(rows, header, found, labels=3)


def _finetuning(rows: list[Row]) -> str:
    header = ["work", "precision", "system", "sentences/s", "peak GB", "times the best PyTorch row"]
    found = [
        [
            *(row["work"], row["precision"], row["system"]),
            *(f"{row['sentences_per_s']:,.1f}", _memory(row), f"{row['ratio']:.2f}"),
        ]
        for row in rows
    ]
    return _with_allocators(rows, header, found, labels=3)


def _hellaswag(rows: list[Row]) -> str:
    header = ["system", "s/pass", "endings/s", "peak GB", "times the best PyTorch row", "Δ log p"]
    found = [
        [
            *(row["system"], f"{row['pass_s']:.2f}", f"{row['endings_per_s']:,.0f}"),
            *(_memory(row), f"{row['ratio']:.2f}", f"{row['apart']:.1e}"),
        ]
        for row in rows
    ]
    return _with_allocators(rows, header, found, labels=1)


def _embedding(rows: list[Row]) -> str:
    header = ["system", "s/pass", "texts/s", "peak GB", "times the best PyTorch row", "difference"]
    header += ["least cosine"]
    found = [
        [
            *(row["system"], f"{row['pass_s']:.2f}", f"{row['texts_per_s']:,.0f}", _memory(row)),
            *(f"{row['ratio']:.2f}", f"{row['apart']:.1e}", f"{row['cosine']:.4f}"),
        ]
        for row in rows
    ]
    return _with_allocators(rows, header, found, labels=1)


def _embedding_steps(rows: list[Row]) -> str:
    header = ["layers of the student", "system", "s/step", "texts/s", "peak GB", "times kd_jax's"]
    ours = {row["layers"]: row["step_s"] for row in rows if row["system"] == "kd_jax"}
    found = [
        [
            *(str(row["layers"]), row["system"], f"{row['step_s']:.3f}"),
            *(f"{row['texts_per_s']:,.0f}", _memory(row)),
            f"{row['step_s'] / ours[row['layers']]:.2f}",
        ]
        for row in rows
    ]
    return table.Table("", header, found, labels=2).markdown()


def _layers(rows: list[Row]) -> str:
    """The best three choices of each number of layers, and the evenly spaced one."""
    found, depth = [], max(len(row["kept"]) for row in rows)
    for layers in dict.fromkeys(len(row["kept"]) for row in rows):
        own = sorted(
            (row for row in rows if len(row["kept"]) == layers), key=lambda row: -row["spearman"]
        )
        even = surgery.layer_map("uniform", layers, depth)
        for row in own:
            if row in own[:3] or row["kept"] == even:
                spaced = "evenly spaced" if row["kept"] == even else ""
                kept = ", ".join(map(str, row["kept"]))
                found.append([str(layers), kept, spaced, f"{row['spearman']:.4f}"])
    return table.Table("", ["layers", "which", "", "Spearman correlation"], found, 3).markdown()


def _graphs(rows: list[Row]) -> str:
    header = ["graph", "MB", "Spearman correlation", "texts/s, batch 32", "ms for one text"]
    found = [
        [
            *(row["graph"], f"{row['mb']:.1f}", f"{row['spearman']:.4f}"),
            *(f"{row['throughput']:,.0f}", f"{row['latency_ms']:.2f}"),
        ]
        for row in rows
    ]
    return table.Table("", header, found, labels=1).markdown()


def _with_allocators(rows: list[Row], header: list[str], found: list[list], labels: int) -> str:
    """Adds the allocator of the better runs (benchmarks/rounds.py), where both were timed."""
    if "allocators" in rows[0]:
        header = [*header, "allocator"]
        best = (min(row["allocators"], key=row["allocators"].get) for row in rows)
        found = [[*cells, allocator] for cells, allocator in zip(found, best, strict=True)]
    return table.Table("", header, found, labels=labels).markdown()


def _memory(row: Row) -> str:
    return f"{row['peak_bytes'] / 1e9:.2f}"


def _sweep(rows: list[Row]) -> str:
    (found,) = rows
    together, trials = found["sweep"]["parts"], found["trials"]
    alone = {
        part: trials * statistics.fmean(run["parts"][part] for run in found["separate"])
        for part in found["separate"][0]["parts"]
    }
    seconds = [
        [part, *(f"{each[part]:,.0f}" if part in each else "" for each in (together, alone))]
        for part in dict.fromkeys([*together, *alone])
    ]
    total = [f"{found['sweep']['seconds']:,.0f}", f"{found['separate_total_s']:,.0f}"]
    seconds.append(["all", *total])
    header = ["seconds", "one sweep", f"{trials} runs of their own"]
    return table.Table("", header, seconds, labels=1).markdown()


def _ensemble(rows: list[Row]) -> str:
    header = ["way", "round", "step (ms)", "of round 1's", "pass (s)", "amortised (ms)"]
    header += ["peak GB", "of round 1's", "GB with evaluation", "of round 1's"]
    found = [
        [
            *(
                row["way"],
                str(row["round"]),
                f"{1e3 * row['step_s']:.1f}",
                f"{row['step_ratio']:.2f}",
            ),
            *(f"{row['pass_s']:.1f}", f"{1e3 * row['amortised_s']:.1f}", _memory(row)),
            *(f"{row['peak_ratio']:.2f}", f"{row['judged_peak_bytes'] / 1e9:.2f}"),
            f"{row['judged_peak_ratio']:.2f}",
        ]
        for row in rows
    ]
    return table.Table("", header, found, labels=2).markdown()


def _plans(rows: list[Row]) -> str:
    header = ["step", "chips", "fsdp", "micro-batches", "GB a chip", "of it", "weights", "moments"]
    header += ["gradients", "gathered", "logits", "activations", "FLOPs", "GB exchanged"]
    header += ["hours", "compile (CPU-s)"]
    found = []
    for row in rows:
        cells = [row["title"], row["topology"], str(row["mesh"]["fsdp"]), str(row["accumulate"])]
        if "error" in row:
            found.append([*cells, "does not fit", *[""] * (len(header) - 5)])
            continue
        used, kinds = row["memory_bytes_per_device"], dict(row["memory_by_kind"])
        kinds["weights"] += kinds.pop("teacher")
        cells += [f"{used / 1e9:.2f}", f"{used / row['memory_bytes_of_chip']:.0%}"]
        cells += [f"{kinds.get(kind, 0) / 1e9:.2f}" for kind in header[6:12]]
        cells += [f"{row['flops_compiled'] / row['flops_needed']:.3f}"]
        cells += [f"{sum(row['collective_bytes'].values()) / 1e9:.2f}", f"{row['hours']:.1f}"]
        found.append([*cells, f"{row['compile_cpu_seconds']:,.0f}"])
    return table.Table("", header, found, labels=2).markdown()


def _rooflines(rows: list[Row]) -> str:
    kinds = dict.fromkeys(kind for row in rows for kind in row["kinds"])
    header = ["program", "ms", "ms of FLOPs at peak", *kinds]
    found = []
    for row in rows:
        parts = [f"{row['kinds'].get(kind, {}).get('ms', 0.0):.1f}" for kind in kinds]
        found.append([row["roofline"], f"{row['ms']:.1f}", f"{row['flops_ms']:.1f}", *parts])
    return table.Table("", header, found, labels=1).markdown()


def _accelerator(rows: list[Row]) -> str:
    header = ["work", "system", "tokens/s", "MFU", "peak GB", "ms", "times kd_jax's"]
    found = []
    for row in rows:
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        cells = [row["accelerator"], row["system"], f"{row['tokens_per_s']:,.0f}", mfu]
        found.append([*cells, _memory(row), f"{1e3 * row['median_s']:.1f}", f"{row['ratio']:.2f}"])
    return table.Table("", header, found, labels=2).markdown()


def _losses(rows: list[Row]) -> str:
    parts = {"value": "value", "features": "grad features", "unembedding": "grad unembedding"}
    header = ["loss", "precision", "system", "s", "times kd_jax's", "peak GB"]
    header += [f"error of {part}" for part in parts.values()]
    found = [
        [
            *(row["loss"], row["precision"], row["system"], f"{row['median_s']:.2f}"),
            *(f"{row['ratio']:.2f}", _memory(row)),
            *(f"{row['errors'][part]:.2e}" for part in parts),
        ]
        for row in rows
    ]
    return _with_allocators(rows, header, found, labels=3)


def _onpolicy(rows: list[Row]) -> str:
    header = ["precision", "system", "s/step", "writing", "learning", "CPU s", "tokens written"]
    header += ["times kd_jax's", "of its writing", "first step (s)", "peak GB"]
    found = []
    for row in rows:
        seconds = (f"{row[key]:.3f}" for key in ("median_s", "writing_s", "learning_s", "cpu_s"))
        ratios = (f"{row[key]:.2f}" if row[key] else "" for key in ("ratio", "writing_ratio"))
        cells = [row["precision"], row["onpolicy"], *seconds, f"{row['tokens']:,.0f}", *ratios]
        found.append([*cells, f"{row['first_s']:.1f}", _memory(row)])
    return _with_allocators(rows, header, found, labels=2)


def _written(rows: list[Row]) -> str:
    header = ["tokens are chosen", "system", "s", "tokens/s", "times kd_jax's"]
    found = []
    for row in rows:
        speed = f"{row['prompts'] * row['tokens'] / row['median_s']:,.0f}"
        cells = row["written"], row["system"], f"{row['median_s']:.4f}", speed
        found.append([*cells, f"{row['ratio']:.2f}"])
    return table.Table("", header, found, labels=2).markdown()


def _arms(rows: list[Row]) -> str:
    """A table for each way in which arms were made equal: means over seeds, and the differences
    to the arm that `against` names, paired by seed."""
    pages = []
    for equal in dict.fromkeys(row["equal"] for row in rows):
        arms: dict[str, list[Row]] = {}
        for row in sorted((row for row in rows if row["equal"] == equal), key=itemgetter("seed")):
            arms.setdefault(row["arm"], []).append(row)
        figures = quantities.of_keys({"perplexity", *rows[0]})  # of language models
        figures = [figure for figure in figures if figure.key in rows[0]]
        header = ["arm", "steps", "s", *(figure.title for figure in figures)]
        first = next(figure for key in rows[0] for figure in figures if figure.key == key)
        found, whole = [], arms.get("teacher")
        if whole:
            header.append(f"of the teacher's {first.title}")
        for arm, own in arms.items():
            seconds = statistics.fmean(row["seconds"] for row in own)
            cells = [arm, f"{own[0]['steps']:,}", f"{seconds:.0f}"]
            cells += (quantities.mean(figure, own) for figure in figures)
            if whole:
                share = quantities.average(first, own) / quantities.average(first, whole)
                cells.append(f"{share:.1%}")
            found.append(cells)
            rival = arms.get(own[0]["against"], [])
            if [row["seed"] for row in rival] == [row["seed"] for row in own]:
                pairs = (quantities.compare(figure, own, rival) for figure in figures)
                shown = ["" if pair is None else pair.show() for pair in pairs]
                found.append([f"- {own[0]['against']}", "", "", *shown, *[""] * bool(whole)])
        seeds = max(map(len, arms.values()))
        title = (
            f"equal {equal}, {seeds} seeds: mean ± standard deviation; differences ± their error"
        )
        pages.append(table.Table(title, header, found).markdown())
    return "\n".join(pages)


_TABLES = {
    "arm": _arms,
    "onpolicy": _onpolicy,
    "written": _written,
    "loss": _losses,
    "plan": _plans,
    "roofline": _rooflines,
    "accelerator": _accelerator,
    "way": _ensemble,
    "case": _pretraining,
    "work": _finetuning,
    "endings_per_s": _hellaswag,
    "layers": _embedding_steps,
    "graph": _graphs,
    "kept": _layers,
    "texts_per_s": _embedding,
    "separate": _sweep,
}


def _of_benchmark(entry: dict) -> str:
    machine = f"{entry['machine']['cores']} cores of {entry['machine']['cpu']}"
    source = f"`{entry['command']}`; {machine}; commit {entry['commit'][:9]}. {entry['note']}"
    return f"{_table(entry['rows'])}\n{source.rstrip()}\n"


def _entry(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text())


def _where(entry: dict) -> str:
    """Machine, types, seeds and commits of the runs."""
    found = entry["runs"]
    machine = found[0]["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}"
    if machine["platform"] != "cpu":
        where = f"{machine['devices']} x {machine['device']}"
    seeds = ", ".join(str(run["seed"]) for run in found)
    commits = ", ".join(sorted({run["commit"][:9] for run in found}))
    return f"{where}, {entry['config']['precision']}; seeds {seeds}; commit {commits}"


def render(name: str) -> str:
    """The Markdown of results/NAME.json: table, classes, then where it comes from."""
    entry = _entry(name)
    if "rows" in entry:
        return _of_benchmark(entry)
    first = entry["runs"][0]
    page = table.of_runs(entry["runs"], f"{first['config']}, {first['split']} split").markdown()
    classes = tables.by_class(name, entry["runs"])
    if classes is not None:
        page += f"\n{classes.markdown()}"
    rounds = tables.by_round(name, entry["runs"])
    if rounds is not None:
        page += f"\n{rounds.markdown()}\n{tables.rounds_in_words(entry['runs'])}\n"
    return f"{page}\n`results/{name}.json`: {_where(entry)}. {entry['note']}".rstrip() + "\n"


def compared(*names: str) -> str:
    """Ways to a small model; a stage of a later result replaces an earlier one's."""
    scored = tables.by_seed(*(_entry(name)["runs"] for name in names))
    page = f"{tables.methods('', scored).markdown()}\n{tables.methods_in_words(scored)}\n"
    return f"{page}\n{_sources(names)}\n"


def ensembles(*names: str) -> str:
    """The ends of ensembles, under what their names add to the first one's."""
    groups = {name.removeprefix(f"{names[0]}_"): _entry(name)["runs"] for name in names}
    return f"{tables.ensembles(groups).markdown()}\n{_sources(names)}\n"


def _sources(names: Sequence[str]) -> str:
    entries = [_entry(name) for name in names]
    files = ", ".join(f"`results/{name}.json`" for name in names)
    places = "; ".join(dict.fromkeys(_where(entry) for entry in entries))
    notes = " ".join(entry["note"] for entry in entries if entry["note"])
    return f"{files}: {places}. {notes}".rstrip()


def summary(*names: str) -> str:
    """The primary figure of several results, a row for each."""
    rows, sources = [], set()
    for name in names:
        entry = _entry(name)
        stages, figure = [run["stages"] for run in entry["runs"]], table.primary_of(entry["runs"])
        names = ("teacher", "baseline", "student")
        paired = quantities.compare_stages(figure, "student", "baseline", stages)
        middle = {n: quantities.average(figure, quantities.of(n, stages)) for n in names}
        speed = [run["student"]["throughput"] / run["teacher"]["throughput"] for run in stages]
        row = [name.removeprefix("small_"), figure.title]
        row += [quantities.mean(figure, quantities.of(n, stages)) for n in names]
        row += [paired.show(), f"{paired.mean / paired.error:.1f}"]
        row += [f"{100 * middle['student'] / middle['teacher']:.1f}%"]
        rows.append([*row, f"{statistics.median(speed):.2f} x"])
        sources.add(_where(entry))
    header = ["task", "figure", "teacher", "baseline", "student", "student - baseline"]
    header += ["in standard errors", "student keeps", "its samples/s"]
    page = table.Table("", header, rows, labels=2).markdown()
    return f"{page}\n{'; '.join(sorted(sources))}.\n"


MAKERS = {"results": render, "summary": summary, "methods": compared, "ensembles": ensembles}
MARKED = re.compile(rf"(<!-- ({'|'.join(MAKERS)}): ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str) -> str:
    """Renders every marked table of a page again."""

    def replace(match: re.Match) -> str:
        return match[1] + MAKERS[match[2]](*match[3].split()) + match[4]

    return MARKED.sub(replace, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    keep = commands.add_parser("record", help="write results/NAME.json from finished runs")
    keep.add_argument("name")
    keep.add_argument("runs", nargs="+")
    speed = commands.add_parser("benchmark", help="write results/NAME.json from measured rows")
    speed.add_argument("name")
    speed.add_argument("file")
    for each in (keep, speed):
        each.add_argument("--note", default="", help="a sentence to stand under the table")
    speed.add_argument("--command", dest="ran", default="python benchmarks/pretrain_step.py")
    commands.add_parser("tables", help="make the tables of README and docs/ again")
    options = parser.parse_args()
    if options.command == "record":
        print(record(options.name, options.runs, options.note))
    elif options.command == "benchmark":
        print(keep_benchmark(options.name, options.file, options.ran, options.note))
    else:
        for page in PAGES:
            page.write_text(rendered(page.read_text()))


if __name__ == "__main__":
    main()
