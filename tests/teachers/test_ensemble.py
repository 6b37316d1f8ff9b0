import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kd_jax.models import family as families
from kd_jax.models import hf
from kd_jax.objectives.logits import SPACES, sparse
from kd_jax.objectives.objective import build_objective
from kd_jax.teachers import ensemble
from kd_jax.teachers.ensemble import EnsembleTeacher
from kd_jax.types import Model, StoredLogits
from tests.models import tiny
from tests.objectives.rows import FP32

LARGER = tiny.VOCAB + 8  # the teacher's table has rows of padding


def member(seed):
    return tiny.model("qwen2", "clm", seed=seed)


def teacher():
    return tiny.model("qwen2", "clm", seed=9, vocab_size=LARGER, num_hidden_layers=3)


def rows():
    found = tiny.batch("qwen2")
    weights = np.asarray(found.weights).copy()
    weights[:, :7] = 0  # a question
    return found.replace(weights=jax.device_put(weights))


def online(count, space="logits", weights=None):
    """A teacher for the student after `count` members."""
    guide = teacher()
    if not count:
        return EnsembleTeacher({"teacher": guide.params}, tiny.VOCAB, guide.graphdef, space=space)
    models = [member(seed) for seed in range(1, count + 1)]
    params = {
        "teacher": guide.params,
        "members": jax.jit(lambda each: ensemble.stack(each, FP32))([x.params for x in models]),
        "weights": jnp.full(count, 1 / count) if weights is None else jnp.asarray(weights),
        "share": jnp.float32(1 / (count + 1)),
    }
    return EnsembleTeacher(params, tiny.VOCAB, guide.graphdef, models[0].graphdef, space)


def loss_and_grads(objective, guides, batch, scales):
    student = member(0)
    count = np.asarray(batch.weights).sum()
    scales = {name: np.float32(s / count) for name, s in scales.items()}
    return jax.device_get(compiled(objective, student, guides, batch, scales))


@functools.partial(jax.jit, static_argnums=0)
def compiled(objective, student, guides, batch, scales):
    def loss(params):
        out = Model(params, student.graphdef)(batch)
        return objective({}, out, guides(batch), batch, scales, {})

    return jax.value_and_grad(loss, has_aux=True)(student.params)


def objective(**terms):
    settings = {name: {"weight": 1.0} for name in terms}
    return build_objective(settings, 10, FP32, FP32, chunk=7)[0]


def torch_of(model, folder, **changes):
    transformers = pytest.importorskip("transformers")
    kind, config = families.read(tiny.CONFIGS["qwen2"] | changes)
    hf.save(folder, model.params, kind, config, "clm")
    found = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return found.eval()


def test_as_pytorch_computes_it(tmp_path):
    """The published loss: KL to the teacher of the mean of logits, mean over the answers' tokens;
    and the hybrid with the student's own next-token loss."""
    torch = pytest.importorskip("torch")
    batch = rows()
    members = [torch_of(member(seed), tmp_path / str(seed)) for seed in range(4)]
    guide = torch_of(teacher(), tmp_path / "t", vocab_size=LARGER, num_hidden_layers=3)
    inputs = {
        "input_ids": torch.tensor(np.asarray(batch.tokens_BT)).long(),
        "attention_mask": torch.tensor(np.asarray(batch.mask_BT)).long(),
    }
    weights = torch.tensor(np.asarray(batch.weights))
    labels = torch.tensor(np.asarray(batch.labels)).long()
    with torch.no_grad():
        target = torch.log_softmax(guide(**inputs).logits[..., : tiny.VOCAB], dim=-1)
        others = [model(**inputs).logits for model in members[1:]]
    own = members[0](**inputs).logits
    mean = (own + sum(others)) / 4
    gap = target - torch.log_softmax(mean, dim=-1)
    kl = ((target.exp() * gap).sum(-1) * weights).sum() / weights.sum()
    ce = torch.nn.functional.cross_entropy(own.flatten(0, 1), labels.flatten(), reduction="none")
    ce = (ce * weights.flatten()).sum() / weights.sum()
    for scales in ({"kl": 1.0}, {"ce": 0.3, "kl": 0.7}):
        wanted = scales["kl"] * kl + scales.get("ce", 0.0) * ce
        members[0].zero_grad()
        wanted.backward(retain_graph=True)
        (loss, _), grads = loss_and_grads(objective(**scales), online(3), batch, scales)
        assert float(loss) == pytest.approx(wanted.item(), abs=1e-5)
        kind, config = families.read(tiny.CONFIGS["qwen2"])
        hf.save(tmp_path / "slopes", grads, kind, config, "clm")  # under PyTorch's names
        slopes = safetensors.numpy.load_file(tmp_path / "slopes" / "model.safetensors")
        theirs = dict(members[0].named_parameters())
        assert slopes.keys() == theirs.keys()
        for name, slope in slopes.items():
            np.testing.assert_allclose(slope, theirs[name].grad, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("space", SPACES)
def test_what_was_computed_before_is_the_same(space):
    batch, guides = rows(), online(2, space)
    scales = {"ce": 0.3, "kl": 0.7}
    wanted = loss_and_grads(objective(**scales), guides, batch, scales)
    wanted[0][1].pop("teacher_outside")  # of which nothing is kept

    @jax.jit
    def whole(guides, batch):
        guidance = guides(batch)
        sources = {"teacher": guidance.teacher, "others": guidance.others.source}
        cut = {name: source.cut(tiny.VOCAB) for name, source in sources.items()}
        return {name: source.logits(source.rows, FP32) for name, source in cut.items()}

    @jax.jit
    def dense(logits_NV):
        return StoredLogits(logits_NV.reshape(*batch.tokens_BT.shape, -1))

    @jax.jit
    def few(logits_NV):
        found, shape = sparse(logits_NV, tiny.VOCAB), batch.tokens_BT.shape
        values, ids = (x.reshape(*shape, -1) for x in (found.values_NK, found.ids_NK))
        return StoredLogits(values, ids, found.rest_N.reshape(shape))

    stored = EnsembleTeacher({"share": guides.params["share"]}, tiny.VOCAB, space=space)
    logits = whole(guides, batch)
    for kind in (dense, few):
        given = {name: kind(value) for name, value in logits.items()}
        found = loss_and_grads(objective(**scales), stored, batch.replace(stored=given), scales)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), found, wanted
        )


def test_the_first_student_has_nobody_beside_it():
    batch, scales = rows(), {"kl": 1.0}
    guides = online(0)
    found = loss_and_grads(objective(kl=1), guides, batch, scales)
    plain = EnsembleTeacher(guides.params, tiny.VOCAB, guides.teacher)
    assert jax.eval_shape(plain, batch).others is None
    alone = dataclasses.replace(teacher())
    wanted = loss_and_grads(objective(kl=1), alone, batch, scales)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, wanted)
