"""Embedders and rerankers that sentence-transformers loads."""

import dataclasses
import functools
import json

import jax
import ml_collections
import numpy as np
import pytest

import kd_jax
from kd_jax import cli
from kd_jax import export as command
from kd_jax.data import tokenizers
from kd_jax.models import blueprint as blueprints
from kd_jax.models import embedder, family, hf
from kd_jax.models.blueprint import Blueprint
from kd_jax.models.model_config import Dense, Texts
from kd_jax.precision import Policy
from kd_jax.recipes import export, export_check, predict
from kd_jax.report import card
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("caches")

WORDS = ["the cat sat on the mat", "a dog ran to the river", "cat"]
TEXTS = Texts((("document", ""), ("query", "a cat ")), "query", "dot", 30)
SOURCE = {"config_hash": "0123abcd", "stage": "student"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenizers.train_tokenizer("bpe", WORDS * 10, 290, folder)


def described(name, **changes):
    """(blueprint, params) of a random embedder."""
    kind, config = family.read(tiny.CONFIGS[name] | {"vocab_size": 300})
    config = dataclasses.replace(config, **changes)
    model = family.abstract(kind, config, "embedding", Policy())
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape, np.float32), model.params)
    return Blueprint(name, kind, config, "embedding", Policy()), params


def use(folder, monkeypatch):
    """What the program of an export's card makes, in its folder."""
    monkeypatch.chdir(folder)
    program = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    made = {"__name__": "card"}
    exec(compile(program, "README.md", "exec"), made)
    return made


@pytest.mark.parametrize(
    "name, changes",
    [
        ("bert", dict(pooling="max", dense=(Dense(16, "tanh"), Dense(8, "gelu", False)))),
        ("roberta", dict(pooling="mean", dimensions=5, texts=TEXTS)),
        ("llama", dict(pooling="last", normalize=False, dense=(Dense(16, "silu"),))),
        ("gpt2", dict(pooling="cls")),
    ],
)
def test_others_make_the_same_vectors(name, changes, tokenizer, tmp_path):
    model, out = described(name, **changes), tmp_path / "out"
    report = export.publish(export.writer(*model), tokenizer, out, lambda *_: "", SOURCE)
    assert 0 < report["max_logit_difference"]["pytorch"] < 1e-5
    library = pytest.importorskip("sentence_transformers")
    theirs = library.SentenceTransformer(str(out), device="cpu", local_files_only=True)
    own = model[0].config.texts
    assert theirs.max_seq_length == (own.max_tokens or model[0].config.max_tokens)
    assert theirs.similarity_fn_name == own.similarity
    ours, found = kd_jax.load(out).embed(WORDS, batch_size=8), theirs.encode(WORDS)
    assert ours.shape == found.shape and np.abs(found).max() > 0.1
    np.testing.assert_allclose(ours, found, rtol=0, atol=1e-5 * np.abs(found).max())


def test_another_tokenizer_beside_a_qwen2(tmp_path, monkeypatch):
    """sentence-transformers would read other tokens; the card says how it reads these."""
    pytest.importorskip("sentence_transformers")
    model, out = described("qwen2", pooling="last"), tmp_path / "out"
    words = tokenizers.train_tokenizer("wordpiece", WORDS * 10, 96, tmp_path / "words")
    page = card.of_model("embedding", "small", "qwen2", None, {})
    export.publish(export.writer(*model), words, out, page, SOURCE)
    theirs = use(out, monkeypatch)["model"]
    assert theirs.max_seq_length == 40
    ours = kd_jax.load(out).embed(WORDS, batch_size=8)
    np.testing.assert_allclose(ours, theirs.encode(WORDS), rtol=0, atol=2e-6)


def test_another_pooling_is_seen(tmp_path):
    blueprint, params = described("bert")
    other = dataclasses.replace(blueprint.config, pooling="cls")
    hf.save(tmp_path, params, blueprint.family, other, "embedding")
    batch = export_check.example_of(blueprint)
    wanted = export_check.logits_of(blueprint, params, batch)
    with pytest.raises(RuntimeError, match="loaded again, logits differ: pytorch by"):
        export_check.check_in_pytorch(tmp_path, "embedding", batch, lambda _: wanted)


def test_a_conversion_keeps_head_prompts_and_card(tmp_path, tokenizer, monkeypatch, capsys):
    library = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    blueprint, params = described("gpt2", pooling="last", dense=(Dense(9),), texts=TEXTS)
    hf.save(tmp_path / "in", params, blueprint.family, blueprint.config, "embedding")
    tokenizers.save_tokenizer(tokenizer, tmp_path / "in")
    out = tmp_path / "out"
    command.main([f"--model={tmp_path / 'in'}", f"--out={out}"])
    assert "loaded again with pytorch: logits differ by" in capsys.readouterr().out
    again = embedder.read(blueprint.config, out)
    assert embedder.vectors(again) == embedder.vectors(blueprint.config)
    assert again.texts == TEXTS
    page = (out / "README.md").read_text()
    assert "library_name: sentence-transformers" in page
    assert "pipeline_tag: sentence-similarity" in page
    # GPT-2's tokenizer has no token to fill rows up with; this one has.
    model = library.SentenceTransformer(str(out), device="cpu", local_files_only=True)
    assert model.encode(WORDS).shape == (3, 9) and model.default_prompt_name == "query"
    use(out, monkeypatch)
    assert "tensor([[" in capsys.readouterr().out


def test_a_reranker_scores_alike(tmp_path):
    library = pytest.importorskip("sentence_transformers")
    section = dict(model="", revision="", architecture={})
    described = blueprints.describe(
        ml_collections.ConfigDict(section),
        *("student", "classification", Policy()),
        base=tiny.CONFIGS["bert"] | {"sbert_ce_default_activation_function": "torch.nn.Sigmoid"},
        labels=("score",),
    )
    params = tiny.model("bert", "classification", id2label={"0": "score"}).params
    hf.save(tmp_path, params, described.family, described.config, "classification")
    stated = json.loads((tmp_path / "config.json").read_text())["sentence_transformers"]
    assert stated == {"activation_fn": "torch.nn.modules.linear.Identity"}
    tokenizers.train_tokenizer("wordpiece", WORDS * 10, tiny.VOCAB, tmp_path)
    pairs = [(a, b) for a in WORDS for b in WORDS]
    rows = [dict(zip(("text", "pair"), pair, strict=True)) for pair in pairs]
    source, target = tmp_path / "pairs.jsonl", tmp_path / "scores.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = predict.Options(pair="pair", batch_size=8)
    open_model = functools.partial(predict.checkpoint, str(tmp_path), None, None)
    predict.predict_file(open_model, str(source), str(target), options)
    ours = [json.loads(line)["score"] for line in target.read_text().splitlines()]
    theirs = library.CrossEncoder(str(tmp_path), device="cpu", local_files_only=True)
    np.testing.assert_allclose(ours, theirs.predict(pairs), rtol=0, atol=1e-5)
    assert max(ours) - min(ours) > 0.01
    # What the library saves itself is read as well.
    theirs.save(str(tmp_path / "saved"))
    again = tmp_path / "again.jsonl"
    open_model = functools.partial(predict.checkpoint, str(tmp_path / "saved"), None, None)
    predict.predict_file(open_model, str(source), str(again), options)
    assert [json.loads(line)["score"] for line in again.read_text().splitlines()] == ours
