import contextlib
import io
import json
import subprocess
import sys

import jax
import pytest
from jax.errors import JaxRuntimeError

from kd_jax.errors import UserError
from kd_jax.plans.topology import Topology
from kd_jax.recipes import plan
from kd_jax.report import plan as tables
from kd_jax.run.run import build
from tests import smoke

CPUS = Topology("cpu:8", 8, 2**30, 1e12, 1e10)


def config(**changes):
    found = smoke.masked()
    found.update(changes)
    return found


def bert_to_six_layers(**changes):
    found = config(**changes)
    own = dict(revision="", architecture={}, init="", embedding={})
    found.teacher = dict(model="google-bert/bert-base-uncased", **own)
    found.student.architecture = dict(num_hidden_layers=6)
    found.tokenizer.train = ""
    found.task.seq_len = 128
    return found


def needed(found):
    return plan.needed(build(found, None, jax.devices()[:1]))


def test_sizes_of_known_models():
    found = needed(bert_to_six_layers())
    assert found["params_teacher"] == 109_514_298  # as PyTorch's BertForMaskedLM counts them
    assert found["params_student"] == 66_985_530 + 1_536  # DistilBERT's, and token types
    assert found["reduction_percent"] == 38.83
    assert found["gradient_bytes"] == 4 * found["params_student"]


def test_flops_needed():
    found = needed(bert_to_six_layers())
    rows, tokens, positions, width, vocabulary = 16, 128, 24, 768, 30_522
    assert (found["rows"], found["tokens"], found["positions"]) == (rows, tokens, positions)
    layer = rows * (24 * tokens * width**2 + 4 * tokens**2 * width)
    head = rows * positions * 2 * width * (width + vocabulary)
    assert found["flops_needed"] == 12 * layer + head + 3 * (6 * layer + head)


def test_a_term_at_all_positions_takes_the_head_there():
    found = config()
    found.objective.kl.positions = "all"
    assert needed(found)["positions"] == found.task.seq_len


def test_projections_are_counted():
    found = config()
    found.student.architecture.hidden_size = 16
    found.student.init = "scratch"
    student = needed(found)
    more = 4 * 16 * 32  # one projection, float32
    assert student["gradient_bytes"] == 4 * student["params_student"] + more


def compiled_step(found):
    run = build(found, None, jax.devices())
    return plan.needed(run), plan.compiled_step(run, CPUS)


def test_compiled_step_takes_what_is_needed():
    # A device has 8 rows with 8 slots each: one chunk, or sixteen.
    whole, found = compiled_step(config(batch_size=64, vocab_chunk=64))
    assert 0.98 <= found["flops_compiled"] / whole["flops_needed"] <= 1.02
    assert found["unbounded_loops"] == []
    _, chunked = compiled_step(config(batch_size=64, vocab_chunk=4))
    assert chunked["flops_compiled"] == found["flops_compiled"]

    parts = found["memory_parts"]
    state = 3 * whole["gradient_bytes"]  # parameters and two moments
    assert state < parts["aliased"] <= parts["outputs"] < parts["arguments"]
    total = parts["arguments"] + parts["temporaries"] + parts["outputs"] - parts["aliased"]
    assert found["memory_bytes_per_device"] == total

    # Plain data parallelism: gradients are summed, and nothing is gathered.
    assert list(found["collective_bytes"]) == ["all-reduce"]
    assert 1.0 <= found["collective_bytes"]["all-reduce"] / whole["gradient_bytes"] <= 1.05
    assert found["all_gathers"] == []
    total = sum(each["bytes"] * each["count"] for each in found["collectives"])
    assert found["collective_bytes"]["all-reduce"] == total


def test_fsdp_gathers_kernels_and_no_table():
    found = config()
    found.mesh.fsdp = 4
    _, step = compiled_step(found)
    assert {"all-gather", "reduce-scatter"} <= set(step["collective_bytes"])
    gathered = {shape for shapes in step["all_gathers"] for shape in shapes.split(", ")}
    sizes = [tuple(map(int, shape.rstrip("]").partition("[")[2].split(","))) for shape in gathered]
    assert (32, 32) in sizes, "kernels"
    assert max(max(size) for size in sizes) < found.tokenizer.vocab_size == 512


def test_memory_by_kind_is_that_of_the_compiled_step():
    found = config(batch_size=64)
    found.mesh.fsdp = 8
    whole, step = compiled_step(found)
    estimate, kinds = whole["memory_estimate"], step["memory_by_kind"]
    exact = ("teacher", "weights", "moments", "batch")
    assert {kind: estimate[kind] for kind in exact} == {kind: kinds[kind] for kind in exact}
    arguments = step["memory_parts"]["arguments"]
    assert sum(estimate[kind] for kind in exact) == pytest.approx(arguments, rel=0.02)
    assert kinds["moments"] == pytest.approx(2 * kinds["weights"], rel=0.01)
    alone = plan.needed(build(config(batch_size=64), None, jax.devices()))
    split = whole["memory_estimate"]["gradients"] / alone["memory_estimate"]["gradients"]
    assert 1 / 8 <= split < 1 / 5  # vectors and small tables are whole on every device
    assert alone["memory_estimate"]["gathered"] == 0 < estimate["gathered"]
    # Eight devices compute an eighth of the logits of eight times the rows.
    assert whole["chunk"]["rows"] == 8 * alone["chunk"]["rows"]
    assert whole["chunk"]["bytes"] == alone["chunk"]["bytes"]


def test_blocks_computed_again_keep_less():
    plain, again = (
        needed(bert_to_six_layers(remat=remat))["memory_estimate"] for remat in (False, True)
    )
    assert again["activations"] < 0.4 * plain["activations"]
    del plain["activations"], again["activations"]
    assert plain == again


def test_the_chunk_of_the_vocabulary_loss():
    found = needed(bert_to_six_layers(vocab_chunk=64))
    assert found["chunk"] == {"rows": 64, "bytes": 3 * 4 * 64 * 30_522}
    assert found["memory_estimate"]["logits"] == found["chunk"]["bytes"]


def test_every_stage_has_its_own_plan():
    found = config(steps=100, batch_size=16)
    found.stages.teacher = dict(steps=10)
    run = build(found, None, jax.devices()[:1])
    teacher, baseline, student = (plan.needed(run, each) for each in run.stages)
    assert teacher["params_student"] == teacher["params_teacher"] > student["params_student"]
    assert teacher["memory_estimate"]["teacher"] == baseline["memory_estimate"]["teacher"] == 0
    assert student["memory_estimate"]["teacher"] > 0
    assert (teacher["steps"], student["steps"]) == (10, 100)
    assert student["total_tokens"] == 100 * 16 * found.task.seq_len
    assert student["total_flops"] == 100 * student["flops_needed"] > baseline["total_flops"]
    assert plan.needed(run) == student


@pytest.fixture
def here(monkeypatch):
    """The child's work is done in this process, on its eight devices."""

    def run(command, input, **_):
        out, errors, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            monkeypatch.setattr(sys, "stdin", io.StringIO(input))
            try:
                plan._child()
            except SystemExit as ended:
                status = ended.code
        return subprocess.CompletedProcess(command, status, out.getvalue(), errors.getvalue())

    monkeypatch.setattr(plan.subprocess, "run", run)


def test_hours_of_a_run(here):
    one = plan.plan(config(), "v5e:2x2", ["baseline", "student"], mfu=0.5, compiles=False)
    assert (one["devices"], one["mfu"], len(one["stages"])) == (4, 0.5, 2)
    for each in one["stages"]:
        hours = each["total_flops"] / (4 * 197e12 * 0.5) / 3600
        assert each["hours"] == pytest.approx(hours)
        assert each["chip_hours"] == pytest.approx(4 * hours)
        assert "topology" not in each  # nothing was compiled
    total = sum(each["chip_hours"] for each in one["stages"])
    assert one["total"]["chip_hours"] == total > 0
    cells = tables.totals(one).rows
    assert [row[0] for row in cells] == ["baseline", "student", "all"]


def test_the_planned_stages_exist(here):
    with pytest.raises(UserError, match="--stage=pupil: no such stage; have: teacher, baseline"):
        plan.plan(config(), stages=["pupil"])


OOM = JaxRuntimeError(
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
    "required for HLO temporaries (46.96G) exceeds available HBM (15.75G). HLO module: jit_f."
    "\nSee https://example.com for more."
)


def advice(**changes):
    found = config(batch_size=32, **changes)
    run = build(found, None, jax.devices())
    return str(plan._does_not_fit(OOM, CPUS, run, run.principal))


def test_out_of_memory_says_what_would_help():
    message = advice()
    assert message.startswith("stage student: the step does not fit into a chip of cpu:8: Ran out")
    assert "(46.96G) exceeds available HBM (15.75G). What helps: raise accumulate to at" in message
    assert "at most 4, or lower batch_size; set remat=True; split parameters over more" in message
    # Nothing that is done already, or that could not be.
    whole = dict(fsdp=8, model=1, reduction="float32")
    message = advice(accumulate=4, remat=True, mesh=whole)
    assert message.endswith("(15.75G). What helps: take more chips, or such with more memory")
    other = JaxRuntimeError("INTERNAL: something else")
    run = build(config(), None, jax.devices())
    assert plan._does_not_fit(other, CPUS, run, run.principal) is other


def test_mistakes_come_out_of_the_child():
    with pytest.raises(UserError, match="unknown topology 'v5e:3x3'; have"):
        plan.plan(config(), "v5e:3x3")
    with pytest.raises(UserError, match="15 rows cannot be divided among 4 devices"):
        plan.plan(config(batch_size=15), "v5e:2x2")


def test_a_tpu_slice(monkeypatch):
    pytest.importorskip("libtpu")
    monkeypatch.delenv("XLA_FLAGS")  # libtpu refuses flags that it does not know
    found = plan.plan(config(), "v5e:2x2", ["student"])
    assert json.loads(json.dumps(found)) == found
    assert (found["topology"], found["devices"]) == ("v5e:2x2", 4)
    (found,) = found["stages"]
    assert found["largest"] and found["compile_cpu_seconds"] > 0
    assert 0.98 <= found["flops_compiled"] / found["flops_needed"] <= 1.10
    assert 0 < found["memory_bytes_per_device"] < found["memory_bytes_of_chip"] == 2**34
    assert sum(found["collective_bytes"].values()) <= 1.05 * found["gradient_bytes"]
    assert found["all_gathers"] == []
