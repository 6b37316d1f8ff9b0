"""Language models whose teacher's logits are read from disk."""

import csv
import dataclasses
import functools
import logging
import re
import shutil
import types
from unittest import mock

import jax
import numpy as np
import pytest

from benchmarks import kill_resume
from kd_jax import config as defaults
from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.metrics import flops
from kd_jax.models import family
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy
from kd_jax.recipes import plan
from kd_jax.run import measure, text_logits
from kd_jax.smoke import samples
from kd_jax.teachers.ensemble import Stored
from kd_jax.train import loop
from tests import tiny_config
from tests.models import tiny
from tests.recipes import substituting

STEPS, ROWS = 6, 8
GPT2 = dict(model_type="gpt2", n_embd=16, n_layer=2, n_head=2, initializer_range=0.2)
BERT = dict(
    model_type="bert",
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
)


def config(folder, task="clm", logits="all", **objective):
    """A teacher of two layers and its student of one, without dropout; two epochs of three batches,
    or conversations."""
    c = defaults.base("pretrain")
    c.precision, c.batch_size, c.steps = "fp32", ROWS, STEPS
    c.stages = dict(student={})
    c.teacher.init = "scratch"
    c.objective = objective or dict(ce=dict(weight=0.5), kl=dict(weight=0.5, temperature=2.0))
    c.optim.learning_rate = 1e-2
    c.eval, c.checkpoint = dict(every=3, batch_size=64), dict(every=2, keep=2)
    c.log = dict(every=2)
    if task == "chat":
        chats = samples() / "chats"
        c.tokenizer = dict(path=str(chats / "tokenizer"), train="", vocab_size=512)
        some = (chats / "train.jsonl").read_text().splitlines()[:26]
        (folder / "chats.jsonl").write_text("\n".join(some))
        c.data = dict(train=dict(path=str(folder / "chats.jsonl")), held_out=0.1)
        c.teacher.architecture = GPT2 | dict(n_positions=128, vocab_size=512)
        c.task = dict(name="chat", seq_len=128)
    else:
        text = tiny_config.TEXT.split("\n\n")[:10]
        (folder / "text.txt").write_text("\n\n".join(text))
        kind = "bpe" if task == "clm" else "wordpiece"
        c.tokenizer = dict(path="", train=kind, vocab_size=280)
        c.data = dict(train=dict(source="files", path=str(folder / "text.txt")), held_out=0.1)
        c.teacher.architecture = GPT2 if task == "clm" else BERT
        c.task = dict(name=task, seq_len=16)
    layers = "num_hidden_layers" if task == "mlm" else "n_layer"
    c.student.architecture = {layers: 1}
    off = ("resid", "embd", "attn")
    drops = {f"{each}_pdrop": 0.0 for each in off}
    if task == "mlm":
        drops = {f"{each}_dropout_prob": 0.0 for each in ("hidden", "attention_probs")}
    c.student.architecture.update(drops)
    c.data.cache_dir = str(folder)
    if logits:
        c.cache = dict(folder=str(folder / "logits"), logits=logits, top_k=20)
    return c


def run(c, folder, calls=None, teachers=None):
    """The rows of metrics.csv, and results."""
    step, train = text_logits.log_probs_step, loop.train_step

    def counted(*args, **kwargs):
        calls is None or calls.append(0)
        return step(*args, **kwargs)

    def trained(state, batch, teacher, *args, **kwargs):
        teachers is None or teachers.append(type(teacher))
        return train(state, batch, teacher, *args, **kwargs)

    with (
        mock.patch.object(text_logits, "log_probs_step", counted),
        mock.patch.object(loop, "train_step", trained),
    ):
        results = substituting.run(c, folder)
    with (folder / "student" / "metrics.csv").open() as file:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    return rows, results["stages"]["student"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="module")
def stored(folder):
    """A causal LM, the forward passes of its teacher, and the teachers of its steps."""
    calls, teachers = [], []
    return *run(config(folder), folder / "stored", calls, teachers), calls, teachers


def check_same(ours, theirs):
    """Within the rounding of float32, in which logits are kept."""
    assert len(ours) == len(theirs) == STEPS
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=2e-5, abs=2e-6)
    assert ours[-1]["kl"] > 0.01


def test_losses_are_those_of_a_teacher_in_the_step(stored, folder):
    rows, figures, calls, teachers = stored
    online, expected = run(config(folder, logits=""), folder / "online")
    check_same(rows, online)
    assert figures["kl"] == pytest.approx(expected["kl"], rel=1e-4)
    assert set(teachers) == {Stored}
    assert len(calls) == 3  # an epoch, in twice as many steps
    saved = expected["training_flops"] - figures["training_flops"]
    assert saved == (STEPS - len(calls)) * teacher_flops(folder) > 0


def teacher_flops(folder):
    """Of a batch, forward."""
    run = substituting.build(config(folder, logits=""), folder / "stored")
    shape = measure.shape_of_step(run, run.principal)
    return flops.forward(run.models["teacher"].counted(), *shape)


def test_a_run_of_another_seed_finds_them(stored, folder, monkeypatch):
    """Of the same teacher, which other seeds would draw anew."""
    calls, c = [], config(folder)
    key, c.seed = jax.random.fold_in(jax.random.key(c.seed), 0), 5
    same = lambda run: {"teacher": jax.jit(run.models["teacher"].draw)(key)}  # noqa: E731
    monkeypatch.setattr(substituting.distil.teaching, "given_teachers", same)
    rows, _ = run(c, folder / "again", calls)
    assert calls == [] and rows[0] != stored[0][0]


@pytest.mark.parametrize("task", ["mlm", "chat"])
def test_other_language_models(folder, task, caplog):
    """Masks are drawn in every epoch, so that a masked LM has other rows in each."""
    terms = dict(kl=dict(weight=1.0, positions="all")) if task == "mlm" else {}
    calls, teachers = [], []
    with caplog.at_level(logging.INFO, "kd_jax.run.text_logits"):
        rows, _ = run(config(folder, task, **terms), folder / task, calls, teachers)
    online, _ = run(config(folder, task, "", **terms), folder / f"{task}-online")
    check_same(rows, online)
    assert set(teachers) == {Stored} and (len(calls) < STEPS) == (task == "chat")
    assert "different rows; all logits of each take" in caplog.text


def test_supervised_positions_of_a_masked_lm(folder):
    rows, _ = run(config(folder, "mlm"), folder / "masked")
    online, _ = run(config(folder, "mlm", ""), folder / "masked-online")
    check_same(rows, online)


def test_the_largest_alone(stored, folder, caplog, monkeypatch):
    error, to_host, gathered = text_logits.TextLogits._error, text_logits._to_host, []

    def of_two(tree):
        """Adds the rows of another process."""
        gathered.append(jax.tree.map(lambda x: np.concatenate([x, 0 * x - 1]), to_host(tree)))
        return gathered[-1]

    def checked(*given):
        alone = error(*given)
        with mock.patch.object(text_logits, "_to_host", of_two):
            assert error(*given) == alone
        return alone

    monkeypatch.setattr(text_logits.TextLogits, "_error", checked)
    with caplog.at_level(logging.INFO, "kd_jax.run.text_logits"):
        rows, _ = run(config(folder, logits="top_k"), folder / "largest")
    assert "20 of 280 logits are kept: KL(all || kept) " in caplog.text and gathered
    tokens = int(
        re.search(r"([\d,]+) tokens of [\d,]+ different rows", caplog.text)[1].replace(",", "")
    )
    took = f"take {20 * 6 + 4} bytes a token, {(20 * 6 + 4) * tokens:,} bytes"  # ids have two
    assert f"the 20 largest logits of each {took}" in caplog.text
    ours, whole = rows[0], stored[0][0]
    assert ours["ce"] == pytest.approx(whole["ce"], rel=1e-6)
    assert 0.001 < abs(ours["kl"] / whole["kl"] - 1) < 0.5


def test_draws(stored, folder, caplog):
    """The same rows, at 40 bytes a token; cross-entropy with draws has the entropy of the draws
    less than with the teacher."""
    calls, c = [], config(folder, logits="rskd", ce=dict(weight=0.5), kl=dict(weight=0.5))
    c.cache.draws = 20
    with caplog.at_level(logging.INFO, "kd_jax.run.text_logits"):
        rows, figures = run(c, folder / "draws", calls)
    assert "20 draws of each take 40 bytes a token" in caplog.text
    assert len(calls) == 3 and rows[0]["ce"] == pytest.approx(stored[0][0]["ce"], rel=1e-6)
    assert rows[0]["kl"] == pytest.approx(rows[0]["kl_t1"]) and rows[-1]["kl"] > 0.01
    assert 0.01 < figures["kl"] < 1.0  # with the teacher itself


@pytest.mark.parametrize("when", ["a step", "the pass"])
def test_killed_and_continued_is_the_same_bit_for_bit(stored, folder, tmp_path, when, monkeypatch):
    c = config(folder)
    owner, name, at = (loop, "train_step", 4) if when == "a step" else (text_logits, "place", 1)
    if when == "the pass":
        c.cache.folder = str(tmp_path / "logits")
    monkeypatch.setattr(owner, name, substituting.dies(getattr(owner, name), at))
    with pytest.raises(substituting.Killed):
        substituting.run(c, tmp_path / "run")
    monkeypatch.undo()
    run(c, tmp_path / "run")
    found = kill_resume.differences(folder / "stored", tmp_path / "run")
    assert found == []


def test_what_is_damaged_is_said_and_computed_again(stored, folder, tmp_path, caplog):
    shutil.copytree(folder / "logits", tmp_path / "logits")
    entries = cache.entries(tmp_path / "logits" / "teacher_logits")
    entries = [entry for entry in entries if (entry / "logits.npy").exists()]  # draws have none
    for entry in entries:
        data = bytearray((entry / "logits.npy").read_bytes())
        data[-5] ^= 0x10
        (entry / "logits.npy").write_bytes(data)
    calls, c = [], config(folder)
    c.cache.folder = str(tmp_path / "logits")
    rows, _ = run(c, tmp_path / "run", calls)
    assert len(calls) == 3 and rows == stored[0]
    assert any(f"{entry / 'logits.npy'} is damaged" in caplog.text for entry in entries)


def test_what_does_not_fit_is_said_before_it_is_computed(folder, tmp_path):
    c, calls = config(folder), []
    c.cache.update(folder=str(tmp_path / "logits"), max_gb=1e-5)
    with pytest.raises(UserError, match="GB are wanted in .*config.cache.max_gb=1e-05; raise it"):
        run(c, tmp_path / "run", calls)
    assert calls == [] and not cache.entries(tmp_path / "logits" / "teacher_logits")


@pytest.mark.parametrize(
    ("term", "says"),
    [
        (
            "hidden",
            "config.objective.hidden: a teacher that is read from disk .config.cache.logits.",
        ),
        ("logit_mse", "config.objective.logit_mse compares logits themselves, and a teacher that"),
    ],
)
def test_what_needs_the_teacher_itself_is_refused(folder, tmp_path, term, says):
    c = config(folder, **{term: dict(weight=1.0)})
    with pytest.raises(UserError, match=says):
        run(c, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(("logits", "k"), [("all", 280), ("top_k", 20), ("rskd", 30)])
def test_a_step_is_planned_as_it_will_be(folder, logits, k):
    c = config(folder, "mlm", logits)
    c.tokenizer.train, c.teacher.architecture["vocab_size"] = "", 280
    c.objective.kl.temperature, c.cache.draws = 1.0, 30
    run = substituting.build(c)
    born, batch, teacher, inputs, program = plan.abstract_step(run)
    kept = batch.stored["teacher"]
    assert type(teacher) is Stored and {x.shape[:2] for x in jax.tree.leaves(kept)} == {(ROWS, 8)}
    assert {x.shape[2:] for x in (kept.values_BPK, kept.ids_BPK) if x is not None} == {(k,)}
    step = functools.partial(loop.train_step, program=program)
    _, metrics = jax.eval_shape(step, born, batch, teacher, inputs)
    assert {"ce", "kl"} <= metrics["terms"].keys()
    assert run.principal.step_inputs(run, run.principal).computing == []


def test_an_embedder_s_vectors_are_those_of_its_head():
    kind, own = family.read(tiny.CONFIGS["bert"])
    heads = [
        own,
        *(dataclasses.replace(own, **one) for one in ({"pooling": "cls"}, {"dimensions": 4})),
    ]
    models = {i: Blueprint("", kind, each, "embedding", Policy()) for i, each in enumerate(heads)}
    run = types.SimpleNamespace(head="embedding", models=models)
    assert len({text_logits.identity_of(run, name, {}) for name in models}) == 3
