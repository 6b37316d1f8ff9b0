"""One compilation for each program and shape of a run, which are listed at its start."""

import pytest

from kd_jax.recipes.setup import Setup
from tests import smoke


@pytest.mark.parametrize("name", ["quickstart", "pretrain_gpt2"])
def test_one_compilation_a_program(name):
    found = smoke.run(name)
    config, data = found.config, found.results["data"]["validation"]
    stages = list(found.results["stages"])
    assert stages == ["teacher", "baseline", "student"]
    # Every stage was evaluated three times, and the last batch of the text is not full.
    blocks = data["tokens"] / (config.task.seq_len - 2)
    assert config.eval.batch_size < blocks and blocks % config.eval.batch_size > 1
    # Baseline and student are judged by the same program, the teacher by one without a teacher.
    assert found.compiled["jit(train_step)"] == 3
    assert found.compiled["jit(eval_step)"] == 2
    lines = Setup(config).shapes()
    for stage in stages:
        assert any(line.startswith(f"train_step {stage}: tokens 16x32") for line in lines)
    assert any(line.startswith("eval_step: tokens 64x32") for line in lines)
