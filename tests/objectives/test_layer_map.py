"""Layer maps of the terms over hidden states and attention."""

import jax
import pytest

from kd_jax.errors import UserError
from kd_jax.objectives import layer_map, pkd
from kd_jax.types import ModelSpec
from tests.objectives.rows import STATE_TERMS


def specs(student_layers, teacher_layers):
    return ModelSpec(8, student_layers), ModelSpec(8, teacher_layers)


@pytest.mark.parametrize(
    ("student_layers", "teacher_layers", "pairs"),
    [
        (6, 12, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12)]),
        (3, 6, [(1, 2), (2, 4), (3, 6)]),
        (4, 6, [(1, 2), (2, 3), (3, 4), (4, 6)]),
        (3, 3, [(1, 1), (2, 2), (3, 3)]),
        (4, 1, [(1, 1), (2, 1), (3, 1), (4, 1)]),  # never the embeddings
    ],
)
def test_uniform(student_layers, teacher_layers, pairs):
    assert list(layer_map.pairs("x", "uniform", *specs(student_layers, teacher_layers))) == pairs


def test_last_is_the_last_of_each():
    assert layer_map.pairs("x", "last", *specs(4, 12)) == ((4, 12),)


@pytest.mark.parametrize(
    ("given", "student_layers", "pairs"),
    [
        ("skip", 6, [(1, 2), (2, 4), (3, 6), (4, 8), (5, 10)]),
        ("last", 6, [(1, 7), (2, 8), (3, 9), (4, 10), (5, 11)]),
        ("skip", 3, [(1, 4), (2, 8)]),
        ("last", 3, [(1, 10), (2, 11)]),
        (((1, 12), (3, 2)), 3, [(1, 12), (3, 2)]),
    ],
)
def test_patient_maps_leave_the_last_layer_out(given, student_layers, pairs):
    assert list(pkd.layer_pairs(given, *specs(student_layers, 12))) == pairs


@pytest.mark.parametrize("given", ["skip", "last"])
@pytest.mark.parametrize("student_layers", [1, 13])
def test_patient_maps_need_layers_below_the_last(given, student_layers):
    wanted = f"pkd: layers='{given}' wants a student of 2 to 12 layers .* has {student_layers}:"
    with pytest.raises(UserError, match=wanted):
        pkd.layer_pairs(given, *specs(student_layers, 12))


@pytest.mark.parametrize("name", STATE_TERMS)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([(3, 1)], r"no pair \(3, 1\): the student has layers . to 2, the teacher . to 6"),
        ([(1, 7)], r"no pair \(1, 7\)"),
        ([(1, -1)], r"no pair \(1, -1\)"),
        ([(1, 2, 3)], r"layers=\[\(1, 2, 3\)\]: have .*, or pairs \(student, teacher\)"),
        ([(1, "2")], r"layers=\[\(1, '2'\)\]: have"),
        ([2, 4], r"layers=\[2, 4\]: have"),
        (3, "layers=3: have"),
        ("middle", "layers='middle': have"),
        ([], "layers is empty"),
    ],
)
def test_mistakes(name, given, message):
    with pytest.raises(UserError, match=f"^objective {name}: (layers: there is )?{message}"):
        STATE_TERMS[name](layers=given).init(jax.random.key(0), *specs(2, 6))


@pytest.mark.parametrize("name", [name for name in STATE_TERMS if name != "hidden"])
def test_only_hidden_knows_the_embeddings_as_a_layer(name):
    for pair in ((0, 1), (1, 0)):
        with pytest.raises(UserError, match="the student has layers 1 to 2, the teacher 1 to 6"):
            STATE_TERMS[name](layers=[pair]).init(jax.random.key(0), *specs(2, 6))
