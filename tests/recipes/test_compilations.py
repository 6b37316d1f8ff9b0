"""One compilation for each program and shape of a run, which are listed at its start."""

import pytest
from etils import epath

from kd_jax.run import workdir
from kd_jax.run.run import build
from tests import smoke


@pytest.mark.parametrize(("name", "special_tokens"), [("masked", 2), ("pretrain_gpt2", 0)])
def test_one_compilation_a_program(name, special_tokens):
    found = smoke.run(name)
    config, data = found.config, found.results["data"]["validation"]
    stages = list(found.results["stages"])
    assert stages == ["teacher", *["baseline"] * (name == "masked"), "student"]
    # Every stage is evaluated three times, and the last batch of the text is not full.
    blocks = -(-data["tokens"] // (config.task.seq_len - special_tokens))
    assert config.eval.batch_size < blocks and blocks % config.eval.batch_size
    # Baseline and student are judged by the same program, the teacher by one without a teacher.
    assert found.compiled["jit(train_step)"] == len(stages)
    assert found.compiled["jit(eval_step)"] == 2
    lines = workdir.programs(build(config))
    for stage in stages:
        assert any(line.startswith(f"train_step {stage}: tokens 16x32, labels ") for line in lines)
    assert any(line.startswith("eval_step: tokens 64x32, labels ") for line in lines)


@pytest.mark.parametrize(
    ("says", "slow"),
    [
        ({"flags": "fpu avx512f avx512_vnni"}, True),
        ({"flags": "fpu avx512_bf16"}, False),
        ({"Features": "asimd"}, True),
        ({"Features": "asimd bf16"}, False),
        (None, False),
    ],
)
def test_a_cpu_without_bfloat16(monkeypatch, says, slow):
    monkeypatch.setattr(workdir, "_cpuinfo", lambda: says)
    config = smoke.masked()
    for precision, told in (("bf16", slow), ("fp32", False)):
        config.precision = precision
        lines = workdir.programs(build(config))
        assert any("no bfloat16 products" in line for line in lines) == told


def test_one_compilation_for_each_length_of_a_stage():
    """Of fine-tuning: teacher, baseline and student, at every bucket that four steps see."""
    found = smoke.run("finetune_agnews")
    lengths = {
        (stage, batch.tokens_BT.shape[1])
        for stage, batch in _batches(found, ("teacher", "baseline", "student"))
    }
    # Teacher and student are models of their own; the baseline's step has no teacher.
    assert found.compiled["jit(train_step)"] == len(lengths)


def _batches(found, stages):
    with smoke.private_caches():
        run = build(found.config, epath.Path(found.folder))
    for stage in run.stages:
        stream = run.tasks[stage.model].train(stage.batch_size, found.config.seed)
        assert stage.name in stages
        yield from ((stage.name, stream[step]) for step in range(stage.steps))
