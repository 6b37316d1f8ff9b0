"""Weight files: every layout that is read, every defect that is refused."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models import hf
from tests.models import tiny


@pytest.fixture
def saved(tmp_path):
    """(folder, params, family, config) of a tiny BERT with its masked-LM head."""
    family, config = families.read(tiny.CONFIGS["bert"])
    params = tiny.model("bert", "mlm").params
    hf.save(tmp_path, params, family, config, "mlm")
    return tmp_path, params, family, config


def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def rewrite(folder, found):
    safetensors.numpy.save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def assert_loads(folder, params, family, config, head="mlm"):
    jax.tree.map(np.testing.assert_array_equal, hf.load(folder, family, config, head), params)


def shard(folder):
    """Splits model.safetensors in two, with an index."""
    found = tensors(folder)
    names = sorted(found)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        safetensors.numpy.save_file({name: found[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


def test_loads_what_it_saved(saved):
    assert_loads(*saved)


def test_sharded(saved):
    shard(saved[0])
    assert_loads(*saved)


def test_pickled_only_as_weights(saved):
    torch = pytest.importorskip("torch")
    folder = saved[0]
    found = {name: torch.tensor(value) for name, value in tensors(folder).items()}
    (folder / "model.safetensors").unlink()
    torch.save(found, folder / "pytorch_model.bin")
    assert_loads(*saved)
    torch.save({"weights": found, "code": print}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin: truncated, or more than weights"):
        hf.load(folder, *saved[2:], "mlm")
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match="pytorch_model.bin: truncated"):
        hf.load(folder, *saved[2:], "mlm")


def test_old_names_and_unused_tensors(saved):
    folder, params, family, config = saved
    old = {}
    for name, value in tensors(folder).items():
        name = re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name)
        old[re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name)] = value
    old["bert.embeddings.position_ids"] = np.arange(40)[None]
    old["bert.pooler.dense.weight"] = np.zeros((32, 32), np.float32)
    old["cls.seq_relationship.bias"] = np.zeros(2, np.float32)
    old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = old["cls.predictions.bias"]
    rewrite(folder, old)
    assert_loads(*saved)
    assert_loads(folder, {"backbone": params["backbone"]}, family, config, "none")


def test_half_precision_becomes_float32(saved):
    torch = pytest.importorskip("torch")
    torch_files = pytest.importorskip("safetensors.torch")
    folder, params, family, config = saved
    whole = tensors(folder)
    for dtype in (torch.bfloat16, torch.float16):
        half = {name: torch.tensor(value).to(dtype) for name, value in whole.items()}
        torch_files.save_file(half, folder / "model.safetensors")
        loaded = hf.load(folder, family, config, "mlm")
        for ours, theirs in zip(*map(jax.tree.leaves, (loaded, params)), strict=True):
            assert ours.dtype == np.float32
            expected = torch.tensor(np.asarray(theirs)).to(dtype).float()
            np.testing.assert_array_equal(ours, expected.numpy())


def test_a_headless_checkpoint_gets_a_random_head(saved):
    folder, params, family, config = saved
    rewrite(folder, {k: v for k, v in tensors(folder).items() if not k.startswith("cls.")})
    with pytest.raises(UserError, match=r"- cls\.predictions\.bias"):
        hf.load(folder, family, config, "mlm")
    one, two = (hf.load(folder, family, config, "mlm", jax.random.key(i)) for i in range(2))
    jax.tree.map(np.testing.assert_array_equal, one["backbone"], params["backbone"])
    kernels = [loaded["head"]["transform"]["kernel"] for loaded in (one, two)]
    assert kernels[0].std() == pytest.approx(config.initializer_range, rel=0.1)
    assert not np.array_equal(*kernels) and not one["head"]["bias"].any()
    assert_loads(folder, {"backbone": params["backbone"]}, family, config, "none")


@pytest.fixture
def classifier(tmp_path):
    """(folder, params, family, config) of a tiny BERT that tells three classes apart."""
    labels = {"id2label": {"0": "yes", "1": "No", "2": "maybe"}}
    family, config = families.read(tiny.CONFIGS["bert"] | labels)
    params = tiny.model("bert", "classification", **labels).params
    hf.save(tmp_path, params, family, config, "classification")
    return tmp_path, params, family, config


def test_a_classifier_of_a_base_model_has_its_pooler(classifier, caplog):
    folder, params, family, config = classifier
    found = tensors(folder)
    rewrite(folder, {k: v for k, v in found.items() if not k.startswith("classifier")})
    with pytest.raises(UserError, match=r"- classifier\.weight, - classifier\.bias"):
        hf.load(folder, family, config, "classification")
    loaded = hf.load(folder, family, config, "classification", jax.random.key(0))
    assert "no classification head: random values in head/classifier" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, loaded["backbone"], params["backbone"])
    jax.tree.map(np.testing.assert_array_equal, loaded["head"]["pooler"], params["head"]["pooler"])
    kernel = loaded["head"]["classifier"]["kernel"]
    assert kernel.shape == (32, 3) and 0 < kernel.std() < 0.05


def test_another_head_is_set_aside(saved, classifier, caplog):
    # Both fixtures write to one folder: the classifier is there.
    folder, params, family, config = classifier
    for head, drawn in (("mlm", "head, head/norm, head/transform"), ("span", "head/span")):
        with pytest.raises(UserError, match=r"\+ classifier\.bias"):
            hf.load(folder, family, config, head)
        loaded = hf.load(folder, family, config, head, jax.random.key(0))
        jax.tree.map(np.testing.assert_array_equal, loaded["backbone"], params["backbone"])
        assert f"no {head} head: random values in {drawn}\n" in caplog.text
    hf.save(folder, saved[1], family, config, "mlm")
    hf.load(folder, family, config, "classification", jax.random.key(0))
    assert "random values in head/classifier, head/pooler\n" in caplog.text
    rewrite(folder, tensors(folder) | {"stranger": np.ones(1, np.float32)})
    with pytest.raises(UserError, match=r"\+ stranger;"):
        hf.load(folder, family, config, "classification", jax.random.key(0))


def test_heads_share_what_has_one_meaning(tmp_path, caplog):
    """A ModernBERT's heads begin with the same layer; a classifier is no span head, though named
    so."""
    for saved, head in (("mlm", "classification"), ("classification", "span"), ("span", "mlm")):
        folder, params = tmp_path / saved, tiny.model("modernbert", saved).params
        hf.save(folder, params, *families.read(tiny.CONFIGS["modernbert"]), saved)
        family, config = families.read(hf.read_config(folder))
        with pytest.raises(UserError, match="- (classifier|decoder)"):
            hf.load(folder, family, config, head)
        loaded = hf.load(folder, family, config, head, jax.random.key(0))["head"]
        drawn = {"classification": "head/classifier", "span": "head/span", "mlm": "head"}[head]
        assert f"no {head} head: random values in {drawn}\n" in caplog.text
        first = [each.get("pooler", each.get("transform")) for each in (loaded, params["head"])]
        jax.tree.map(np.testing.assert_array_equal, *first)


def test_a_classifier_without_its_pooler_is_half_a_head(classifier):
    folder, _, family, config = classifier
    rewrite(folder, {k: v for k, v in tensors(folder).items() if "pooler" not in k})
    with pytest.raises(UserError, match=r"- pooler\.dense\.weight, - pooler\.dense\.bias"):
        hf.load(folder, family, config, "classification", jax.random.key(0))


def test_a_classifier_of_other_classes(classifier):
    folder, params, family, config = classifier
    two = dataclasses.replace(config, labels=("no", "yes"))
    with pytest.raises(UserError) as error:
        hf.load(folder, family, two, "classification", jax.random.key(0))
    says = "classifier.weight is for 3 classes, but 2 are wanted (no, yes); take a checkpoint"
    assert f"{folder}: {says}" in str(error.value) and "\n" not in str(error.value)


def test_classes_are_put_in_the_order_of_the_labels(classifier):
    folder, params, family, config = classifier
    wanted = dataclasses.replace(config, labels=("maybe", "yes", "no"))
    loaded = hf.load(folder, family, wanted, "classification")["head"]["classifier"]
    theirs = params["head"]["classifier"]
    np.testing.assert_array_equal(loaded["kernel"], theirs["kernel"][:, [2, 0, 1]])
    np.testing.assert_array_equal(loaded["bias"], theirs["bias"][np.array([2, 0, 1])])
    other = dataclasses.replace(config, labels=("a", "b", "c"))  # no telling which is which
    loaded = hf.load(folder, family, other, "classification")["head"]["classifier"]
    np.testing.assert_array_equal(loaded["kernel"], theirs["kernel"])


def drop(name):
    return lambda found: found.pop(name)


def put(name, *shape):
    return lambda found: found.update({name: np.ones(shape, np.float32)})


@pytest.mark.parametrize(
    "change, says",
    [
        (drop("bert.encoder.layer.1.output.dense.bias"), "- encoder.layer.1.output.dense.bias"),
        (drop("cls.predictions.bias"), "- cls.predictions.bias"),  # half a head is no head
        (put("bert.encoder.layer.2.output.dense.bias", 32), "+ encoder.layer.2.output.dense.bias"),
        (put("classifier.weight", 2, 32), "+ classifier.weight"),
        (
            put("bert.encoder.layer.0.intermediate.dense.weight", 64, 32),
            "encoder.layer.0.intermediate.dense.weight has shape (64, 32), but config.json asks "
            "for (48, 32)",
        ),
        (put("bert.embeddings.word_embeddings.weight", 97, 32), "asks for (96, 32)"),
        (put("cls.predictions.decoder.weight", 96, 32), "set tie_word_embeddings to false"),
    ],
)
def test_names_what_does_not_fit(saved, change, says):
    folder, _, family, config = saved
    found = tensors(folder)
    change(found)
    rewrite(folder, found)
    with pytest.raises(UserError, match=re.escape(says)) as error:
        hf.load(folder, family, config, "mlm", jax.random.key(0))
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_long_lists_are_cut(saved):
    folder, _, family, config = saved
    found = {f"extra.{i}": np.ones(1, np.float32) for i in range(20)}
    rewrite(folder, tensors(folder) | found)
    with pytest.raises(UserError, match=r"\+ extra\.0, .*\+ 14 more"):
        hf.load(folder, family, config, "mlm")


def test_missing_and_broken_files(saved):
    folder, _, family, config = saved

    def refused(says):
        with pytest.raises(UserError, match=says):
            hf.load(folder, family, config, "mlm")

    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 4, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        refused("model.safetensors: truncated or not safetensors")
    weights.write_bytes(whole)
    shard(folder)
    index = folder / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": names | {"gone": "a.safetensors"}}))
    refused("files lack - gone")
    (folder / "b.safetensors").unlink()
    refused("b.safetensors: missing, though the index names it")
    index.write_text("{}")
    refused("its weight_map should give the file of each tensor")
    index.unlink()
    (folder / "a.safetensors").unlink()
    refused("no weights; want model.safetensors or .*, have config.json")


@pytest.mark.parametrize("shards", [["a.safetensors"], {"gone": 3}, 7])
def test_an_index_that_names_no_files(saved, shards):
    folder, _, family, config = saved
    shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="index.json: its weight_map should give the file of each"):
        hf.load(folder, family, config, "mlm")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda state: {"state_dict": state}, "holds more than tensors (state_dict); save model."),
        (lambda state: {"model": state, "step": 7}, "holds more than tensors (model, step)"),
        (lambda state: list(state.values()), "holds a list, no tensors by name"),
        (lambda state: {}, "holds nothing, no tensors by name"),
        (lambda state: 3, "holds a int, no tensors by name"),
    ],
)
def test_weights_inside_another_object(saved, content, says):
    torch = pytest.importorskip("torch")
    folder, _, family, config = saved
    state = {name: torch.from_numpy(value) for name, value in tensors(folder).items()}
    (folder / "model.safetensors").unlink()
    torch.save(content(state), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=f"pytorch_model.bin: {re.escape(says)}"):
        hf.load(folder, family, config, "mlm")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(saved, value):
    folder, _, family, config = saved
    found = tensors(folder)
    found["bert.encoder.layer.1.output.dense.bias"][3] = value
    rewrite(folder, found)
    name = "bert.encoder.layer.1.output.dense.bias"
    with pytest.raises(UserError, match=f"model.safetensors: {name} holds 1 values that are not"):
        hf.load(folder, family, config, "mlm")
    # What no model here reads may be as it likes: masks of -inf are found there.
    unused = {"bert.embeddings.position_ids": np.full((1, 40), value, np.float32)}
    rewrite(folder, found | {name: np.zeros(32, np.float32)} | unused)
    hf.load(folder, family, config, "mlm")


def test_reads_config(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        hf.read_config(tmp_path)
    for text in ("{", "[1]", "\udcff"):
        (tmp_path / "config.json").write_text(text, errors="surrogateescape")
        with pytest.raises(UserError, match="config.json: not"):
            hf.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert hf.read_config(tmp_path) == {"a": 1}


def test_only_what_is_read_is_checked(saved):
    folder, _, family, config = saved
    found = tensors(folder)
    found["bert.encoder.layer.0.output.dense.weight"][3, 5] = np.nan  # (out, in)
    table = found["bert.embeddings.word_embeddings.weight"].copy()
    table[7] += 1
    rewrite(folder, found | {"cls.predictions.decoder.weight": table})
    params = hf.open(folder, family, config, "mlm")
    kernel = params["backbone"]["blocks"][0]["mlp"]["down"]["kernel"]
    assert kernel.read((slice(6, 48),)).shape == (42, 32)
    for rows, says in ((slice(0, 6), "1 values that are not"), (slice(None), "1 values")):
        with pytest.raises(UserError, match=f"output.dense.weight holds {says}"):
            kernel.read((rows, slice(2, 4)))
    embedding = params["backbone"]["tokens"]["embedding"]
    np.testing.assert_array_equal(embedding.read((slice(8, 12),)), table[8:12])
    with pytest.raises(UserError, match="set tie_word_embeddings to false"):
        embedding.read((slice(4, 8),))
