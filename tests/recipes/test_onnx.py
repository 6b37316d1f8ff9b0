"""ONNX files of encoders: the same model in ONNX Runtime, and what is said of int8."""

import argparse
import dataclasses
import importlib.util
import json
import logging
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import pytest
import transformers

import kd_jax
from kd_jax import export as command
from kd_jax import storage
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.models.blueprint import Blueprint
from kd_jax.models.model_config import Dense
from kd_jax.precision import Policy
from kd_jax.recipes import export, export_check, onnx
from kd_jax.report import card
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("caches")

WORDS = ["the cat sat on the mat", "a dog ran to the river and back", "cat"]
SOURCE = {"config_hash": "0123abcd", "stage": "student"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train_tokenizer(
        "wordpiece", WORDS * 10, tiny.VOCAB, tmp_path_factory.mktemp("tokenizer")
    )


def described(name, head, more=(), **changes):
    """(blueprint, params) of a random model."""
    kind, config = family.read(tiny.CONFIGS[name] | dict(more))
    config = dataclasses.replace(config, **changes)
    model = family.abstract(kind, config, head, Policy())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), model.params)
    return Blueprint(name, kind, config, head, Policy()), params


def published(out, tokenizer, head, *about, **changes):
    blueprint, params = described("bert", head, *about, **changes)
    page = card.of_model(head, "small", "bert", None, {})
    write = export.writer(blueprint, params)
    return export.publish(write, tokenizer, out, page, SOURCE, onnx_head=head)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory, tokenizer):
    """(folder, report) of an embedder with every part of a head."""
    out = tmp_path_factory.mktemp("embedder") / "out"
    changes = dict(pooling="last", dense=(Dense(16, "tanh"),), dimensions=9)
    return out, published(out, tokenizer, "embedding", **changes)


def computed(folder, output, *texts, file="onnx/model.onnx"):
    """(a graph's output, what it read) on texts, as a program without kd_jax computes it."""
    reader = transformers.AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / file)
    read = reader(*texts, padding=True, return_tensors="np")
    return session.run([output], {x.name: read[x.name] for x in session.get_inputs()})[0], read


def test_graphs_make_the_vectors(embedder):
    folder, report = embedder
    ours = kd_jax.load(folder).embed(WORDS)
    exact, read = computed(folder, "sentence_embedding", WORDS)
    assert read["attention_mask"].sum(1).tolist() != [read["attention_mask"].shape[1]] * 3
    np.testing.assert_allclose(exact, ours, rtol=0, atol=1e-6)
    small, _ = computed(folder, "sentence_embedding", WORDS, file="onnx/model_qint8.onnx")
    assert 1e-4 < np.abs(small - exact).max() < 0.1
    hidden, _ = computed(folder, "last_hidden_state", WORDS)  # which optimum reads
    assert hidden.shape == (*read["input_ids"].shape, 32)
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == [
        "model.onnx",
        "model_qint8.onnx",
    ]
    found = report["onnx"]
    assert found == storage.read_json(folder / onnx.FILE)
    assert found["agreement"] == "mean cosine" and found["texts"] == onnx.TEXTS
    assert 0.95 < found["files"]["int8"]["agreement"] < 1
    assert found["files"]["float32"]["max_difference"] < 1e-6
    assert 1e-4 < found["files"]["int8"]["max_difference"] < 0.2
    for each in found["files"].values():
        assert each["throughput"] > 0 and each["latency_ms"] > 0
        assert each["mb"] == pytest.approx((folder / each["file"]).stat().st_size / 1e6)


def test_the_benchmark_keeps_the_order(embedder, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import embed_pass

    folder, texts = embedder[0], [*WORDS, "river mat dog", "the"]
    args = argparse.Namespace(model=folder, graph=folder / "onnx/model.onnx", batch_size=2)
    ours = kd_jax.load(folder).embed(texts)
    np.testing.assert_allclose(embed_pass.of_onnx(args)(texts), ours, rtol=0, atol=1e-6)


def test_the_card_shows_them(embedder, monkeypatch, capsys):
    folder, report = embedder
    page = (folder / "README.md").read_text()
    small = report["onnx"]["files"]["int8"]
    assert f"| `onnx/model_qint8.onnx` | {small['mb']:.1f} | {small['throughput']:,.0f} |" in page
    assert f"mean cosine {small['agreement']:.4f} on 128 texts of the language reference" in page
    program = page.partition("## ONNX")[2].partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    made = {}
    exec(compile(program, "README.md", "exec"), made)
    assert "[[" in capsys.readouterr().out and "attention_mask" in made["inputs"]


def test_a_reranker_reads_token_types(tmp_path, tokenizer, caplog, monkeypatch):
    monkeypatch.setattr(onnx, "ALIKE", 1.1)
    out, labels = tmp_path / "out", {"id2label": {"0": "score"}}
    with caplog.at_level(logging.WARNING):
        report = published(out, tokenizer, "classification", labels)["onnx"]
    assert report["agreement"] == "correlation of scores"
    small = report["files"]["int8"]
    assert -1 <= small["agreement"] <= 1 and 0 < small["max_difference"] < 0.1
    assert "int8 changes this model: correlation of scores" in caplog.text
    assert "**int8 changes this model" in (out / "README.md").read_text()
    blueprint, params = described("bert", "classification", labels)
    found, read = computed(out, "logits", WORDS, WORDS[::-1])
    assert read["token_type_ids"].any()
    batch = export_check.example_of(blueprint).replace(
        tokens_BT=read["input_ids"].astype(np.int32),
        mask_BT=read["attention_mask"].astype(np.float32),
        types_BT=read["token_type_ids"].astype(np.int32),
    )
    ours = export_check.logits_of(blueprint, params, batch)[:, 0]
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5)
    assert np.abs(ours).max() > 0.1


def test_another_pooling_is_seen(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(export_check, "check", lambda *_: {"kd_jax": 0.0})
    monkeypatch.setattr(export_check, "torch_vectors", lambda _, x, mask_BT: x[:, 0])
    with pytest.raises(RuntimeError, match="logits differ: onnx by"):
        published(tmp_path / "out", tokenizer, "embedding")
    assert not [*tmp_path.iterdir()]


def test_a_graph_that_is_wrong_for_a_text_alone_is_seen(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(export_check, "check", lambda *_: {"kd_jax": 0.0})
    right = onnx._Graph.__call__
    monkeypatch.setattr(
        onnx._Graph, "__call__", lambda self, batch: right(self, batch) + (len(batch.mask_BT) == 1)
    )
    with pytest.raises(RuntimeError, match="logits differ: onnx by"):
        published(tmp_path / "out", tokenizer, "embedding")


def test_agreement_of_classes():
    exact = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 1.0], [0.0, 1.0]])
    small = exact + [[0, 0], [0, 2], [0, 1], [0, 0]]
    assert onnx._agreement("classification", exact, small) == ("equal predictions", 0.75)
    assert onnx._agreement("embedding", exact, 2 * exact)[1] == pytest.approx(1)
    assert onnx._agreement("classification", exact[:, :1], -exact[:, :1])[1] == pytest.approx(-1)


def test_what_has_no_graph(tokenizer, monkeypatch):
    decoder, encoder = described("gpt2", "embedding")[0], described("bert", "mlm")[0]
    with pytest.raises(UserError, match="gpt2 is a decoder; ONNX files are made of encoders"):
        onnx.check_possible(decoder, tokenizer)
    with pytest.raises(UserError, match="bert is an encoder with the head 'mlm'"):
        onnx.check_possible(encoder, tokenizer)
    encoder = described("bert", "embedding")[0]
    onnx.check_possible(encoder, tokenizer)
    with pytest.raises(UserError, match="bert has no tokenizer"):
        onnx.check_possible(encoder, None)
    monkeypatch.setattr(onnx, "LARGEST", 0.01)
    with pytest.raises(UserError, match="bert has 0 MB of weights; a file holds 0.01"):
        onnx.check_possible(encoder, tokenizer)


def test_a_missing_package_is_named_first(tmp_path, embedder, monkeypatch, capsys):
    find = importlib.util.find_spec
    missing = lambda name, *_: None if name.startswith("onnx") else find(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", missing)
    with pytest.raises(SystemExit):
        command.main([f"--model={embedder[0]}", "--onnx", f"--out={tmp_path / 'out'}"])
    assert "--onnx needs more packages: pip install onnx onnxruntime" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_a_conversion_has_them_if_asked(tmp_path, embedder, monkeypatch, capsys):
    monkeypatch.setattr("kd_jax.cli.start_jax", lambda: None)
    monkeypatch.setattr(onnx, "add", lambda *_: json.loads((embedder[0] / onnx.FILE).read_text()))
    command.main([f"--model={embedder[0]}", "--onnx", f"--out={tmp_path / 'out'}"])
    shown = capsys.readouterr().out
    assert "onnx/model.onnx: 0." in shown and ", mean cosine 1.0" in shown
    assert (tmp_path / "out" / onnx.FILE).exists()
