"""Tiny fine-tuning runs on made-up data and one device, without what a run does after its last
stage."""

import contextlib
import functools
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import jax

from configs import finetune_agnews, finetune_glue, finetune_squad
from kd_jax import config as defaults
from kd_jax.data import tokenizers
from kd_jax.models import family, hf
from kd_jax.precision import Policy
from kd_jax.recipes import distil, export_check
from kd_jax.report import plots
from kd_jax.run import measure, workdir
from kd_jax.smoke import samples
from kd_jax.train import sharding
from tests.models import tiny

_SESSION = tempfile.TemporaryDirectory(prefix="kd_jax-finetuning-")
CLASSES = ("World", "Sports", "Business", "Sci/Tech")
OTHERS = ("sci/tech", "world", "sports", "business")  # another order, other letters


@functools.cache
def checkpoint(
    name: str = "teacher", head: str = "classification", classes=CLASSES, layers: int = 1
) -> str:
    """A random model whose answers differ, with its tokenizer; that of another name has another
    tokenizer too."""
    folder = Path(_SESSION.name, "-".join([name, head, *classes, str(layers)]).replace("/", "-"))
    described = tiny.CONFIGS["bert"] | {"num_hidden_layers": layers, "initializer_range": 0.3}
    described |= {"max_position_embeddings": 66}
    if head == "classification":
        described |= {"id2label": dict(enumerate(classes))}
    kind, config = family.read(described)
    seed = sum(map(ord, name))
    model = family.build(kind, config, head, Policy(), jax.random.key(seed))
    hf.save(folder, model.params, kind, config, head)
    words = (samples() / "ag_news" / "train.csv").read_text().split("\n")
    words = words if name == "teacher" else ["poor words are cut to letters"]
    tokenizers.train_tokenizer("wordpiece", words, tiny.VOCAB, folder)
    return str(folder)


def larger_tokenizer(folder: Path) -> str:
    """A checkpoint in `folder` whose tokenizer has more tokens than the model."""
    path = shutil.copytree(checkpoint(), folder / "larger")
    (path / "tokenizer.json").unlink()
    words = [a + b for a in "abcdefghij" for b in "klmnopqrst"] * 3
    tokenizers.train_tokenizer("wordpiece", words, 160, path)
    return str(path)


def one_token_type(folder: Path) -> None:
    """Lets a checkpoint's config.json say so."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"type_vocab_size": 1}))


def config(*stages: str, task: str = "agnews", **changes):
    """The teacher is taken as it comes, unless it is a stage; 4 steps, judged after every 2."""
    if task == "agnews":
        c = finetune_agnews.get_config("smoke")
    elif task == "squad":
        c = finetune_squad.get_config("smoke")
    else:
        c = finetune_glue.get_config(f"{task}-smoke")
    c.precision, c.optim.learning_rate = "fp32", 1e-3
    c.stages = {name: {} for name in stages}
    if "teacher" not in stages:
        head = "span" if task == "squad" else "classification"
        classes = ("score",) if task == "stsb" else CLASSES
        c.teacher = teacher(checkpoint("teacher", head, classes))
        c.student.architecture = dict(hidden_dropout_prob=0.2)
        c.student.init = "scratch"
        c.tokenizer.train = ""
    for key, value in changes.items():
        c[key] = value
    return c


def teacher(path: str, **changes):
    """A section of the config."""
    section = defaults.teacher(path)
    section.update(changes)
    return section


@contextlib.contextmanager
def quick():
    """One device; no costs, no plots, no check of the export."""
    make_mesh = sharding.make_mesh
    alone = lambda fsdp=1, devices=None, model=1: make_mesh(fsdp, devices or jax.devices()[:1])  # noqa: E731
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        jax.config.update("jax_disable_most_optimizations", True)  # compiling takes longest
        stack.callback(jax.config.update, "jax_disable_most_optimizations", False)
        patch(sharding, "make_mesh", alone)
        patch(measure, "costs", lambda run, given, repeats: dict.fromkeys(given, {}))
        patch(export_check, "check", lambda *args: {})
        patch(plots, "draw", lambda *args: None)
        yield


def run(config, folder) -> dict:
    """The results of a quick run in `folder`."""
    with quick(), workdir.enter(config, "example", str(folder)) as place:
        return distil.run(config, place)
