"""Writes model cards: README.md of an exported checkpoint, with metadata for the HF hub."""

import importlib.resources
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import jinja2

from kd_jax.report import quantities, table
from kd_jax.report.runs import roles

# Writes a card, given what lies next to the weights: the name of kd_jax's modelling file, or "",
# transformers' class for the tokenizer, or None, and what recipes/onnx.py measured, if anything.
Page = Callable[..., str]
_METRICS = {"macro_f1": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}  # as the hub says


class Head(NamedTuple):
    """The names and example code by which a card shows how to use a model with a head."""

    auto: str  # transformers' class
    pipeline: str  # the hub's name of its task
    last: str  # the last lines of a program that uses it
    texts: str = '"This is a text"'
    types: str = ", return_token_type_ids=False"
    library: str = "transformers"


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
        "",
    ),
    "embedding": Head(
        "AutoModel",
        "sentence-similarity",
        'vectors = model.encode(["This is a text", "This is another"])\n'
        "print(model.similarity(vectors, vectors))",
        library="sentence-transformers",
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
    """Returns a name of `model` for others: a hub id, or the last component of a local path."""
    return model if is_hub_id(model) else Path(model).resolve().name


def _public(value: Any) -> Any:
    """Shortens local paths and storage URLs in a config's value to their last components, for
    others to read."""
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
) -> Page:
    """Writes the card of a checkpoint that was converted, not trained; see `Page`.

    Args:
        head: mlm | clm | classification | span | embedding | none.
        size: what the model is, in words.
        base: hub id or folder of the model it was made from.
        commit: of the hub id.
        stated: `inherited` from it.
    """
    made_from = _model({"name": base, "commit": commit})
    return _write(
        head,
        metadata={"base_model": [base] if is_hub_id(base) else []} | stated,
        title=public_name(base).rsplit("/", 1)[-1],
        about=f"{size}, converted with kd_jax from {made_from}. The weights are unchanged.",
    )


def of_stage(
    stage: str,
    head: str,
    size: str,
    results: Mapping,
    config: Mapping,
    stated: Mapping,
    rows: str,
    made: str = "",
) -> Page:
    """Writes the card of a stage of a run; see `Page`.

    Args:
        stage: teacher | baseline | student | ...
        head: mlm | clm | classification | span | embedding | none.
        size: see `of_model`.
        results: results.json.
        config: config.json.
        stated: `inherited` from the models the run started from.
        rows: how text became rows, in words.
        made: how the model was made before it was trained, where it was made of another one.
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
    tags = [] if stage in (who.teacher, who.baseline) else ["knowledge-distillation"]
    datasets = [train["path"]] if train.get("source") == "hub" else []
    datasets = [name for name in datasets if is_hub_id(name)]
    names = list(dict.fromkeys(m["name"] for m in base.values() if is_hub_id(m["name"])))
    return _write(
        head,
        metadata={"base_model": names, "datasets": datasets, "tags": tags}
        | stated
        | _measured(stage, head, results, datasets),
        title=f"{results['config']}: {stage}",
        about=f"{size}, {how}.",
        results=results,
        figures=table.of_runs([results]).markdown().rstrip(),
        rows=rows,
        config=json.dumps(_public(config), indent=2),
    )


def _write(head: str, metadata: Mapping[str, Any], **values: Any) -> Page:
    """Fills the template card.md. It has a licence only if a base model's card states one."""
    tags = [*metadata.get("tags", ()), "kd_jax"]
    known = {key: value or None for key, value in metadata.items()} | {"tags": tags}
    data = huggingface_hub.ModelCardData(
        library_name=HEADS[head].library, pipeline_tag=HEADS[head].pipeline, **known
    )
    text = importlib.resources.files(__package__).joinpath("card.md").read_text()
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    values |= {"front": data.to_yaml(), "head": HEADS[head]}
    template = environment.from_string(text)

    def page(code: str, reader: str | None, onnx: Mapping[str, Any] | None = None) -> str:
        return template.render(values, code=code, reader=reader, onnx=onnx)

    return page


def _measured(stage: str, head: str, results: Mapping, datasets: list[str]) -> dict[str, Any]:
    """Gathers the metrics of a stage for a card's model-index."""
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
    """Returns the names of files without their folders."""
    return re.sub(r"[^\s,]*/", "", files) if not is_hub_id(files) else files


def _model(model: Mapping[str, Any]) -> str:
    commit = f" (commit {model['commit']})" if model.get("commit") else ""
    if not is_hub_id(model["name"]):
        return f"the local checkpoint {public_name(model['name'])}"
    return f"{model['name']}{commit}"
