"""Model cards: the README.md of an exported checkpoint, with the metadata that the HF hub reads."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from kd_jax.report import quantities, table
from kd_jax.report.runs import roles

_METRICS = {"macro_f1": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}  # as the hub says


class Head(NamedTuple):
    """How a model with a head is used."""

    auto: str  # transformers' class
    pipeline: str  # the hub's name of its task
    last: str  # the last lines of a program that uses it
    texts: str = '"This is a text"'


HEADS = {
    "mlm": Head(
        "AutoModelForMaskedLM",
        "fill-mask",
        "best = model(**inputs).logits.argmax(-1)  # of every place\n"
        "print(tokenizer.decode(best[0]))",
        'f"This is a {tokenizer.mask_token}"',
    ),
    "clm": Head(
        "AutoModelForCausalLM",
        "text-generation",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=16)[0]))",
    ),
    "classification": Head(
        "AutoModelForSequenceClassification",
        "text-classification",
        "print(model(**inputs).logits, model.config.id2label)",
    ),
    "span": Head(
        "AutoModelForQuestionAnswering",
        "question-answering",
        "output = model(**inputs)  # scores of each token as the answer's first and last one\n"
        "print(output.start_logits, output.end_logits)",
        '"What is this?", "This is a text"',
    ),
    "none": Head(
        "AutoModel", "feature-extraction", "print(model(**inputs).last_hidden_state.shape)"
    ),
}


def inherited(*folders: Path | None) -> dict[str, Any]:
    """Reads licence and language from the card of a base model; the first folder that has one."""
    for folder in folders:
        if folder is not None and (Path(folder) / "README.md").exists():
            stated = huggingface_hub.metadata_load(Path(folder) / "README.md") or {}
            return {key: stated[key] for key in ("license", "language") if key in stated}
    return {}


def is_hub_id(model: str) -> bool:
    """Tells whether `model` can be named in a card: an id, not a path on this machine."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", model) is not None and not Path(model).exists()


def public_name(model: str) -> str:
    """Names `model` as others may read it: a hub id, or the last part of a path on this machine."""
    return model if is_hub_id(model) else Path(model).resolve().name


def _public(value: Any) -> Any:
    """Makes of a config's value what others may read: of paths on this machine, or of its stores,
    only their last parts."""
    if isinstance(value, Mapping):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_public(each) for each in value]
    if not isinstance(value, str) or value.startswith(("http://", "https://")):
        return value
    local = re.match(r"~|\.{0,2}/|\w+://", value) or ("/" in value and Path(value).exists())
    return re.sub(r"[^\s,]*/", "", value.rstrip("/")) if local else value


def of_model(
    head: str,
    size: str,
    base: str,
    commit: str | None,
    stated: Mapping,
    code: str = "",
    reader: str | None = "AutoTokenizer",
) -> str:
    """Writes the card of a checkpoint that was converted, not trained.

    Args:
        head: mlm | clm | classification | span | none.
        size: what the model is, in words.
        base: hub id or folder of the model it was made from.
        commit: of the hub id.
        stated: `inherited` from it.
        code: name of kd_jax's modelling file next to the weights, or "".
        reader: transformers' class for the tokenizer next to the weights, or None.
    """
    made_from = _model({"name": base, "commit": commit})
    summary = f"{size}, converted with kd_jax from {made_from}. The weights are unchanged.\n"
    names = [base] if is_hub_id(base) else []
    title = f"# {public_name(base).rsplit('/', 1)[-1]}\n"
    front = _front(head, names, stated, [], [], {})
    return "\n".join([front, title, summary, _use(head, code, reader)])


def of_stage(
    stage: str,
    head: str,
    size: str,
    results: Mapping,
    config: Mapping,
    stated: Mapping,
    rows: str,
    made: str = "",
    code: str = "",
    reader: str | None = "AutoTokenizer",
) -> str:
    """Writes the card of a stage of a run.

    Args:
        stage: teacher | baseline | student | ...
        head: mlm | clm | classification | span | none.
        size: see `of_model`.
        results: results.json.
        config: config.json.
        stated: `inherited` from the models the run started from.
        rows: how text became rows, in words.
        made: how the model was made before it was trained, where it was made of another one.
        code, reader: see `of_model`.
    """
    base = {
        key: {"name": config[key]["model"], "commit": results["models"][key]["commit"]}
        for key in ("teacher", "student")  # sections of the config
        if config[key]["model"] and key in results["models"]
    }
    teacher = _model(base["teacher"]) if "teacher" in base else "a model trained in the same run"
    train, text = config["data"]["train"], results["data"]["train"]["name"]
    if train.get("source", "files") == "files":
        text = _named(text)
    who, trained = roles(results), f"trained with kd_jax on {text}"
    if made:
        how = f"{made} {text}. The original is {teacher}"
    elif stage == who.teacher:
        how = f"{trained}: the teacher of a distillation run"
    elif stage == who.baseline:
        how = f"{trained}, on the labels alone: the baseline of a distillation run"
    else:
        how = f"distilled with kd_jax on {text}. The teacher is {teacher}"
    versions = ", ".join(f"{k} {v}" for k, v in results["versions"].items())
    training = (
        f"Configuration {results['config']} ({results['config_hash']}), seed {results['seed']}, "
        f"kd_jax commit {results['commit'] or 'unknown'}; {versions}. Text became rows as "
        f"`kd_jax.json` says: {rows}."
    )
    tags = [] if stage in (who.teacher, who.baseline) else ["knowledge-distillation"]
    datasets = [train["path"]] if train.get("source") == "hub" else []
    datasets = [name for name in datasets if is_hub_id(name)]
    names = list(dict.fromkeys(m["name"] for m in base.values() if is_hub_id(m["name"])))
    return "\n".join(
        [
            _front(head, names, stated, tags, datasets, _measured(stage, head, results, datasets)),
            f"# {results['config']}: {stage}\n",
            f"{size}, {how}.\n",
            f"## Figures\n\nOn the {results['split']} split, as the run measured them.\n",
            table.of_runs([results]).markdown(),
            _use(head, code, reader),
            f"## Training\n\n{training}\n",
            "<details><summary>config.json</summary>\n",
            f"```json\n{json.dumps(_public(config), indent=2)}\n```\n\n</details>\n",
        ]
    )


def _measured(stage: str, head: str, results: Mapping, datasets: list[str]) -> dict[str, Any]:
    """Gathers the figures of quality of a stage, for a card's model-index."""
    figures, data = results["stages"].get(stage, {}), results["data"]
    name = _named(data.get(results["split"], data["train"])["name"])
    found = [
        huggingface_hub.EvalResult(
            task_type=HEADS[head].pipeline,
            dataset_type=datasets[0] if datasets else name,
            dataset_name=name,
            dataset_split=results["split"],
            metric_type=_METRICS.get(figure.key, figure.key),
            metric_name=figure.title,
            metric_value=round(figures[figure.key], 6),
        )
        for figure in quantities.quality([{stage: figures}])
        if math.isfinite(figures[figure.key])
    ]
    return dict(model_name=f"{results['config']}: {stage}", eval_results=found) if found else {}


def _named(files: str) -> str:
    """Names files without the folders they lie in."""
    return re.sub(r"[^\s,]*/", "", files) if not is_hub_id(files) else files


def _front(
    head: str, base_models: list[str], stated: Mapping, tags, datasets, measured: Mapping
) -> str:
    """Writes the YAML front matter; with a licence only where a base model's card states one."""
    data = huggingface_hub.ModelCardData(
        base_model=base_models or None,
        datasets=datasets or None,
        language=stated.get("language"),
        library_name="transformers",
        license=stated.get("license"),
        pipeline_tag=HEADS[head].pipeline,
        tags=[*tags, "kd_jax"],
        **measured,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _model(model: Mapping[str, Any]) -> str:
    commit = f" (commit {model['commit']})" if model.get("commit") else ""
    if not is_hub_id(model["name"]):
        return f"the local checkpoint {public_name(model['name'])}"
    return f"{model['name']}{commit}"


def _use(head: str, code: str, reader: str | None) -> str:
    """Writes how to load and call it: a program that runs in the export's folder."""
    auto, trust, notes = HEADS[head].auto, "", ""
    if code:
        trust = ", trust_remote_code=True"
        notes = f"Hugging Face has no class for it: `{code}`, which lies here, is the model.\n\n"
    loaded = f"model = {auto}.from_pretrained(source{trust})"
    if reader is None:
        names, lines = auto, [loaded]
    else:
        names = ", ".join(sorted((auto, reader)))
        types = "" if head == "span" else ", return_token_type_ids=False"
        lines = [
            f"tokenizer = {reader}.from_pretrained(source)",
            loaded,
            f'inputs = tokenizer({HEADS[head].texts}, return_tensors="pt"{types})',
            HEADS[head].last,
        ]
    if reader not in (None, "AutoTokenizer"):
        notes += (
            "The tokenizer is not of the class that belongs to this kind of model: AutoTokenizer "
            "of transformers 5 would read other tokens.\n\n"
        )
    program = "\n".join(lines)
    return f"""## Use

{notes}```python
from transformers import {names}

source = "."  # this folder, or its id on the hub
{program}
```
"""
