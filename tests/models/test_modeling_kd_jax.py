"""Decoders whose blocks differ, as PyTorch loads them from what kd_jax wrote."""

import dataclasses
import fnmatch
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import family as families
from kd_jax.models import hf, shapes
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

run = jax.jit(lambda model, batch: model(batch))
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}


def unequal(name, **changes):
    """(model, family, config) with a slim block, a bottleneck with wider heads, and an own one."""
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    changes = {layers: 3} | changes
    family, config = families.read(tiny.CONFIGS[name] | changes)
    own = config.own_shape
    slim = dataclasses.replace(own, num_heads=2, num_kv_heads=own.num_kv_heads // 2, ffn_width=20)
    narrow = shapes.bottleneck(24, 2, own.num_kv_heads // 2, 18)
    blocks = (slim, narrow, own)
    config = dataclasses.replace(config, blocks=blocks)
    return tiny.model(name, "clm", blocks=blocks, **changes), family, config


def load(folder, auto="AutoModelForCausalLM", **options):
    """What PyTorch finds there, having taken and missed nothing."""
    model, info = getattr(transformers, auto).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {"sliding_window": 4, "use_sliding_window": False}),
        ("phi", {"tie_word_embeddings": True}),  # with a bias of the head's own
    ],
)
def test_pytorch_computes_and_writes_the_same(name, changes, tmp_path):
    model, family, config = unequal(name, **changes)
    hf.save(tmp_path, model.params, family, config, "clm")
    theirs = load(tmp_path, trust_remote_code=True)
    assert type(theirs).__name__ == "KDJaxForCausalLM"
    batch = tiny.batch(name)
    output, real = run(model, batch), np.asarray(batch.mask_BT) > 0
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(np.asarray(batch.tokens_BT)).long(),
            attention_mask=torch.tensor(np.asarray(batch.mask_BT)).long(),
            output_hidden_states=True,
        )
    for mine, its in zip(output.hidden, found.hidden_states, strict=True):
        np.testing.assert_allclose(mine[real], its.numpy()[real], rtol=0, atol=1e-4)
    logits, its = np.asarray(output.logits), found.logits.numpy()
    assert np.abs(logits).max() > 1.0
    np.testing.assert_allclose(its[real], logits[real], rtol=0, atol=1e-4)

    # Its own text, token by token, is what we find the likeliest after the same beginning.
    prompt = torch.tensor(np.asarray(batch.tokens_BT[:, :8])).long()
    greedy = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    text = theirs.generate(prompt, **greedy)
    whole = batch.replace(tokens_BT=jnp.asarray(text.int().numpy()), mask_BT=batch.mask_BT * 0 + 1)
    likeliest = np.asarray(run(model, whole).logits).argmax(-1)
    np.testing.assert_array_equal(text.numpy()[:, 8:], likeliest[:, 7:-1])
    for way in (dict(use_cache=False), dict(cache_implementation="static")):
        assert torch.equal(theirs.generate(prompt, **greedy, **way), text)
    # A row that begins with padding goes on as it does without.
    padded = torch.cat([torch.zeros_like(prompt[:, :3]), prompt], 1)
    mask = torch.ones_like(padded).index_fill_(1, torch.arange(3), 0)
    assert torch.equal(theirs.generate(padded, attention_mask=mask, **greedy)[:, 3:], text)

    # What PyTorch writes, we read.
    theirs.save_pretrained(tmp_path / "again")
    _, again = families.read(hf.read_config(tmp_path / "again"))
    assert again == config
    params = hf.load(tmp_path / "again", family, again, "clm")
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    assert families.head_of(family, hf.read_config(tmp_path / "again")) == "clm"


def test_trains_in_pytorch(tmp_path):
    model, family, config = unequal("gpt2")
    hf.save(tmp_path, model.params, family, config, "clm")
    theirs = load(tmp_path, trust_remote_code=True)
    tokens = torch.tensor(np.asarray(tiny.batch("gpt2").tokens_BT)).long()[:1]
    loss = theirs(tokens, labels=tokens).loss
    logits = theirs(tokens).logits[0, :-1].detach()
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert all(param.grad is not None for param in theirs.parameters())
    first, second = (theirs.train()(tokens).logits for _ in range(2))
    assert not torch.equal(first, second)  # dropout


def test_backbone_alone(tmp_path):
    whole, family, config = unequal("gpt2")
    model = tiny.model("gpt2", "none", blocks=config.blocks, n_layer=3)
    model = model.replace(params={"backbone": whole.params["backbone"], "head": {}})
    hf.save(tmp_path, model.params, family, config, "none")
    hf.save(tmp_path / "clm", whole.params, family, config, "clm")
    batch = tiny.batch("gpt2")
    for folder in (tmp_path, tmp_path / "clm"):
        theirs = load(folder, "AutoModel", trust_remote_code=True)
        with torch.no_grad():
            found = theirs(torch.tensor(np.asarray(batch.tokens_BT)).long()).last_hidden_state
        full = batch.replace(mask_BT=jnp.ones_like(batch.mask_BT))
        np.testing.assert_allclose(found, run(whole, full).features, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("llama", dict(num_heads=2, num_kv_heads=1, ffn_width=20), "LlamaForCausalLM"),
        ("qwen2", dict(num_heads=2, num_kv_heads=2), "Qwen2ForCausalLM"),
        ("phi", dict(num_heads=2, num_kv_heads=2, ffn_width=20), "PhiForCausalLM"),
        ("gpt2", dict(ffn_width=20), "GPT2LMHeadModel"),
        ("gpt2", dict(num_heads=2, num_kv_heads=2), "KDJaxForCausalLM"),  # do not fill the width
        ("llama", dict(num_heads=3, num_kv_heads=1), "KDJaxForCausalLM"),  # do not divide the width
    ],
)
def test_models_whose_blocks_are_alike_are_of_hfs_own_class(name, sizes, expected, tmp_path):
    family, config = families.read(tiny.CONFIGS[name])
    blocks = (dataclasses.replace(config.own_shape, **sizes),) * 2
    model = tiny.model(name, "clm", blocks=blocks)
    config = dataclasses.replace(config, blocks=blocks)
    hf.save(tmp_path, model.params, family, config, "clm")
    ours = expected == "KDJaxForCausalLM"
    assert (tmp_path / "modeling_kd_jax.py").exists() == ours
    theirs = load(tmp_path, trust_remote_code=ours)
    assert type(theirs).__name__ == expected
    batch = tiny.batch(name)
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(np.asarray(batch.tokens_BT)).long(),
            attention_mask=torch.tensor(np.asarray(batch.mask_BT)).long(),
        ).logits.numpy()
    real = np.asarray(batch.mask_BT) > 0
    logits = np.asarray(run(model, batch).logits)
    np.testing.assert_allclose(found[real], logits[real], rtol=0, atol=1e-4)
    _, back = families.read(hf.read_config(tmp_path))
    assert [back.shape(i) for i in range(2)] == list(blocks)


def test_the_file_is_part_of_the_package():
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["kd_jax.models"]
    file = families.MODELING_FILE.relative_to(root / "kd_jax" / "models")
    assert any(fnmatch.fnmatch(str(file), pattern) for pattern in patterns)
