"""The embedding head, and sentence-transformers' files around it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.errors import UserError
from kd_jax.models import blueprint, embedder, heads, hf, surgery
from kd_jax.models import family as families
from kd_jax.models.model_config import Dense, Texts
from kd_jax.precision import Policy
from kd_jax.types import Batch
from tests.models import tiny

D = 32
TEXTS = Texts((("document", ""), ("query", "query: ")), "query", "dot", 24)


def config(name="bert", **changes):
    return dataclasses.replace(families.read(tiny.CONFIGS[name])[1], **changes)


def made(name="bert", **changes):
    """(family, config, params) of an embedder, drawn by numpy."""
    family, own = families.read(tiny.CONFIGS[name])[0], config(name, **changes)
    shapes, rng = (
        families.abstract(family, own, "embedding", Policy()).params,
        np.random.default_rng(0),
    )
    draw = lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32)  # noqa: E731
    return family, own, jax.tree.map(draw, shapes)


def head_of(x_BTD, mask_BT, **changes):
    """The vectors that a head without dense layers makes, (B, D)."""
    batch = Batch(None, jnp.zeros(mask_BT.shape, jnp.int32), jnp.asarray(mask_BT), None, None)
    found, unembed, bias = heads.Embedder(config(**changes))(jnp.asarray(x_BTD), batch, None, None)
    assert unembed is None and bias is None and found.shape[1] == 1 and found.dtype == jnp.float32
    return np.asarray(found[:, 0])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last", "max"])
def test_poolings_see_real_tokens_alone(pooling):
    x_BTD = np.random.default_rng(0).standard_normal((3, 5, D)).astype(np.float32)
    lengths = [5, 2, 0]  # the last row fills a batch up
    mask_BT = (np.arange(5) < np.array(lengths)[:, None]).astype(np.float32)
    rows = [x_TD[: max(n, 1)] for x_TD, n in zip(x_BTD, lengths, strict=True)]
    want = {"mean": lambda x: x.mean(0), "max": lambda x: x.max(0)}
    want |= {"cls": lambda x: x[0], "last": lambda x: x[-1]}
    wanted = np.stack([want[pooling](x) for x in rows])
    found = head_of(x_BTD, mask_BT, pooling=pooling, normalize=False)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    spoilt = np.where(mask_BT[..., None] > 0, x_BTD, 1e9)
    spoilt[2, 0] = x_BTD[2, 0]
    np.testing.assert_array_equal(head_of(spoilt, mask_BT, pooling=pooling, normalize=False), found)
    unit = wanted / np.linalg.norm(wanted, axis=1, keepdims=True)
    found = head_of(x_BTD, mask_BT, pooling=pooling, dimensions=7)
    np.testing.assert_allclose(found, unit[:, :7], atol=1e-6)  # cut last, as the library does


def test_a_vector_of_zeros_has_a_gradient():
    mask_BT = jnp.ones((1, 2))
    batch = Batch(None, jnp.zeros((1, 2), jnp.int32), mask_BT, None, None)
    head = heads.Embedder(config())
    found = jax.grad(lambda x: head(x, batch, None, None)[0].sum() * 0)(jnp.zeros((1, 2, D)))
    assert (np.asarray(found) == 0).all()


LAYOUTS = [
    dict(),
    dict(pooling="last", normalize=False),
    dict(pooling="cls", dimensions=8, texts=TEXTS),
    dict(pooling="max", dense=(Dense(24, "tanh"), Dense(12, "linear", False)), dimensions=12),
]


@pytest.mark.parametrize("changes", LAYOUTS)
def test_files_say_what_was_written(changes, tmp_path):
    own = config(**changes)
    embedder.write(tmp_path, own)
    assert embedder.describes(tmp_path)
    found = embedder.read(config(pooling="max", normalize=False), tmp_path)
    assert embedder.vectors(found) == embedder.vectors(own)
    assert found.texts == own.texts._replace(max_tokens=own.texts.max_tokens or 40)


def test_a_folder_without_files_has_mean_pooling(tmp_path):
    assert embedder.read(config(), tmp_path) == config(pooling="mean", normalize=True)
    assert not embedder.describes(tmp_path)


def test_newer_files(tmp_path):
    embedder.write(tmp_path, config(dense=(Dense(12),)))
    kinds = ["base.modules.transformer.Transformer", "sentence_transformer.modules.pooling.Pooling"]
    kinds += ["base.modules.dense.Dense", "base.modules.normalize.Normalize"]
    modules = json.loads((tmp_path / "modules.json").read_text())
    for module, kind in zip(modules, kinds, strict=True):
        module["type"] = f"sentence_transformers.{kind}"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    pooling = dict(embedding_dimension=D, pooling_mode="lasttoken", include_prompt=True)
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    normalize = tmp_path / "3_Normalize" / "config.json"
    normalize.parent.mkdir()
    normalize.write_text(json.dumps(dict.fromkeys(["module_input_name"], "sentence_embedding")))
    found = embedder.read(config(), tmp_path)
    assert embedder.vectors(found) == ("last", (Dense(12),), True, 0)


def changed(file, **keys):
    def change(folder):
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))

    return change


def module(number, **keys):
    def change(folder):
        path = folder / "modules.json"
        modules = json.loads(path.read_text())
        modules[number] |= keys
        path.write_text(json.dumps(modules))

    return change


LIBRARY = "sentence_transformers.models"
POOLING, DENSE = "1_Pooling/config.json", "2_Dense/config.json"
ABOUT, READING = "config_sentence_transformers.json", "sentence_bert_config.json"
REFUSED = [
    (
        module(1, type=f"{LIBRARY}.WeightedLayerPooling"),
        "has Transformer, WeightedLayerPooling, De",
    ),
    (module(2, type=f"{LIBRARY}.Normalize"), "has Transformer, Pooling, Normalize, Normalize; an "),
    (module(0, type="modeling.Own"), "modeling.Own is code of the model's own, which is never run"),
    (module(0, path="0_Transformer"), "the transformer is in 0_Transformer; it should be in the f"),
    (module(1, path="../elsewhere"), "is not in the model's folder"),
    (changed(POOLING, pooling_mode_cls_token=True), "pooling cls and mean is not supported; have"),
    (changed(POOLING, pooling_mode="weightedmean"), "pooling weightedmean is not supported; have"),
    (changed(POOLING, include_prompt=False), "include_prompt=False is not supported; have: True"),
    (changed(POOLING, word_embedding_dimension=9), "word_embedding_dimension=9, but what comes be"),
    (changed(DENSE, in_features=9), "in_features=9, but what comes before is 32 wide; the files"),
    (changed(DENSE, activation_function="torch.nn.Own"), "activation_function='torch.nn.Own' is n"),
    (changed(DENSE, use_residual=True), "use_residual=True is not supported"),
    (changed(DENSE, module_output_name="scores"), "module_output_name='scores' is not supported"),
    (changed(ABOUT, model_type="SparseEncoder"), "model_type='SparseEncoder' is not supported"),
    (changed(ABOUT, similarity_fn_name="maxsim"), "similarity_fn_name='maxsim' is not supported"),
    (changed(ABOUT, default_prompt_name="query"), "default_prompt_name='query' is none of its pro"),
    (changed(ABOUT, truncate_dim=0), "truncate_dim=0 must be at least 1"),
    (changed(READING, do_lower_case=True), "do_lower_case, but the tokenizer does not; set it to "),
    (lambda folder: (folder / POOLING).unlink(), "config.json: missing, though modules.json names"),
    (lambda folder: (folder / POOLING).write_text("{"), "config.json: not JSON ("),
    (lambda folder: (folder / "modules.json").write_text("[3]"), "modules.json: no list of modul"),
]


@pytest.mark.parametrize("spoil, message", REFUSED)
def test_what_is_not_implemented_is_refused(spoil, message, tmp_path):
    embedder.write(tmp_path, config(dense=(Dense(12, "tanh"),)))
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        embedder.read(config(), tmp_path)
    assert message in str(error.value) and str(tmp_path) in str(error.value)


def described(folder="", like=None, base="bert", **embedding):
    section = dict(model=str(folder), revision="main", architecture={}, embedding=embedding)
    section = ml_collections.ConfigDict(section)
    base = tiny.CONFIGS[base] if base else None
    return blueprint.describe(section, "student", "embedding", Policy(), base=base, like=like)


def test_students_have_the_teachers_settings(tmp_path):
    family, own, params = made(**LAYOUTS[3])
    hf.save(tmp_path, params, family, own, "embedding")
    teacher = described(tmp_path, base=None).config
    assert embedder.vectors(teacher) == embedder.vectors(config(**LAYOUTS[3]))
    student = described(like=teacher).config
    assert embedder.vectors(student) == embedder.vectors(teacher)
    own = described(like=teacher, pooling="cls", dense=16, activation="gelu", dimensions=0).config
    assert embedder.vectors(own) == ("cls", (Dense(16, "gelu"),), True, 0)
    assert described(like=teacher, dense=0, dimensions=5).config.dense == ()


@pytest.mark.parametrize(
    "embedding, message",
    [
        ({"pooling": "sum"}, "config.student.embedding.pooling='sum': have mean, cls, last, max"),
        (
            {"poling": "cls"},
            "unknown key config.student.embedding.poling (did you mean 'pooling'?)",
        ),
        ({"dimensions": 33}, "config.student.embedding.dimensions=33: vectors have 32 only"),
        ({"dense": 8, "dimensions": 9}, "dimensions=9: vectors have 8 only"),
        (
            {"activation": "tanh"},
            "config.student.embedding.activation is that of config.student.emb",
        ),
        ({"normalize": 1}, "config.student.embedding.normalize=1 should be True or False"),
    ],
)
def test_mistakes_in_settings(embedding, message):
    with pytest.raises(UserError) as error:
        described(**embedding)
    assert message in str(error.value)


def test_settings_are_of_embedders():
    section = dict(model="", revision="", architecture={}, embedding={"pooling": "cls"})
    with pytest.raises(UserError, match="config.student.embedding is for embedders, which this ta"):
        section = ml_collections.ConfigDict(section)
        blueprint.describe(section, "student", "mlm", Policy(), base=tiny.CONFIGS["bert"])


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_tensors_come_back(name, tmp_path):
    family, own, params = made(name, **LAYOUTS[3])
    hf.save(tmp_path, params, family, own, "embedding")
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))
    assert files == [f"{i}_Dense/model.safetensors" for i in (2, 3)] + ["model.safetensors"]
    kind, again = families.read(hf.read_config(tmp_path))
    again = embedder.read(again, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path, kind, again, "embedding"), params)
    # Another layer than the folder's begins at random, where that is allowed.
    other = dataclasses.replace(again, dense=(Dense(9),), dimensions=0)
    with pytest.raises(UserError, match="- dense.0.linear.weight, - dense.0.linear.bias"):
        hf.open(tmp_path, kind, other, "embedding")
    found = hf.load(tmp_path, kind, other, "embedding", jax.random.key(0))
    assert found["head"]["dense"][0]["kernel"].shape == (D, 9)
    with pytest.raises(UserError, match="dense.1.linear.weight"):
        (tmp_path / "3_Dense" / "model.safetensors").unlink()
        (tmp_path / "3_Dense" / "model.safetensors").symlink_to(
            tmp_path / "2_Dense/model.safetensors"
        )
        hf.open(tmp_path, kind, again, "embedding")


def test_layers_of_the_teacher_come_with_its_head():
    family, own, params = made(dense=(Dense(12, "tanh"),))
    teacher = families.abstract(family, own, "embedding", Policy()).replace(params=params)
    small = own.with_layers([1])
    student = families.abstract(family, small, "embedding", Policy())
    found = surgery.from_teacher(student, teacher, "last").params
    np.testing.assert_array_equal(
        found["head"]["dense"][0]["kernel"], params["head"]["dense"][0]["kernel"]
    )
    assert list(found["backbone"]["blocks"]) == [0]


@pytest.mark.parametrize("name", plugins.names("models", "FAMILY"))
def test_every_family_has_the_head(name):
    family = plugins.load("models", name, "FAMILY").FAMILY
    model = families.abstract(family, config(name, dense=(Dense(12),)), "embedding", Policy())
    found = jax.eval_shape(lambda model, batch: model(batch), model, tiny.batch(name))
    assert found.features.shape == (3, 1, 12) and found.unembed_VD is None
