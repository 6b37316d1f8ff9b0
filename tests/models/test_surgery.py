import re

import jax
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models import model_config, surgery
from kd_jax.precision import Policy
from tests.models import tiny

run = jax.jit(lambda model, batch: model(batch))


@pytest.mark.parametrize(
    "layers, student, teacher, expected",
    [
        ("uniform", 6, 12, [1, 3, 5, 7, 9, 11]),
        ("uniform", 6, 24, [3, 7, 11, 15, 19, 23]),
        ("uniform", 4, 6, [1, 2, 3, 5]),
        ("uniform", 3, 3, [0, 1, 2]),
        ("first", 2, 5, [0, 1]),
        ("last", 2, 5, [3, 4]),
        ((4, 0), 2, 5, [4, 0]),
    ],
)
def test_layer_map(layers, student, teacher, expected):
    assert surgery.layer_map(layers, student, teacher) == expected


@pytest.mark.parametrize(
    "layers, student, teacher, says",
    [
        ("middle", 2, 4, "have 'uniform'"),
        ("first", 5, 4, "the teacher only 4"),
        ([0, 1, 2], 2, 4, "want 2 numbers"),
        ([0, 4], 2, 4, "from 0 to 3"),
    ],
)
def test_layer_map_refuses(layers, student, teacher, says):
    with pytest.raises(UserError, match=says):
        surgery.layer_map(layers, student, teacher)


@pytest.mark.parametrize(
    "name, head",
    [
        ("bert", "mlm"),
        ("roberta", "mlm"),
        ("mobilebert", "mlm"),
        ("modernbert", "mlm"),
        ("electra", "mlm"),
        *((name, "clm") for name in ("gpt2", "llama", "phi", "gemma3_text", "olmo2")),
    ],
)
def test_all_layers_give_the_teacher_back(name, head):
    teacher, student = tiny.model(name, head), tiny.model(name, head, seed=1)
    copy = surgery.from_teacher(student, teacher, "uniform")
    jax.tree.map(np.testing.assert_array_equal, copy.params, teacher.params)


def test_chosen_layers_embeddings_and_head():
    teacher = tiny.model("bert", "mlm", num_hidden_layers=3)
    depth = {"num_hidden_layers": 2, "max_position_embeddings": 24}
    student = surgery.from_teacher(tiny.model("bert", "mlm", seed=1, **depth), teacher, [2, 0])
    ours, theirs = student.params["backbone"], teacher.params["backbone"]
    for mine, its in (
        (ours["blocks"][0], theirs["blocks"][2]),
        (ours["blocks"][1], theirs["blocks"][0]),
    ):
        jax.tree.map(np.testing.assert_array_equal, mine, its)
    jax.tree.map(np.testing.assert_array_equal, student.params["head"], teacher.params["head"])
    table = theirs["positions"]["embedding"][:24]
    np.testing.assert_array_equal(ours["positions"]["embedding"], table)


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("gemma3_text", {}, "of block 2, the student's 1, the window (layer_types) is 5 in the"),
        ("smollm3", {}, "of block 2, the student's 1, the rotary embedding (no_rope_layers) is"),
        ("modernbert", {}, "of block 2, the student's 1, the window (layer_types) is None in the"),
        ("gemma3_text", {"rope_local_base_freq": 9.0}, "local_rotary is Rotary"),
        ("gemma3_text", {"query_pre_attn_scalar": 8}, "score_width is 20 in the teacher and 8"),
    ],
)
def test_layers_stay_what_they_are(name, changes, says):
    """A layer with a window, or without rotation, is copied to one that is so too."""
    pattern = {"smollm3": {"no_rope_layers": [1, 0, 1]}}.get(name, {})
    teacher = tiny.model(name, num_hidden_layers=3, **pattern)
    student = tiny.model(name, seed=1, **changes)
    with pytest.raises(UserError, match=re.escape(says)):
        surgery.from_teacher(student, teacher, [0, 2])
    if not changes:
        first = 0 if name == "modernbert" else 2
        copy = surgery.from_teacher(student, teacher, [first, 1])
        theirs = teacher.params["backbone"]["blocks"][first]
        jax.tree.map(np.testing.assert_array_equal, copy.params["backbone"]["blocks"][0], theirs)


@pytest.mark.parametrize("layers", [[2, 1], [0, 0]])
def test_a_block_without_a_norm_goes_to_one_without(layers):
    kinds = {"layer_types": ["full_attention"] * 2}
    teacher = tiny.model("modernbert", num_hidden_layers=3, layer_types=["full_attention"] * 3)
    with pytest.raises(UserError, match="attention_norm is in only one of block .*layers=.0, "):
        surgery.from_teacher(tiny.model("modernbert", seed=1, **kinds), teacher, layers)


def test_distilbert_from_bert_starts_with_its_embeddings():
    teacher = tiny.model("bert", "mlm")
    student = surgery.from_teacher(tiny.model("distilbert", "mlm", seed=1), teacher, "uniform")
    batch = tiny.batch("distilbert").replace(types_BT=None)
    ours, theirs = run(student, batch), run(teacher, batch)
    for mine, its in zip(ours.hidden, theirs.hidden, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)
    np.testing.assert_allclose(ours.features, theirs.features, atol=1e-5)


def test_classifiers_and_span_heads_come_along():
    for head in ("classification", "span"):
        teacher, student = (tiny.model("bert", head, seed=seed) for seed in (0, 1))
        copy = surgery.from_teacher(student, teacher, "uniform")
        jax.tree.map(np.testing.assert_array_equal, copy.params, teacher.params)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("bert", {"id2label": {"0": "a", "1": "b", "2": "c"}}),
        ("bert", {"id2label": {"0": "LABEL_1", "1": "LABEL_0"}}),  # the same, in another order
        ("distilbert", {}),  # its first layer has another activation
    ],
)
def test_a_head_that_does_not_fit_stays_the_students(name, changes, caplog):
    teacher = tiny.model("bert", "classification")
    student = tiny.model(name, "classification", seed=1, **changes)

    @jax.jit
    def start(own, params):
        drawn = student.replace(params=own)
        return surgery.from_teacher(drawn, teacher.replace(params=params), "uniform").params

    surgery._say.cache_clear()
    with caplog.at_level("INFO"):
        found = start(student.params, teacher.params)
        jax.eval_shape(start, student.params, teacher.params)
    assert caplog.text.count("keeps its own") == 1
    jax.tree.map(np.testing.assert_array_equal, found["head"], student.params["head"])
    tables = [model["backbone"]["tokens"]["embedding"] for model in (found, teacher.params)]
    np.testing.assert_array_equal(*tables)
    family, config = families.read(tiny.CONFIGS[name] | changes)
    abstract = families.abstract(family, config, "classification", Policy())
    with pytest.raises(UserError, match="head is not like the student's"):
        surgery.from_teacher(abstract, teacher, "uniform")


def test_a_block_keeps_its_function_where_scores_are_divided_by_its_place():
    scaled = {"scale_attn_by_inverse_layer_idx": True, "n_layer": 3}
    teacher = tiny.model("gpt2", "clm", **scaled)
    student = tiny.model("gpt2", "clm", seed=1, **scaled | {"n_layer": 1})
    student = surgery.from_teacher(student, teacher, [2])
    for model in (student, teacher):  # two models that run the same single block
        model.params["backbone"]["norm"] = student.params["backbone"]["norm"]
    blocks = teacher.params["backbone"]["blocks"]
    blocks[0] = blocks[1] = jax.tree.map(np.zeros_like, blocks[2])  # adds nothing
    batch = tiny.batch("gpt2")
    np.testing.assert_allclose(
        run(student, batch).features, run(teacher, batch).features, atol=1e-5
    )


def test_a_shorter_llama_takes_a_llamas_layers():
    teacher = tiny.model("llama", max_position_embeddings=80, num_hidden_layers=3)
    student = surgery.from_teacher(tiny.model("llama", seed=1), teacher, [0, 2])
    ours, theirs = student.params["backbone"], teacher.params["backbone"]
    jax.tree.map(np.testing.assert_array_equal, ours["blocks"][1], theirs["blocks"][2])
    np.testing.assert_array_equal(
        student.params["head"]["unembed"], teacher.params["head"]["unembed"]
    )


@pytest.mark.parametrize(
    "changes, says",
    [
        (
            {"num_key_value_heads": 1},
            "block 0, the student's 0, is .*num_kv_heads=2.* in the teacher and .*num_kv_heads=1",
        ),
        ({"rope_theta": 500.0}, "rotary is .*theta=10000.0"),
        (
            {"blocks": (model_config.bottleneck(16, 2, 2, 24),) * 2},
            "block 0, the student's 0, is .* in the teacher and .*bottleneck",
        ),
    ],
)
def test_refuses_decoders_of_another_shape(changes, says):
    with pytest.raises(UserError, match=says):
        surgery.from_teacher(tiny.model("llama", **changes), tiny.model("llama"), "first")


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"hidden_size": 16}, "width is 32 in the teacher and 16"),
        ({"intermediate_size": 40}, "ffn_width is 48 in the teacher and 40"),
        ({"vocab_size": 90}, "vocab_size"),
        ({"max_position_embeddings": 64}, r"positions/embedding is \(40, 32\) .* and \(64, 32\)"),
        ({"num_attention_heads": 2}, "num_heads is 4 in the teacher and 2"),
        ({"hidden_act": "relu"}, "activation"),
        ({"model_type": "roberta"}, "skip_padding"),
    ],
)
def test_refuses_students_of_another_shape(changes, says):
    family, config = families.read(tiny.CONFIGS["bert"] | changes)
    student = families.abstract(family, config, "mlm", Policy())
    family, config = families.read(tiny.CONFIGS["bert"])
    teacher = families.abstract(family, config, "mlm", Policy())
    with pytest.raises(UserError, match=says):
        jax.eval_shape(
            lambda params: (
                surgery.from_teacher(student, teacher.replace(params=params), "uniform").params
            ),
            teacher.params,
        )
