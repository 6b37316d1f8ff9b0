"""Models whose blocks differ, as PyTorch loads them from what kd_jax wrote."""

import dataclasses
import fnmatch
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models import family as families
from kd_jax.models import hf
from tests.models import exported, tiny
from tests.models.exported import load, run, unequal

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("name", exported.DECODERS)
def test_pytorch_computes_and_writes_the_same(name, tmp_path):
    model, family, config = exported.make_decoder(tmp_path, name)
    theirs = exported.check(tmp_path)
    assert type(theirs).__name__ == f"KDJax{family.architectures['clm']}"
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

    # Layers attend as the model does, whenever that is chosen.
    tokens = torch.tensor(np.asarray(batch.tokens_BT)).long()
    eager = load(tmp_path, trust_remote_code=True, attn_implementation="eager")
    for way in ("eager", "sdpa"):
        eager.set_attn_implementation(way)
        with torch.no_grad():
            torch.testing.assert_close(eager(tokens).logits, theirs(tokens).logits)

    # What PyTorch writes, we read.
    theirs.save_pretrained(tmp_path / "again")
    _, again = families.read(hf.read_config(tmp_path / "again"))
    assert again.own_shape == config.own_shape  # though Llama's head_dim is written out
    assert again == dataclasses.replace(config, head_width=again.head_width)
    params = hf.load(tmp_path / "again", family, again, "clm")
    jax.tree.map(np.testing.assert_array_equal, params, model.params)
    found = hf.read_config(tmp_path / "again")
    older = {"architectures": ["KDJaxForCausalLM"]}  # one class for all decoders
    assert [families.head_of(family, keys) for keys in (found, older)] == ["clm", "clm"]


@pytest.mark.parametrize("name", exported.ENCODERS)
@pytest.mark.parametrize(
    ("head", "ending"),
    [
        ("classification", "ForSequenceClassification"),
        ("mlm", "ForMaskedLM"),
        ("span", "ForQuestionAnswering"),
    ],
)
def test_encoders_with_each_head(name, head, ending, tmp_path):
    model, family, config = exported.make_encoder(tmp_path, name, head)
    theirs = exported.check_encoder(tmp_path, f"AutoModel{ending}")
    assert type(theirs).__name__ == f"KDJax{family.architectures[head]}"
    assert type(theirs).__name__.endswith(ending)

    # What PyTorch writes, we read.
    theirs.save_pretrained(tmp_path / "again")
    found = hf.read_config(tmp_path / "again")
    assert families.read(found)[1] == config and families.head_of(family, found) == head
    params = hf.load(tmp_path / "again", family, config, head)
    jax.tree.map(np.testing.assert_array_equal, params, model.params)


def test_an_encoder_trains_in_pytorch(tmp_path):
    exported.make_encoder(tmp_path, "bert")
    theirs = load(tmp_path, "AutoModelForSequenceClassification", trust_remote_code=True)
    tokens = torch.tensor(np.asarray(tiny.batch("bert").tokens_BT)).long()
    theirs(tokens, labels=torch.zeros(len(tokens), dtype=torch.long)).loss.backward()
    assert all(param.grad is not None for param in theirs.parameters())
    fresh = type(theirs)(theirs.config)  # drawn as the family draws
    kernels = [layer.attention.self.query.weight for layer in fresh.bert.encoder.layer]
    assert all(0.015 < kernel.std().item() < 0.025 for kernel in kernels)


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
        ("gpt2", dict(num_heads=2, num_kv_heads=2), "KDJaxGPT2LMHeadModel"),  # do not fill it
        ("llama", dict(num_heads=3, num_kv_heads=1), "KDJaxLlamaForCausalLM"),  # do not divide it
        ("bert", dict(ffn_width=20), "BertForMaskedLM"),
        ("distilbert", dict(num_heads=2, num_kv_heads=2), "KDJaxDistilBertForMaskedLM"),
    ],
)
def test_models_whose_blocks_are_alike_are_of_hfs_own_class(name, sizes, expected, tmp_path):
    family, config = families.read(tiny.CONFIGS[name])
    blocks = (dataclasses.replace(config.own_shape, **sizes),) * 2
    head = "clm" if "clm" in family.architectures else "mlm"
    model = tiny.model(name, head, blocks=blocks)
    config = dataclasses.replace(config, blocks=blocks)
    hf.save(tmp_path, model.params, family, config, head)
    ours = expected.startswith("KDJax")
    assert any(tmp_path.glob("modeling_kd_jax*.py")) == ours
    auto = "AutoModelForCausalLM" if head == "clm" else "AutoModelForMaskedLM"
    theirs = load(tmp_path, auto, trust_remote_code=ours)
    assert type(theirs).__name__ == expected
    batch = tiny.batch(name).replace(types_BT=None)
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


def test_the_files_are_part_of_the_package():
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["kd_jax.models"]
    files = [path.relative_to(root / "kd_jax" / "models") for path in families.PYTORCH.iterdir()]
    for file in (each for each in files if each.suffix == ".py"):
        assert any(fnmatch.fnmatch(str(file), pattern) for pattern in patterns)
