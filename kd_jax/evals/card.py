"""Model cards: the README.md of an exported checkpoint, with the metadata that the HF hub reads."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from kd_jax.evals import table
from kd_jax.evals.runs import ordered

AUTO_CLASSES = {
    "mlm": "AutoModelForMaskedLM",
    "clm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "span": "AutoModelForQuestionAnswering",
    "none": "AutoModel",
}
_PIPELINES = {
    "mlm": "fill-mask",
    "clm": "text-generation",
    "classification": "text-classification",
    "span": "question-answering",
    "none": "feature-extraction",
}


def inherited(*folders: Path | None) -> dict[str, Any]:
    """Licence and language that the card of a base model states; the first folder with one."""
    for folder in folders:
        if folder is not None and (Path(folder) / "README.md").exists():
            stated = huggingface_hub.metadata_load(Path(folder) / "README.md") or {}
            return {key: stated[key] for key in ("license", "language") if key in stated}
    return {}


def is_hub_id(model: str) -> bool:
    """Whether `model` can be named in a card: an id, not a path on this machine."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) is not None and not Path(model).exists()


def public_name(model: str) -> str:
    """`model` as others may read it: a hub id, or the last part of a path on this machine."""
    return model if is_hub_id(model) else Path(model).resolve().name


def of_model(
    head: str, size: str, base: str, commit: str | None, stated: Mapping, code: str = ""
) -> str:
    """The card of a checkpoint that was converted, not trained.

    Args:
        head: mlm | clm | classification | span | none.
        size: what the model is, in words.
        base: hub id or folder of the model it was made from.
        commit: of the hub id.
        stated: `inherited` from it.
        code: name of kd_jax's modelling file beside the weights, where there is one.
    """
    made_from = _model({"name": base, "commit": commit})
    summary = f"{size}, converted with kd_jax from {made_from}. The weights are unchanged.\n"
    names = [base] if is_hub_id(base) else []
    title = f"# {public_name(base).rsplit('/', 1)[-1]}\n"
    return "\n".join([_front(head, names, stated, [], []), title, summary, _use(head, code)])


def of_stage(
    stage: str,
    head: str,
    size: str,
    results: Mapping,
    config: Mapping,
    stated: Mapping,
    rows: str,
    code: str = "",
) -> str:
    """The card of a stage of a run.

    Args:
        stage: teacher | baseline | student | ...
        head: mlm | clm | classification | span | none.
        size: see `of_model`.
        results: results.json.
        config: config.json.
        stated: `inherited` from the models the run started from.
        rows: how text became rows, in words.
        code: see `of_model`.
    """
    base = {
        key: {"name": config[key]["model"], "commit": results["models"][key]["commit"]}
        for key in ("teacher", "student")
        if config[key]["model"]
    }
    teacher = _model(base["teacher"]) if "teacher" in base else "a model trained in the same run"
    train, text = config["data"]["train"], results["data"]["train"]["name"]
    if train.get("source", "files") == "files":
        text = re.sub(r"[^\s,]*/", "", text)  # names of files, not where they lie
    made = {
        "teacher": f"trained with kd_jax on {text}: the teacher of a distillation run",
        "baseline": f"trained with kd_jax on {text}, on the labels alone: the baseline of a "
        f"distillation run",
        "prune": f"pruned with kd_jax, by heads and FFN columns of the smallest L1 norm, and then "
        f"trained on {text}. The original is {teacher}",
        "substitute": f"made of another model with kd_jax, by compact blocks that replaced its own "
        f"while it trained on {text}. The original is {teacher}",
    }.get(stage, f"distilled with kd_jax on {text}. The teacher is {teacher}")
    stages = {name: results["stages"][name] for name in ordered(results["stages"])}
    figures = table.of_runs([stages]).markdown()
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    training = (
        f"Configuration {results['config']} ({results['config_hash']}), seed {results['seed']}, "
        f"kd_jax commit {results['commit'] or 'unknown'}; {versions}. Text became rows as "
        f"`kd_jax.json` says: {rows}."
    )
    tags = [] if stage in ("teacher", "baseline") else ["knowledge-distillation"]
    datasets = [train["path"]] if train.get("source") == "hub" else []
    names = list(dict.fromkeys(m["name"] for m in base.values() if is_hub_id(m["name"])))
    return "\n".join(
        [
            _front(head, names, stated, tags, datasets),
            f"# {results['config']}: {stage}\n",
            f"{size}, {made}.\n",
            f"## Figures\n\nOn the {results['split']} split, as the run measured them.\n",
            figures,
            _use(head, code),
            f"## Training\n\n{training}\n",
            "<details><summary>config.json</summary>\n",
            f"```json\n{json.dumps(config, indent=2)}\n```\n\n</details>\n",
        ]
    )


def _front(head: str, base_models: list[str], stated: Mapping, tags, datasets) -> str:
    """YAML front matter; a licence that nobody stated is "unknown", as the hub spells it."""
    data = huggingface_hub.ModelCardData(
        base_model=base_models or None,
        datasets=[name for name in datasets if is_hub_id(name)] or None,
        language=stated.get("language"),
        library_name="transformers",
        license=stated.get("license", "unknown"),
        pipeline_tag=_PIPELINES[head],
        tags=[*tags, "kd_jax"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _model(model: Mapping[str, Any]) -> str:
    commit = f" (commit {model['commit']})" if model.get("commit") else ""
    if not is_hub_id(model["name"]):
        return f"the local checkpoint {public_name(model['name'])}"
    return f"{model['name']}{commit}"


def _use(head: str, code: str) -> str:
    auto, trust, note = AUTO_CLASSES[head], "", ""
    if code:
        trust = ", trust_remote_code=True"
        note = f"Hugging Face has no class for it: `{code}`, which lies here, is the model.\n\n"
    return f"""## Use

{note}```python
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH_OR_HUB_ID")
model = {auto}.from_pretrained("PATH_OR_HUB_ID"{trust})
```
"""
