"""Held-out figures of a checkpoint, or of a stage of a run: loss, perplexity, accuracy.

Beside a teacher also the divergence from it, and how often both choose the same token. The eval
step, the masks and the sums are those of training, so that a run's stage evaluated on the run's own
split gives what its results.json says.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerBase

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.evals import runs
from kd_jax.models import family
from kd_jax.objectives import combine
from kd_jax.precision import Policy, policy_for
from kd_jax.recipes import blueprint, provenance, workdir
from kd_jax.recipes.blueprint import Blueprint
from kd_jax.recipes.stage import count, given_params, restore_best, size_mb
from kd_jax.tasks import text
from kd_jax.train import sharding
from kd_jax.train.passes import evaluate
from kd_jax.train.step import Plan
from kd_jax.types import Model, Params

ROWS = 32  # of a batch, where neither the user nor a run says otherwise
TOKENS = 512  # of a row, likewise, unless the model takes fewer

Report = dict[str, Any]  # see `evaluate_checkpoint`
Checkpoint = tuple[Blueprint, Params]


@dataclasses.dataclass(frozen=True)
class Options:
    """What may be left (None) to the run, or else to a default."""

    teacher: str | None = None  # folder or hub id
    text: str | None = None  # column of the text, or of the messages of chats
    separator: str | None = None  # eos | bos, clm: as in the model's training
    seq_len: int | None = None  # tokens
    batch_size: int | None = None  # rows over all devices
    precision: str | None = None  # fp32 | bf16


def evaluate_checkpoint(
    model: str, revision: str | None, task: str, data: str, options: Options
) -> Report:
    """Figures of an HF checkpoint on text, read with the checkpoint's own tokenizer.

    Args:
        model: folder, or hub id of `revision`.
        task: mlm | clm, a module of kd_jax.tasks.
        data: file, folder or glob.
        options: defaults are no teacher, rows of text as in the model's training where its folder
            says how (recipes/provenance.py), else of 512 tokens (or as many as the models take);
            batches of 32 rows, fp32.

    Returns:
        {"model", "commit", "teacher", "task", "data", "split", "seq_len", "separator" (clm),
        "batch_size", "precision", "loss" (nats a token), "perplexity", "accuracy", beside a
        teacher "kl" (teacher || model at T = 1, nats a token) and "agreement", "parameters",
        "size_mb", "machine", "seconds"}.

    Raises UserError for what is wrong with any of these, and where the model has no such head or
    no tokenizer, or the teacher has another one.
    """
    make_task = plugins.load("tasks", task, "make").make
    head = make_task({"name": task}, None, None).head
    precision, mesh = options.precision or "fp32", sharding.make_mesh()
    policy = policy_for(precision, jax.default_backend())
    batch_size = options.batch_size or -(-ROWS // mesh.size) * mesh.size
    check_rows(batch_size)
    described = blueprint.describe(section(model, revision), "--model", head, policy)
    tokenizer = text.load_tokenizer(described.folder)
    student = described, described.load(None)
    teacher = _teacher(options.teacher, head, policy, tokenizer)
    most = min(each[0].config.max_tokens for each in (student, teacher) if each is not None)
    given = {"seq_len": options.seq_len, "separator": options.separator}
    source = _source(task, data, options, given)
    config = provenance.task_of(described.folder, task, given, tokenizer)
    if config.setdefault("seq_len", min(TOKENS, most)) > most:
        raise UserError(
            f"--seq_len={config['seq_len']}: the models have positions for {most} tokens"
        )
    texts = make_task(config, {"test": source}, tokenizer)
    stated = {"model": described.name, "task": task, "precision": precision}
    stated["data"] = texts.prepare()["test"]
    return stated | _measure(student, teacher, texts, "test", batch_size, mesh)


def evaluate_stage(
    folder: str,
    stage: str,
    task: str | None,
    data: str | None,
    split: str | None,
    options: Options,
) -> Report:
    """Figures of the best checkpoint of a finished run's stage; see `evaluate_checkpoint`.

    Args:
        folder: the run directory.
        stage: one that the run trained.
        task: None, or the run's.
        data: file, folder or glob; None for the run's own.
        split: of the run's own data, validation | test; None for the one that it reports.
        options: defaults are the run's settings and its teacher.
    """
    run = runs.read(folder)
    trained = [name for name in run.stages if name in run.config["stages"]]
    if stage not in trained:  # what was only judged has no checkpoint
        raise run.no_stage(stage, trained)
    config, manifest = for_these_devices(run.config, options), run.results["data"]
    if task not in (None, config.task.name):
        raise UserError(f"{folder} is a run of task {config.task.name!r}, not {task!r}")
    split = "test" if data else split or run.results["split"]
    if data:
        config.data = ConfigDict({"test": _source(config.task.name, data, options, config.task)})
    elif split not in manifest:
        raise UserError(f"{folder} has no split {split!r}; have: {', '.join(manifest)}")
    setup = plugins.load("recipes", config.recipe, "run").Setup(config, run.workdir)
    stages = {each.name: each for each in setup.stages}
    teacher = _teacher(options.teacher, setup.head, setup.policy, setup.tokenizer)
    if teacher is None and stage != "teacher":
        own = "teacher" in stages
        params = restore_best(setup, stages["teacher"]) if own else given_params(setup, "teacher")
        teacher = setup.models["teacher"], params
    student = setup.models[stages[stage].model], restore_best(setup, stages[stage])
    stated = {"model": str(run.workdir), "stage": stage, "task": config.task.name}
    stated["precision"] = config.precision
    stated["data"] = setup.task.prepare()["test"] if data else manifest[split]
    rows, chunk = config.eval.batch_size, config.vocab_chunk
    return stated | _measure(student, teacher, setup.task, split, rows, setup.mesh, chunk)


def _source(task: str, data: str, options: Options, settings: Any) -> dict[str, str]:
    """The text at a path. A column that is named is a setting of the source, or of chats."""
    if options.text and task == "chat":
        settings["column"] = options.text
    elif options.text:
        return {"path": data, "text": options.text}
    return {"path": data}


def check_rows(batch_size: int) -> None:
    """Raises UserError where the devices cannot share --batch_size."""
    devices = jax.device_count()
    if batch_size < 1 or batch_size % devices:
        raise UserError(
            f"--batch_size={batch_size} cannot be divided among {devices} devices; make it a "
            f"multiple of {devices}"
        )


def section(model: str, revision: str | None = None) -> ConfigDict:
    """The config section of a checkpoint."""
    return ConfigDict({"model": model, "revision": revision or "", "architecture": {}})


def for_these_devices(config: dict, options: Options) -> ConfigDict:
    """The run's config, in which what concerns training alone fits any number of devices."""
    config = ConfigDict(config)
    config.precision = options.precision or config.precision
    config.task.seq_len = options.seq_len or config.task.seq_len
    config.eval.batch_size = options.batch_size or config.eval.batch_size
    config.mesh.fsdp = config.accumulate = 1
    config.batch_size = config.eval.batch_size
    check_rows(config.batch_size)
    for changes in config.stages.values():
        changes.batch_size = config.batch_size
    return config


def _teacher(
    model: str | None, head: str, policy: Policy, tokenizer: PreTrainedTokenizerBase
) -> Checkpoint | None:
    """The checkpoint of --teacher, if there is one."""
    if model is None:
        return None
    described = blueprint.describe(section(model), "--teacher", head, policy)
    if text.load_tokenizer(described.folder).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--teacher={model} has another tokenizer than the model: the same ids would mean "
            f"other words; choose a teacher of the same vocabulary"
        )
    return described, described.load(None)


def _measure(
    student: Checkpoint,
    teacher: Checkpoint | None,
    task: Any,
    split: str,
    batch_size: int,
    mesh: Mesh,
    chunk: int = 0,
) -> Report:
    began = time.perf_counter()
    described, params = student
    policy, everywhere = described.policy, NamedSharding(mesh, P())
    model = Model(jax.device_put(params, everywhere), described.abstract().graphdef)
    frozen = None
    if teacher is not None:
        kept = blueprint.stored(teacher[1], policy)
        frozen = Model(jax.device_put(kept, everywhere), teacher[0].abstract().graphdef)
    objective = combine.held_out(policy, None if frozen is None else policy, chunk)
    plan = Plan(objective, mesh, family.PARTITION)
    figures = evaluate(model, task.held_out(split, batch_size), frozen, plan)
    return {
        "commit": described.commit,
        "teacher": None if teacher is None else teacher[0].name,
        "split": split,
        "seq_len": task.seq_len,
        **({"separator": task.separator} if hasattr(task, "separator") else {}),
        "batch_size": batch_size,
        "loss": figures["loss"],
        "perplexity": math.exp(min(figures["loss"], 700.0)),
        **figures,
        "parameters": count(params),
        "size_mb": size_mb(params),
        "machine": workdir.machine(),
        "seconds": round(time.perf_counter() - began, 1),
    }
