"""Text from decoders: greedy as PyTorch's, drawn as probabilities say, each row for itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models import generate as writing
from kd_jax.models import hf, model_config
from kd_jax.models.generate import generate
from kd_jax.models.model_config import BlockShape
from kd_jax.precision import Policy
from kd_jax.types import Batch
from tests.models import tiny

CAUSAL = ("gpt2", "llama", "qwen2", "phi")
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16])
NEW = 12


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_is_what_pytorch_writes(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = tiny.model(name)
    family, config = families.read(tiny.CONFIGS[name])
    hf.save(tmp_path, model.params, family, config, "clm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = None
    found = generate(model, PROMPTS, max_new_tokens=NEW)
    for prompt, ours in zip(PROMPTS, found, strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0, len(prompt) :]
        assert ours.tolist() == wanted.tolist()
    assert len({tuple(row) for row in found}) == len(PROMPTS)


@pytest.fixture(scope="module")
def unequal():
    """A Llama with a slim block and a bottleneck."""
    return tiny.model(
        "llama",
        blocks=(BlockShape("full", 32, 3, 1, 8, 20), model_config.bottleneck(24, 2, 2, 16)),
    )


def test_the_cache_changes_nothing_where_blocks_differ(unequal):
    """Against the whole row, computed anew for every token."""
    logits = jax.jit(lambda batch: unequal(batch).logits)
    found = generate(unequal, PROMPTS, max_new_tokens=NEW)
    rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, found, strict=True)]
    tokens_BT = np.zeros((len(rows), 20), np.int32)
    for own, row in zip(tokens_BT, rows, strict=True):
        own[: len(row)] = row
    mask_BT = (np.arange(20)[None] < np.array([[len(row)] for row in rows])).astype(np.float32)
    best_BT = logits(Batch(None, jnp.asarray(tokens_BT), mask_BT, None, None)).argmax(-1)
    for prompt, new, best_T in zip(PROMPTS, found, best_BT, strict=True):
        assert new.tolist() == best_T[len(prompt) - 1 :][:NEW].tolist()


def test_rows_stop_where_they_should_and_share_a_program(unequal):
    whole = generate(unequal, PROMPTS, max_new_tokens=NEW)
    programs = writing._write._cache_size()
    assert [len(row) for row in generate(unequal, PROMPTS, max_new_tokens=5)] == [5, 5, 5]
    stop = [int(whole[0][2])]
    assert writing._write._cache_size() == programs
    cut = generate(unequal, PROMPTS, max_new_tokens=NEW, stop=stop)
    for row, part in zip(whole, cut, strict=True):
        ends = np.flatnonzero(row == stop[0])
        assert part.tolist() == row[: ends[0] + 1 if len(ends) else NEW].tolist()
    assert len(cut[0]) < NEW
    alone = generate(unequal, PROMPTS[2:], max_new_tokens=NEW, stop=stop)
    assert alone[0].tolist() == cut[2].tolist()


def test_draws(unequal):
    """A row's draws depend on seed and row alone; a top-p that leaves one token is greedy."""
    options = dict(max_new_tokens=NEW, temperature=1.5)
    one, again, other = (generate(unequal, PROMPTS, seed=seed, **options) for seed in (1, 1, 2))
    assert [row.tolist() for row in one] == [row.tolist() for row in again]
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))
    assert generate(unequal, PROMPTS[:1], seed=1, **options)[0].tolist() == one[0].tolist()
    greedy = generate(unequal, PROMPTS, max_new_tokens=NEW)
    narrow = generate(unequal, PROMPTS, top_p=1e-6, **options)
    assert [row.tolist() for row in narrow] == [row.tolist() for row in greedy]


@pytest.mark.parametrize("temperature, top_p, kept", [(1.0, 1.0, 5), (2.0, 1.0, 5), (0.5, 0.8, 2)])
def test_tokens_come_as_often_as_their_probability_says(temperature, top_p, kept):
    logits = np.log(np.array([0.05, 0.4, 0.3, 0.05, 0.2], np.float32))
    probs = np.exp(logits / temperature)
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    assert probs[order[:kept]].sum() >= top_p - 1e-6 > probs[order[: kept - 1]].sum() - 1e-6
    probs[order[kept:]] = 0
    probs /= probs.sum()
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    draw = jax.vmap(writing._draw, in_axes=(0, None, None, None))
    drawn = jax.jit(draw)(keys, jnp.asarray(logits), temperature, top_p)
    often = np.bincount(drawn, minlength=5) / count
    assert (np.abs(often - probs) <= 4 * np.sqrt(probs * (1 - probs) / count) + 1e-9).all()


@pytest.mark.parametrize(
    "prompts, changes, says",
    [
        ([], {}, "no prompts"),
        ([[5], []], {}, "prompt 1 is empty or has ids outside 0 to 95"),
        ([[5, 96]], {}, "prompt 0 is empty or has ids"),
        ([[5] * 30], {}, "12 tokens after a prompt of 30, but the model has positions for 40"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[5]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[5]], {"top_p": 0.0}, "top_p=0.0"),
    ],
)
def test_mistakes(unequal, prompts, changes, says):
    with pytest.raises(UserError, match=says):
        generate(unequal, prompts, **dict(max_new_tokens=NEW) | changes)


def test_only_causal_models_write():
    for model in (tiny.model("bert"), tiny.model("gpt2", "none")):
        with pytest.raises(UserError, match="no causal language model"):
            generate(model, PROMPTS, max_new_tokens=NEW)


def test_the_last_token_needs_no_position():
    model = tiny.model("gpt2", policy=Policy("bfloat16", "bfloat16", "xla"))
    assert len(generate(model, [[5] * 30], max_new_tokens=11)[0]) == 11
