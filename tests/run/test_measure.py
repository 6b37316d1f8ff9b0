import pytest

from kd_jax.run import measure
from kd_jax.run.run import build
from tests.recipes import substituting

ROWS, TOKENS, WIDTH, VOCABULARY = 8, 16, 16, 280
FULL = 12 * WIDTH**2 * TOKENS + 2 * TOKENS**2 * WIDTH  # multiplications of a row in a block
INNER = 4 * 8**2 + 2 * 8 * 16  # kernels inside the bottleneck, of width 8 and FFN 16
COMPACT = (INNER + 2 * WIDTH * 8) * TOKENS + 2 * TOKENS**2 * 8
HEAD = TOKENS * WIDTH * VOCABULARY


def forward(blocks):
    return 2 * ROWS * (sum(blocks) + HEAD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("text")


def effort(folder, stage, **changes):
    config = substituting.config(folder, **changes)
    config.stages = {stage: {}}
    config.tokenizer.train, config.teacher.architecture["vocab_size"] = "", VOCABULARY
    with substituting.quick():
        run = build(config, None)
    (this,) = run.stages
    return measure.training_cost(run, this, {"teacher": run.models["teacher"].abstract().params})


def test_the_phases_of_a_substitution(folder):
    teacher = forward([FULL] * 3)
    wanted = 0
    for steps, compact in ((3, 1), (3, 2), (4, 3)):
        own = forward([COMPACT] * compact + [FULL] * (3 - compact))
        wanted += steps * (3 * own + teacher)
    found = effort(folder, "substitute")
    assert found == {"steps": 10, "training_flops": wanted}


def test_a_small_model_from_the_start(folder):
    wanted = 10 * (3 * forward([COMPACT] * 3) + forward([FULL] * 3))
    assert effort(folder, "student")["training_flops"] == wanted
    assert effort(folder, "teacher")["training_flops"] == 10 * 3 * forward([FULL] * 3)


def test_regression_is_part_of_it(folder):
    more = 0
    for compact in range(3):
        top = 2 - compact  # the last block goes first; those above it are not computed
        more += 5 * 2 * ROWS * (FULL + 3 * COMPACT + 4 * top * FULL)
    found = effort(folder, "substitute", fit_steps=5)
    assert found["fit_steps"] == 15
    plain = effort(folder, "substitute")["training_flops"]
    assert found["training_flops"] == plain + more
