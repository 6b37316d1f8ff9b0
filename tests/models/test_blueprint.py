"""Labels and heads of models that a config section describes."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_jax.errors import UserError
from kd_jax.models import blueprint, family, hf
from kd_jax.precision import Policy
from kd_jax.teachers.ensemble import members, stack
from kd_jax.types import Model
from tests.models import tiny

LABELS = ("negative", "neutral", "positive")


def describe(head, labels=None, base="bert", model="", **architecture):
    section = ConfigDict({"model": str(model), "revision": "", "architecture": architecture})
    base = tiny.CONFIGS[base] if base else None
    return blueprint.describe(section, "student", head, Policy(), base=base, labels=labels)


def test_labels_shape_the_head():
    described = describe("classification", LABELS)
    assert described.config.labels == LABELS
    params = described.draw(jax.random.key(0))
    assert params["head"]["classifier"]["kernel"].shape == (32, 3)
    assert params["head"]["classifier"]["bias"].shape == (3,)
    assert family.write(described.family, described.config, "classification")["label2id"] == {
        "negative": 0,
        "neutral": 1,
        "positive": 2,
    }
    assert describe("classification").config.labels == ("LABEL_0", "LABEL_1")


def test_a_checkpoint_keeps_its_labels_unless_others_are_given(tmp_path):
    kind, config = family.read(tiny.CONFIGS["bert"] | {"id2label": {"0": "score"}})
    params = tiny.model("bert", "classification", id2label={"0": "score"}).params
    hf.save(tmp_path, params, kind, config, "classification")
    described = describe("classification", base=None, model=tmp_path)
    assert described.config.labels == ("score",)
    loaded = described.load(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    with pytest.raises(UserError, match="is for 1 classes, but 3 are wanted"):
        describe("classification", LABELS, None, tmp_path).load(jax.random.key(0))


def test_stacked_models_do_without_the_kernel_that_cannot_be_batched():
    section = ConfigDict({"model": "", "revision": "main", "architecture": {}})
    gpu = Policy(attention="cudnn")
    described = blueprint.describe(section, "student", "clm", gpu, base=tiny.CONFIGS["llama"])
    two = list(map(jax.jit(described.draw), (jax.random.key(seed) for seed in (0, 1))))
    weights_E = np.full(2, 0.5, np.float32)
    batch = tiny.batch("llama")
    stacked, graphdef = stack(two, described.policy), tiny.model("llama", "clm").graphdef

    @jax.jit
    def features(stacked, params, batch):
        found = members(stacked, described.of_members, weights_E, batch, "logits")
        return found.heads.features_ND[1], Model(params, graphdef)(batch).features

    found_ND, one = features(stacked, two[1], batch)
    np.testing.assert_allclose(found_ND, one.reshape(-1, 32), atol=1e-5)


def test_a_head_that_the_family_does_not_have():
    with pytest.raises(
        UserError, match="gpt2 has no head 'classification'; have: clm, none, embedding"
    ):
        describe("classification", LABELS, "gpt2")


@pytest.mark.parametrize(
    "base, change, field",
    [
        ("bert", {"classifier_dropout": 0.3}, "classifier_dropout"),
        ("roberta", {"classifier_dropout": 0.3}, "classifier_dropout"),
        ("distilbert", {"seq_classif_dropout": 0.3}, "classifier_dropout"),
        ("distilbert", {"qa_dropout": 0.3}, "span_dropout"),
        ("mobilebert", {"num_feedforward_networks": 3}, "num_mlps"),
    ],
)
def test_architecture_takes_keys_of_heads(base, change, field):
    described = describe("classification", LABELS, base, **change)
    assert getattr(described.config, field) == next(iter(change.values()))


def test_planning_needs_no_more_than_a_config_json(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(blueprint.preset("Qwen/Qwen2.5-72B")))
    for model in (tmp_path, tmp_path / "config.json"):
        section = ConfigDict(dict(model=str(model), revision="", architecture={}))
        found = blueprint.describe(section, "teacher", "clm", Policy(), offline=True)
        assert blueprint.count(found.abstract().params) == 72_706_203_648
    with pytest.raises(UserError, match="config.json is a file; give the folder of the whole"):
        blueprint.describe(section, "teacher", "clm", Policy())
