"""Embedders and cross-encoders, from their folders to figures."""

import json
import shutil

import jax
import numpy as np
import pytest

from kd_jax import config as defaults
from kd_jax.errors import UserError
from kd_jax.metrics import embedding
from kd_jax.recipes import evaluate
from kd_jax.recipes.evaluate import Options, evaluate_checkpoint
from kd_jax.run import subject
from kd_jax.run.run import build
from kd_jax.smoke import samples, smoke_finetuning
from kd_jax.train import sharding
from kd_jax.types import Batch
from tests.recipes import finetuning

FILES = {"sts": "sts.jsonl", "retrieval": "retrieval", "reranking": "reranking.jsonl"}


@pytest.fixture(scope="module", autouse=True)
def quick(caches):
    with finetuning.quick():
        yield


def data(kind):
    return str(samples() / "embedding" / FILES[kind])


@pytest.fixture(scope="module")
def reports():
    folder, options = finetuning.checkpoint(head="embedding"), Options()
    tasks = {kind: (f"embedding/{kind}", data(kind), options) for kind in FILES}
    return {kind: evaluate_checkpoint(folder, None, *task).report for kind, task in tasks.items()}


def test_an_embedder_is_scored(reports):
    assert reports["sts"]["data"]["examples"] == 48 and reports["sts"]["task"] == "embedding/sts"
    for kind, names in (
        ("sts", embedding.SIMILARITY),
        ("retrieval", embedding.RETRIEVAL),
        ("reranking", embedding.RERANKING),
    ):
        assert set(names) <= reports[kind].keys()
        assert all(-1 < reports[kind][name] <= 1 for name in names)
        shown = evaluate.table(reports[kind])
        assert len([row for row in shown.rows if row[1] == f"{reports[kind][names[0]]:.4f}"])
    assert "nDCG@10" in str(evaluate.table(reports["retrieval"]).rows)


def test_figures_are_those_of_the_model_and_the_metrics(reports):
    own = subject.of_checkpoint(finetuning.checkpoint(head="embedding"), None, "embedding", None)
    model = own.model(sharding.make_mesh())

    def vectors(texts):
        made = own.tokenizer(texts, padding=True, return_tensors="np")
        ones_N1 = np.ones((len(texts), 1), np.float32)
        mask_NT = made["attention_mask"].astype(np.float32)
        types_NT = made["token_type_ids"].astype(np.int32)
        tokens_NT = made["input_ids"].astype(np.int32)
        batch = Batch(np.arange(len(texts)), tokens_NT, mask_NT, ones_N1, ones_N1, None, types_NT)
        return np.asarray(jax.jit(lambda batch: model(batch).logits)(batch))[:, 0]

    with open(data("sts")) as file:
        rows = [json.loads(line) for line in file]
    vectors_ND = vectors([row[key] for key in ("sentence1", "sentence2") for row in rows])
    found = embedding.similarity(*np.split(vectors_ND, 2), np.array([row["score"] for row in rows]))
    assert {name: reports["sts"][name] for name in found} == pytest.approx(found, abs=1e-4)
    assert abs(found["pearson"]) > 0.01


def test_an_embedders_folder_says_how_texts_are_read(reports, tmp_path):
    folder = shutil.copytree(finetuning.checkpoint(head="embedding"), tmp_path / "embedder")
    prompts = {"query": "price: ", "passage": "song: "}
    about = {"prompts": prompts, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(about))
    options, given = Options(), Options(query_prompt="price: ", document_prompt="song: ")
    found, stated = (
        evaluate_checkpoint(path, None, "embedding/retrieval", data("retrieval"), chosen).report
        for path, chosen in (
            (str(folder), options),
            (finetuning.checkpoint(head="embedding"), given),
        )
    )
    assert {name: found[name] for name in embedding.RETRIEVAL} == {
        name: stated[name] for name in embedding.RETRIEVAL
    }
    assert found["ndcg@10"] != reports["retrieval"]["ndcg@10"]
    found = evaluate_checkpoint(str(folder), None, "embedding/sts", data("sts"), options).report
    assert found["spearman"] == reports["sts"]["spearman"]  # these are no queries
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 8}))
    found = evaluate_checkpoint(str(folder), None, "embedding/sts", data("sts"), options).report
    assert found["spearman"] != reports["sts"]["spearman"]


def test_what_is_trained_says_so_too():
    c = defaults.finetuning()
    c.task = dict(name="embedding", query_prompt="q: ")
    c.stages, c.objective = dict(student={}), dict(hidden=dict(weight=1.0))
    c.teacher.model = "a"
    c = smoke_finetuning(c)
    c.teacher.init = "scratch"
    texts = build(c).models["student"].config.texts
    assert (texts.prompts, texts.max_tokens) == ((("query", "q: "),), 16)


def test_a_cross_encoder_is_scored():
    folder = finetuning.checkpoint(classes=("score",))
    made, report = evaluate_checkpoint(folder, None, "reranking", data("reranking"), Options())
    scores_N = np.array([output[0] for output in made.outputs])
    expected = embedding.reranking(scores_N, np.array([1, 0] * 24), np.repeat(np.arange(24), 2))
    assert {name: report[name] for name in expected} == expected
    with pytest.raises(UserError, match="classes"):
        evaluate_checkpoint(
            finetuning.checkpoint(), None, "reranking", data("reranking"), Options()
        )
