"""A model family of one's own: one module, which no list elsewhere has to name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kd_jax import config as defaults
from kd_jax import models, smoke
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models import hf
from kd_jax.precision import Policy
from kd_jax.recipes import distil, export, plan
from kd_jax.recipes.compare import compare
from kd_jax.recipes.evaluate import Options, evaluate_stage
from kd_jax.run import workdir
from kd_jax.run.run import build
from kd_jax.types import Batch
from tests import tiny_config
from tests.plugged import plug_in
from tests.recipes import substituting

MODULE = '''
"""GPT-2 under other names, with three projections of torch's layout in one tensor."""

from kd_jax.models import gpt2
from kd_jax.models.decoder import Decoder
from kd_jax.models.family import Family, classes

FAMILY = Family(
    name="minigpt",
    prefix="net.",
    architectures=classes("MiniGPT", "clm"),
    backbone=Decoder,
    aliases={"num_hidden_layers": "depth"},
    keys={
        "vocab_size": ("vocab_size", 100),
        "channels": ("width", 16),
        "depth": ("num_layers", 2),
        "heads": ("num_heads num_kv_heads", 2),
        "inner": ("ffn_width", 64),
        "longest": ("max_positions", 16),
        "act": ("activation", "gelu_new"),
        "eps": ("norm_eps", 1e-5),
        "drop": ("embedding_dropout attention_dropout mlp_dropout attention_out_dropout", 0.1),
        "std": ("initializer_range", 0.02),
        "tied": ("tie_embeddings", True),
    },
    base={
        "words": "backbone/tokens",
        "places": "backbone/positions",
        "last": "backbone/norm",
        "stack.#.one": "backbone/blocks/#/attention_norm",
        "stack.#.look.qkv": "backbone/blocks/#/attention/q,k,v",
        "stack.#.look.out": "backbone/blocks/#/attention/o",
        "stack.#.two": "backbone/blocks/#/mlp_norm",
        "stack.#.think.up": "backbone/blocks/#/mlp/up",
        "stack.#.think.down": "backbone/blocks/#/mlp/down",
    },
    head={"unembed.weight": "head/unembed"},
    adjust=gpt2.FAMILY.adjust,
)
'''
NAMES = (  # GPT-2's names of tensors and keys, and those of the new family
    ("transformer.", "net."),
    ("wte", "words"),
    ("wpe", "places"),
    ("ln_f", "last"),
    ("h.", "stack."),
    ("ln_1", "one"),
    ("ln_2", "two"),
    ("attn.c_attn", "look.qkv"),
    ("attn.c_proj", "look.out"),
    ("mlp.c_fc", "think.up"),
    ("mlp.c_proj", "think.down"),
)
SIZES = dict(vocab_size=300, channels=16, depth=2, heads=2, inner=64, longest=16)


@pytest.fixture
def family(tmp_path, monkeypatch):
    """kd_jax/models/minigpt.py, in another folder."""
    plug_in(monkeypatch, tmp_path, models, "minigpt", MODULE)


@pytest.fixture
def checkpoint(tmp_path):
    """(folder, its logits of these tokens): a GPT-2 of PyTorch, as the new family would save it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_inner=64, n_positions=16)
    sizes |= dict(bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    tensors = {}
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight":
            continue
        value = (tensor + 0.1 * torch.randn_like(tensor)).contiguous()
        tensor.copy_(value)
        value = value.T.contiguous() if ".c_" in name and name.endswith("weight") else value
        for old, new in NAMES:
            name = name.replace(old, new)
        tensors[name] = value.numpy()
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    tokenizers.train_tokenizer("bpe", tiny_config.TEXT.split("\n"), 300, folder)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    page = dict(model_type="minigpt", architectures=["MiniGPTForCausalLM"], **SIZES)
    (folder / "config.json").write_text(json.dumps(page))
    tokens_BT = np.arange(4, 36).reshape(2, 16)
    with torch.no_grad():
        return folder, tokens_BT, theirs(torch.from_numpy(tokens_BT)).logits.numpy()


def logits_of(folder, tokens_BT):
    kind, config = families.read(hf.read_config(folder))
    model = families.abstract(kind, config, "clm", Policy())
    params = jax.tree.map(jnp.asarray, hf.load(folder, kind, config, "clm"))
    batch = Batch(None, jnp.asarray(tokens_BT), jnp.ones(tokens_BT.shape), None, None)
    return jax.jit(lambda params: model.replace(params=params)(batch).logits)(params)


def make_config(folder, tmp_path):
    c = tiny_config.get_config(str(tiny_config.write_text(tmp_path)))
    c.steps = 2
    c.stages = dict(student={})
    c.task.name = "clm"
    c.teacher.model, c.teacher.architecture = str(folder), {}
    c.tokenizer = dict(path=str(folder), train="", vocab_size=300)
    c.student.init = "teacher"
    c.data.cache_dir = str(tmp_path)
    return c


def test_it_is_distilled_evaluated_exported_compared_and_planned(
    family, checkpoint, tmp_path, monkeypatch
):
    given, tokens_BT, logits_BTV = checkpoint
    np.testing.assert_allclose(logits_of(given, tokens_BT), logits_BTV, atol=1e-4)
    config, folder = make_config(given, tmp_path), str(tmp_path / "run")
    with substituting.quick(), workdir.enter(config, "example", folder) as place:
        found = distil.run(config, place)["stages"]["student"]
        report = evaluate_stage(folder, "student", None, None, None, Options()).report
        assert report["loss"] == pytest.approx(found["loss"], abs=1e-5)
        planned = plan.needed(build(config))
        assert planned["params_student"] < planned["params_teacher"]
    monkeypatch.setattr(export.export_check, "check_in_pytorch", lambda *_: {})  # HF has no class
    out = tmp_path / "out"
    export.export_stage(folder, "student", str(out))
    page = json.loads((out / "config.json").read_text())
    wanted = SIZES | dict(model_type="minigpt", architectures=["MiniGPTForCausalLM"], depth=1)
    assert {key: page[key] for key in wanted} == wanted
    theirs = safetensors.numpy.load_file(given / "model.safetensors").keys()
    ours = safetensors.numpy.load_file(out / "model.safetensors").keys()
    assert ours == {name for name in theirs if ".1." not in name}
    assert np.isfinite(logits_of(out, tokens_BT)).all()
    compare([folder], str(tmp_path / "report"))
    assert "student" in (tmp_path / "report" / "report.md").read_text()


def test_smoke_knows_it(family):
    c = defaults.base("pretrain")
    c.task = dict(name="clm", seq_len=16)
    c = smoke.or_smoke(c, "smoke", "minigpt")
    kind, config = families.read({}, changes=c.teacher.architecture)
    assert (kind.name, config.width, config.ffn_width, config.num_layers) == ("minigpt", 32, 64, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_type="minigtp"), "unknown model_type 'minigtp'; have: .*, minigpt, "),
        (dict(model_type="minigpt", drop=1.0), "drop=1.0 must be at least 0 and below 1"),
        (dict(model_type="minigpt", depth="2"), "depth='2' should be a whole number"),
        (dict(model_type="minigpt", depth=1, num_hidden_layers=2), "num_hidden_layers and depth"),
    ],
)
def test_mistakes(family, changes, message):
    with pytest.raises(UserError, match=message):
        families.read(changes)
