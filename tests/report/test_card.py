import json

import huggingface_hub
import pytest

from kd_jax.report import card
from tests.report import example_run


def page(tmp_path, stage="student", head="clm", stated=None, made="", **config):
    """(text, metadata) of a card of a run that distilled GPT-2 into a local checkpoint."""
    config = {
        "teacher": {"model": "openai-community/gpt2"},
        "student": {"model": str(tmp_path)},
        "data": {"train": {"source": "hub", "path": "Salesforce/wikitext"}},
        **config,
    }
    results = {
        "config": "example",
        "config_hash": "0123abcd",
        "commit": "",
        "seed": 3,
        "versions": {"jax": "0.0.1", "flax": "0.0.2"},
        "models": {"teacher": {"commit": "abc123"}, "student": {"commit": None}},
        "data": {"train": {"name": "Salesforce/wikitext"}},
        "split": "test",
        "stages": {
            name: example_run.figures(2.0, name == "teacher") for name in ("student", stage)
        },
    }
    size, rows = "GPT2LMHeadModel with 6 layers", "seq_len 256"
    text = card.of_stage(stage, head, size, results, config, stated or {}, rows, made)
    text = text("", "AutoTokenizer")
    (tmp_path / "README.md").write_text(text)
    return text, huggingface_hub.metadata_load(tmp_path / "README.md")


def test_metadata(tmp_path):
    text, metadata = page(tmp_path, stated={"license": "mit", "language": "en"})
    (model,) = metadata.pop("model-index")
    assert model["name"] == "example: student"
    (result,) = model["results"]
    assert result["task"] == {"type": "text-generation"}
    dataset = {"name": "Salesforce/wikitext", "type": "Salesforce/wikitext", "split": "test"}
    assert result["dataset"] == dataset
    found = {each["type"]: (each["name"], each["value"]) for each in result["metrics"]}
    assert found["loss"] == ("loss (nats/token)", 2.0)
    assert found["perplexity"] == ("perplexity", 20.0) and found["agreement"][1] == 0.75
    # As huggingface_hub reads it, with nothing lost on the way.
    data = huggingface_hub.ModelCard(text).data
    assert data.model_name == "example: student" and len(data.eval_results) == len(found)
    assert data.to_dict() == metadata | {"model-index": [model]}
    assert metadata == {
        "base_model": ["openai-community/gpt2"],  # and not the folder on this machine
        "datasets": ["Salesforce/wikitext"],
        "language": "en",
        "library_name": "transformers",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", "kd_jax"],
    }


def test_text(tmp_path):
    text, _ = page(tmp_path)
    assert (
        "GPT2LMHeadModel with 6 layers, distilled with kd_jax on Salesforce/wikitext. The teacher "
        "is openai-community/gpt2 (commit abc123).\n" in text
    )
    assert "On the test split" in text
    assert (
        "Configuration example (0123abcd), seed 3, kd_jax commit unknown; jax 0.0.1, flax" in text
    )
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in text


@pytest.mark.parametrize(
    "head, pipeline, auto",
    [
        ("classification", "text-classification", "AutoModelForSequenceClassification"),
        ("span", "question-answering", "AutoModelForQuestionAnswering"),
    ],
)
def test_heads_of_few_classes(tmp_path, head, pipeline, auto):
    text, metadata = page(tmp_path, head=head)
    assert metadata["pipeline_tag"] == pipeline
    assert f"model = {auto}.from_pretrained(source)" in text


def test_embedders_are_of_sentence_transformers(tmp_path):
    text, metadata = page(tmp_path, head="embedding")
    assert metadata["pipeline_tag"] == "sentence-similarity"
    assert metadata["library_name"] == "sentence-transformers"
    assert "\nmodel = SentenceTransformer(source)\nvectors = model.encode(" in text


@pytest.mark.parametrize("stage", ["teacher", "baseline"])
def test_only_students_are_distilled(tmp_path, stage):
    text, metadata = page(tmp_path, stage)
    assert metadata["tags"] == ["kd_jax"]
    assert "distilled" not in text and "of a distillation run" in text


def test_a_model_made_of_another(tmp_path):
    text, _ = page(tmp_path, "cut", made="pruned with kd_jax and then trained on")
    made = "pruned with kd_jax and then trained on Salesforce/wikitext. The original is openai-"
    assert made in text and "distilled" not in text


def test_a_licence_that_nobody_stated_is_left_out(tmp_path):
    _, metadata = page(tmp_path)
    assert "license" not in metadata


def test_figures_that_are_not_finite_are_no_metrics():
    figures = {"loss": float("nan"), "accuracy": 0.5}
    results = {"config": "example", "split": "test", "data": {"test": {"name": "/srv/a.txt"}}}
    results["data"]["train"] = {"name": "b.txt"}
    found = card._measured("student", "mlm", results | {"stages": {"student": figures}}, [])
    assert [(each.metric_type, each.dataset_name) for each in found["eval_results"]] == [
        ("accuracy", "a.txt")
    ]
    assert card._measured("member_1", "mlm", results | {"stages": {}}, []) == {}


def test_the_config_has_no_path_of_this_machine(tmp_path):
    text, _ = page(
        tmp_path,
        cache={"folder": str(tmp_path / "cache")},
        other=["/srv/a.txt,/srv/b.txt", "~/mine/x", "gs://bucket/run/7", "a / b", "google/bert"],
    )
    assert str(tmp_path) not in text and "/srv" not in text and "gs://" not in text
    other = ["a.txt,b.txt", "x", "7", "a / b", "google/bert"]
    assert json.loads(text.partition("```json\n")[2].partition("```")[0])["other"] == other


def test_local_text_has_no_path(tmp_path):
    _, metadata = page(tmp_path, data={"train": {"path": "texts/a.txt"}})
    assert "datasets" not in metadata
    _, metadata = page(tmp_path, data={"train": {"source": "hub", "path": str(tmp_path)}})
    assert "datasets" not in metadata


def test_licence_of_the_first_card_counts(tmp_path):
    for name, licence in (("a", ""), ("b", "license: mit\n"), ("c", "license: apache-2.0\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text(f"---\n{licence}language: en\n---\n# card\n")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "README.md").write_text("# no metadata\n")
    folders = [None, tmp_path / "nothing", tmp_path / "b", tmp_path / "c"]
    assert card.inherited(*folders) == {"license": "mit", "language": "en"}
    assert card.inherited(tmp_path / "a") == {"language": "en"}
    assert card.inherited(tmp_path / "bare") == {}


def test_hub_ids(tmp_path, monkeypatch):
    assert card.is_hub_id("gpt2") and card.is_hub_id("google-bert/bert-base-uncased")
    for path in ("./model", "/models/bert", "../bert", "a/b/c", "~/bert", ""):
        assert not card.is_hub_id(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt2").mkdir()
    assert not card.is_hub_id("gpt2")
    assert card.public_name("/models/bert") == "bert"
