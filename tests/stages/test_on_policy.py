"""The stage in which the student learns from what it writes itself."""

import json

import jax
import numpy as np
import pytest

from benchmarks import kill_resume
from configs import onpolicy_qwen3
from kd_jax.config import on_policy
from kd_jax.errors import UserError
from kd_jax.models.generate import Written
from kd_jax.run import rollout, stage, teaching
from kd_jax.run.prompts import Given, Prompts
from kd_jax.run.run import build
from kd_jax.train import loop, records
from kd_jax.train.sharding import place
from kd_jax.types import Model
from tests import tiny_config
from tests.recipes import substituting


def config(folder, **changes):
    """A Llama of two blocks taught by one of three; a checkpoint every two of six steps. `changes`
    of the section rollout."""
    c = on_policy()
    c.precision, c.batch_size, c.steps = "fp32", 8, 6
    c.task = dict(name="clm", seq_len=24)
    c.data = dict(train=dict(source="files", path=str(tiny_config.write_text(folder))))
    c.data.held_out, c.data.cache_dir = 0.1, str(folder)
    c.tokenizer = dict(path="", train="bpe", vocab_size=280)
    c.teacher.init = "scratch"
    c.teacher.architecture = dict(model_type="llama", hidden_size=16, num_hidden_layers=3)
    c.teacher.architecture.update(num_attention_heads=4, num_key_value_heads=2)
    c.teacher.architecture.update(intermediate_size=32, max_position_embeddings=32)
    c.teacher.architecture.update(initializer_range=0.5)  # so that it has an opinion
    c.student.architecture = dict(num_hidden_layers=2)
    c.objective = dict(kl=dict(weight=1.0, temperature=2.0))
    c.rollout.update(prompt_tokens=4, max_new_tokens=8, held_out=8, samples=2)
    c.rollout.update(changes)
    c.optim.learning_rate = 1e-2
    c.eval = dict(every=2, batch_size=8)
    c.checkpoint = dict(every=2, keep=2)
    c.log = dict(every=2)
    return c


def rows(run, name="metrics"):
    return records.read(run / f"student/{name}.csv")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Half of the steps on the student's own words, each of which serves two."""
    folder = tmp_path_factory.mktemp("on_policy")
    c = config(folder, every=2, **{"lambda": 0.6})
    c.objective.ce = dict(weight=0.5)
    results = substituting.run(c, folder / "run")
    return c, folder / "run", results


def test_what_is_written_down(whole):
    c, run, results = whole
    found = rows(run)
    wrote = [row["written"] == "1.0" for row in found]
    assert wrote[::2] == wrote[1::2] and len(set(wrote)) == 2  # both, two steps at a time
    for row, own in zip(found, wrote, strict=True):
        assert (float(row["length"]) <= 8) == own
        assert 0 <= float(row["ended"]) <= 1 and float(row["entropy"]) > 0
        weighted = float(row["ce_weighted"])
        assert weighted == 0.0 if own else weighted > 0  # its own words are no labels
    again = [row["length"] for row, own in zip(found, wrote, strict=True) if own]
    assert again[::2] == again[1::2]
    timing = rows(run, "timing")
    assert all(float(row["learning_seconds"]) > 0 for row in timing)
    assert any(float(row["writing_seconds"]) > 0 for row in timing)
    lines = (run / "student/samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [each["step"] for each in samples] == [2, 2, 4, 4, 6, 6]
    assert all(0 < each["tokens"] <= 8 and each["prompt"] and each["text"] for each in samples)
    figures = results["stages"]["student"]
    assert figures["own_kl"] > 0 and figures["own_reverse_kl"] > 0 and figures["own_length"] <= 8


class Killed(Exception):
    pass


@pytest.mark.parametrize("where", ["writing", "learning"])
def test_killed_and_continued_is_the_same_bit_for_bit(whole, tmp_path, monkeypatch, where):
    c, run, _ = whole
    step, write = loop.train_step, rollout.write

    def train_step(state, *args, **kwargs):
        if where == "learning" and int(state.step) == 3:
            raise Killed
        return step(state, *args, **kwargs)

    def wrote(mesh, table, model, prompts, *args):
        if where == "writing" and rows(tmp_path / "run"):
            raise Killed
        return write(mesh, table, model, prompts, *args)

    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(rollout, "write", wrote)
    with pytest.raises(Killed):
        substituting.run(c, tmp_path / "run")
    monkeypatch.undo()
    substituting.run(c, tmp_path / "run")
    assert kill_resume.differences(run, tmp_path / "run") == []


def test_with_lambda_0_it_is_plain_bit_for_bit(tmp_path):
    c = config(tmp_path, **{"lambda": 0.0})
    c.objective.ce = dict(weight=0.5)
    c.steps = 4
    substituting.run(c, tmp_path / "own")
    c.stages = dict(student={})
    substituting.run(c, tmp_path / "plain")
    own, plain = (rows(tmp_path / name) for name in ("own", "plain"))
    assert [{key: row[key] for key in plain[0]} for row in own] == plain
    last = [kill_resume._arrays(tmp_path / n / "student/checkpoints/4") for n in ("own", "plain")]
    assert last[0] == last[1]


def taught(run):
    """(stage, its first state, its teacher) of a run, on the mesh."""
    this = run.principal
    with substituting.quick():
        given = jax.jit(run.models["teacher"].draw)(jax.random.key(7))
        state = stage.create_state(run, this, {"teacher": given})
    return this, state, teaching.frozen(run, "teacher", given)


def test_one_device_and_eight_write_and_learn_the_same(tmp_path):
    found = []
    for count, fsdp, model in ((1, 1, 1), (8, 1, 1), (8, 2, 2)):
        c = config(tmp_path)
        c.mesh.update(fsdp=fsdp, model=model)
        run = build(c, tmp_path / "run", jax.devices()[:count])
        this, state, teacher = taught(run)
        batch, inputs, wrote = this.writing.writer(run, this)(
            0, state.student, None, this.schedules.at(0)
        )
        assert wrote
        kernel = teacher.params["backbone"]["blocks"]
        kernel = next(x for x in jax.tree.leaves(kernel) if x.ndim >= 2)
        part = kernel.addressable_shards[0].data
        assert kernel.size == part.size * fsdp * model  # the teacher lies on the mesh as well
        given = place(batch, run.mesh), teacher, inputs
        state, metrics = loop.train_step(state, *given, program=this.program)
        params = jax.device_get(run.models["student"].cut(state.params["student"]))
        found.append((batch, float(metrics["loss"]), params))
    for batch, loss, params in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, batch, found[0][0])
        assert loss == pytest.approx(found[0][1], rel=1e-5)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), params, found[0][2]
        )


def test_temperatures_of_writing_and_of_the_loss_are_two_numbers(tmp_path):
    written = {}
    for warm in (0.25, 1.0):
        run = build(config(tmp_path, temperature=warm), tmp_path / "run", jax.devices()[:1])
        this, state, _ = taught(run)
        assert this.program.objective.row_terms[0].temperature == 2.0
        written[warm] = this.writing.writer(run, this)(
            0, state.student, None, this.schedules.at(0)
        )[0]
    assert (written[0.25].tokens_BT[:, :4] == written[1.0].tokens_BT[:, :4]).all()
    assert (written[0.25].tokens_BT[:, 4:] != written[1.0].tokens_BT[:, 4:]).any()


def test_prompts_found_ahead_are_those_of_their_step(tmp_path, monkeypatch):
    run, nothing = (
        build(config(tmp_path), tmp_path / "run", jax.devices()[:1]),
        np.zeros((8, 8), np.int32),
    )
    this, seen = run.principal, []

    def write(mesh, table, model, prompts, seed, sampling, meanwhile):
        seen.append(prompts.ids_B.tolist())
        meanwhile()
        return Written(nothing, nothing[0], nothing[0] > 0, nothing)

    monkeypatch.setattr(rollout, "write", write)
    writer, steps = this.writing.writer(run, this), (0, 1, 3)
    for step in steps:
        writer(step, None, None, this.schedules.at(step))
    prompts = Prompts(run, this, 4)
    assert seen == [prompts.batch(step).ids_B.tolist() for step in steps]


def test_what_is_left_out_is_counted(tmp_path, monkeypatch, caplog):
    changed = config(tmp_path, unfinished="leave")
    run = build(changed, tmp_path / "run", jax.devices()[:1])
    this, ended_B = run.principal, np.arange(8) >= 6
    writer, inputs = this.writing.writer(run, this), this.schedules.at(0)
    counts_B = np.where(ended_B, 3, 8)
    last_BN = np.arange(8) == counts_B[:, None] - 1
    stop, log_probs_BN = writer._stop[0], np.zeros((8, 8), np.float32)

    def write(ended_B):
        tokens_BN = np.where(last_BN & ended_B[:, None], stop, stop + 1).astype(np.int32)
        written = Written(tokens_BN, counts_B, ended_B, log_probs_BN)
        monkeypatch.setattr(rollout, "write", lambda *given: written)

    write(ended_B)
    batch, _, wrote = writer(0, None, None, inputs)
    assert (batch.weights.sum(1) == np.where(ended_B, 3, 0)).all()
    found = writer.measured(place(batch, run.mesh), wrote)
    assert {name: float(x) for name, x in found.items()} == {
        "written": 1.0,
        "length": 6.75,
        "ended": 0.25,
    }
    assert "nothing is learned" not in caplog.text
    writer = this.writing.writer(run, this)
    write(ended_B & False)
    for step in (0, 1):
        assert not writer(step, None, None, inputs)[0].weights.any()
    assert caplog.text.count("step 0: no completion ends within config.rollout.max_new") == 1
    assert caplog.text.count("nothing is learned") == 1


def test_only_written_tokens_are_learned_the_end_included():
    prompts = Given(
        np.array([[5, 6, 7], [5, 6, 0], [5, 0, 0]], np.int32),
        np.array([3, 2, 1], np.int32),
        np.array([4, 9, 2], np.int32),
    )
    written = Written(
        np.array([[8, 9, 1], [1, 0, 0], [8, 8, 9]], np.int32),
        np.array([3, 1, 3], np.int32),
        np.array([True, True, False]),
        np.array([[-1.0, -2, -3], [-4, 0, 0], [-5, -6, -7]], np.float32),
    )
    batch = rollout.batch_of(prompts, written, judged=True)
    np.testing.assert_array_equal(
        batch.tokens_BT, [[5, 6, 7, 8, 9], [5, 6, 0, 0, 0], [5, 8, 8, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.weights, [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    )
    of_labels = np.where(batch.weights > 0, batch.labels, 0)
    np.testing.assert_array_equal(of_labels, [[0, 0, 8, 9, 1], [0, 1, 0, 0, 0], [8, 8, 9, 0, 0]])
    np.testing.assert_array_equal(
        batch.mask_BT, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]
    )
    np.testing.assert_array_equal(
        batch.written, [[0, 0, -1, -2, -3], [0, -4, 0, 0, 0], [-5, -6, -7, 0, 0]]
    )
    ended = rollout.batch_of(prompts, written, unfinished=False)
    np.testing.assert_array_equal(ended.weights[2], np.zeros(5))
    np.testing.assert_array_equal(ended.weights[:2], batch.weights[:2])
    figures = rollout.ends(batch, np.array([1], np.int32))
    assert {name: float(x) for name, x in figures.items()} == {
        "length": pytest.approx(7 / 3),
        "ended": pytest.approx(2 / 3),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.lambda": 1.5}, "config.rollout.lambda=1.5 must be at least 0 and at most 1"),
        ({"rollout.max_new_tokens": 40}, "4 tokens and 40 new ones are 44, .* positions for 32"),
        ({"rollout.every": 4}, "checkpoint.every=2 is no multiple of config.rollout.every=4"),
        ({"rollout.stop": ("nothing",)}, "rollout.stop: 'nothing' is no token"),
        ({"objective": {"ce": {"weight": 1.0}}}, "ce learns labels, and with rollout.lambda=1 all"),
        (
            {"objective": {"policy_gradient": {"weight": 1.0}}, "rollout.lambda": 0.5},
            "policy_gradient judges the student's own words alone: set rollout.lambda=1",
        ),
        (
            {"objective": {"policy_gradient": {"weight": 1.0}}, "rollout.top_p": 0.9},
            "unbiased only for words drawn from the student's distribution",
        ),
        ({"stages": {"student": {"kind": "on_policy", "objective": ""}}}, "judged by a teacher"),
        ({"task.name": "mlm"}, "writes text, and config.task.name='mlm'"),
    ],
)
def test_what_cannot_be_learned_is_refused(tmp_path, changes, message):
    c = config(tmp_path)
    with c.unlocked():
        c.update_from_flattened_dict(changes)
    if c.task.name == "mlm":
        c.teacher.architecture = dict(model_type="bert")
        c.student.architecture, c.tokenizer.train = {}, "wordpiece"
    with pytest.raises(UserError, match=message):
        substituting.run(c, tmp_path / "run")


@pytest.mark.parametrize("kind", ["on_policy", "sequence"])
def test_prompts_that_are_all_too_long_are_said_before_any_training(tmp_path, kind):
    """Of conversations: of those at hand, none has a question of eight tokens."""
    c = onpolicy_qwen3.get_config("smoke")
    last = dict(kind=kind) | (dict(prompt_tokens=8, max_new_tokens=8) if kind == "sequence" else {})
    c.rollout.prompt_tokens, c.stages = 8, dict(teacher={}, student=last)
    with pytest.raises(UserError, match="train.jsonl .* has no prompt of at most 8 tokens"):
        substituting.run(c, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*/metrics.csv"))


def test_devices_share_the_held_out_prompts(tmp_path):
    with pytest.raises(UserError, match="rollout.held_out: 3 rows cannot be divided among 2 dev"):
        build(config(tmp_path, held_out=3), tmp_path / "run", jax.devices()[:2])


def test_the_policy_gradient_learns(tmp_path):
    c = config(tmp_path)
    c.objective = dict(policy_gradient=dict(weight=1.0))
    run = build(c, tmp_path / "run", jax.devices()[:1])
    this, state, teacher = taught(run)
    batch, inputs, _ = this.writing.writer(run, this)(0, state.student, None, this.schedules.at(0))
    output = Model(state.params["student"], state.graphdef)(batch, None)
    logp = jax.nn.log_softmax(output.logits)
    chosen = np.take_along_axis(np.asarray(logp), batch.labels[..., None], 2)[..., 0]
    learned = batch.weights > 0
    np.testing.assert_allclose(batch.written[learned], chosen[learned], atol=1e-4)
    given = place(batch, run.mesh), teacher, inputs
    _, metrics = loop.train_step(state, *given, program=this.program)
    assert float(metrics["grad_norm"]) > 0
