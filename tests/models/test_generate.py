"""Text from decoders: greedy as PyTorch's, drawn as probabilities say, each row for itself."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from kd_jax.errors import UserError
from kd_jax.models import family as families
from kd_jax.models import generate as writing
from kd_jax.models import hf, model_config
from kd_jax.models.generate import Sampling, generate
from kd_jax.models.model_config import BlockShape, Run
from kd_jax.precision import Policy
from kd_jax.types import Batch, Model
from tests.models import tiny

LONG = {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2.0]}
LONG["long_factor"] = [1.0, 2.0, 3.0, 6.0]

# Each with what its family does beyond the prompt: windows, layers without rotation, LongRoPE.
CAUSAL = {
    **dict.fromkeys(("gpt2", "llama", "qwen2", "phi", "smollm3", "mistral", "olmo2"), {}),
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "phi3": {"rope_scaling": LONG, "original_max_position_embeddings": 20, "sliding_window": 9},
    "gemma3_text": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
}
PROMPTS = ([5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16])
NEW = 12


@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_is_what_pytorch_writes(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = tiny.model(name, **CAUSAL[name])
    family, config = families.read(tiny.CONFIGS[name] | CAUSAL[name])
    hf.save(tmp_path, model.params, family, config, "clm")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs.generation_config.eos_token_id = None
    found = generate(model, PROMPTS, Sampling(NEW))
    for prompt, ours in zip(PROMPTS, found, strict=True):
        wanted = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0, len(prompt) :]
        assert ours.tolist() == wanted.tolist()
    assert len({tuple(row) for row in found}) == len(PROMPTS)
    if name == "phi3":  # beyond the original length from the first new token on
        prompt = [*range(5, 26)]
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        found = generate(model, [prompt], Sampling(NEW))[0]
        assert found.tolist() == wanted[0, len(prompt) :].tolist()
        with pytest.raises(UserError, match="prompt 1, which has 10, .* up to position 20;"):
            generate(model, [[5], [6] * 10], Sampling(NEW))


@jax.jit
def logits(model, tokens_BT, mask_BT):
    return model(Batch(None, tokens_BT, mask_BT, None, None)).logits


@pytest.fixture(scope="module")
def unequal():
    """A Llama with a slim block and a bottleneck."""
    return tiny.model(
        "llama",
        blocks=(BlockShape("full", 32, 3, 1, 8, 20), model_config.bottleneck(24, 2, 2, 16)),
    )


def test_the_cache_changes_nothing_where_blocks_differ(unequal):
    """Against the whole row, computed anew for every token."""
    found = generate(unequal, PROMPTS, Sampling(NEW))
    rows = [[*prompt, *new] for prompt, new in zip(PROMPTS, found, strict=True)]
    tokens_BT = np.zeros((len(rows), 20), np.int32)
    for own, row in zip(tokens_BT, rows, strict=True):
        own[: len(row)] = row
    mask_BT = (np.arange(20)[None] < np.array([[len(row)] for row in rows])).astype(np.float32)
    best_BT = np.asarray(logits(unequal, tokens_BT, mask_BT)).argmax(-1)
    for prompt, new, best_T in zip(PROMPTS, found, best_BT, strict=True):
        assert new.tolist() == best_T[len(prompt) - 1 :][:NEW].tolist()


def test_rows_stop_where_they_should_and_share_a_program(unequal):
    whole = generate(unequal, PROMPTS, Sampling(NEW))
    programs = writing._write._cache_size()
    assert [len(row) for row in generate(unequal, PROMPTS, Sampling(5))] == [5, 5, 5]
    assert writing._write._cache_size() == programs
    stop = (int(whole[0][2]),)
    cut = generate(unequal, PROMPTS, Sampling(NEW, stop=stop))
    for row, part in zip(whole, cut, strict=True):
        ends = np.flatnonzero(row == stop[0])
        assert part.tolist() == row[: ends[0] + 1 if len(ends) else NEW].tolist()
    assert len(cut[0]) < NEW
    alone = generate(unequal, PROMPTS[2:], Sampling(NEW, stop=stop))
    assert alone[0].tolist() == cut[2].tolist()


def written(model, sampling, limits_B, seed=0):
    tokens_BT, lengths_B = writing.padded(PROMPTS, 40)
    rows_B = np.arange(len(PROMPTS), dtype=np.int32)
    numbers = np.array(limits_B, np.int32), rows_B, np.uint32(seed), sampling.rule()
    return jax.device_get(writing._write(model, tokens_BT, lengths_B, *numbers, 16))


def test_what_is_told_of_written_tokens(unequal):
    """Limits of rows, ends, and log-probabilities as the model has them, whatever the sampling."""
    sampling = Sampling(NEW, temperature=2.0, top_k=8)
    free = written(unequal, sampling, [NEW] * 3)
    found = written(
        unequal, dataclasses.replace(sampling, stop=(int(free.tokens_BN[1, 4]),)), [NEW, 6, 0]
    )
    assert found.ended_B.tolist() == [False, True, False] and found.counts_B[1:].tolist() == [5, 0]
    assert found.counts_B[0] == NEW
    for prompt, tokens_N, logp_N, count in zip(
        PROMPTS, found.tokens_BN, found.logp_BN, found.counts_B, strict=True
    ):
        assert not tokens_N[count:].any() and not logp_N[count:].any()
        row_T = np.zeros(20, np.int32)
        row_T[: len(prompt) + count] = [*prompt, *tokens_N[:count]]
        mask_1T = np.ones((1, 20), np.float32)
        logs_TV = log_softmax(np.asarray(logits(unequal, row_T[None], mask_1T))[0], axis=-1)
        at = np.arange(len(prompt), len(prompt) + count)
        np.testing.assert_allclose(logp_N[:count], logs_TV[at - 1, row_T[at]], atol=1e-5)


def test_draws(unequal):
    """A row's draws depend on seed and row alone; a set of one token is greedy."""
    sampling = Sampling(NEW, temperature=1.5)
    one, again, other = (generate(unequal, PROMPTS, sampling, seed) for seed in (1, 1, 2))
    assert [row.tolist() for row in one] == [row.tolist() for row in again]
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other, strict=True))
    assert generate(unequal, PROMPTS[:1], sampling, 1)[0].tolist() == one[0].tolist()
    same = generate(unequal, [PROMPTS[1]] * 2, sampling)
    assert same[0].tolist() != same[1].tolist()
    greedy = generate(unequal, PROMPTS, Sampling(NEW))
    for narrow in (dict(top_p=1e-6), dict(top_k=1)):
        found = generate(unequal, PROMPTS, dataclasses.replace(sampling, **narrow))
        assert [row.tolist() for row in found] == [row.tolist() for row in greedy]


@pytest.mark.parametrize(
    "temperature, top_k, top_p, kept",
    [(1.0, 0, 1.0, 5), (2.0, 0, 1.0, 5), (0.5, 0, 0.8, 2), (1.0, 3, 1.0, 3), (1.0, 3, 0.75, 2)],
)
def test_tokens_come_as_often_as_their_probability_says(temperature, top_k, top_p, kept):
    logits = np.log(np.array([0.05, 0.4, 0.3, 0.05, 0.2], np.float32))
    probs = np.exp(logits / temperature)
    order = np.argsort(-probs, kind="stable")
    probs[order[kept:]] = 0
    probs /= probs.sum()
    count = 20_000
    rule = Sampling(1, temperature, top_k, top_p).rule()
    streams_B2 = jax.random.key_data(jax.random.split(jax.random.key(0), count))
    drawn = jax.jit(rule.choose)(jnp.tile(logits, (count, 1)), streams_B2)
    often = np.bincount(drawn, minlength=5) / count
    assert (np.abs(often - probs) <= 4 * np.sqrt(probs * (1 - probs) / count) + 1e-9).all()


def test_a_long_tail_is_drawn_as_often_as_it_should_be():
    """Half of the mass on one id, half on 4,095: of all of these, each as likely."""
    rows, size = 4_000, 4_096
    logits_V = np.full(size, -np.log(2 * (size - 1)), np.float32)
    logits_V[1234] = np.log(0.5)
    streams_B2 = jax.random.key_data(jax.random.split(jax.random.key(1), rows))
    rule = Sampling(1, temperature=1.0).rule()
    drawn = np.asarray(jax.jit(rule.choose)(jnp.tile(logits_V, (rows, 1)), streams_B2))
    assert abs((drawn == 1234).mean() - 0.5) < 4 * np.sqrt(0.25 / rows)
    rest = drawn[drawn != 1234]
    counts = np.bincount(rest // 256, minlength=16)
    assert ((counts - len(rest) / 16) ** 2 / (len(rest) / 16)).sum() < 37.7  # 0.1% of chi2(15)
    assert len(np.unique(rest)) > 0.95 * size * (1 - np.exp(-len(rest) / size))


@pytest.mark.parametrize(
    "prompts, changes, says",
    [
        ([], {}, "no prompts"),
        ([[5], []], {}, "prompt 1 is empty or has ids outside 0 to 95"),
        ([[5, 96]], {}, "prompt 0 is empty or has ids"),
        ([[5] * 30], {}, "12 tokens after prompt 0, which has 30, .* up to position 40;"),
        ([[5]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[5]], {"temperature": -1.0}, "temperature=-1.0"),
        ([[5]], {"top_p": 0.0}, "top_p=0.0"),
        ([[5]], {"top_k": -1}, "top_k=-1"),
    ],
)
def test_mistakes(unequal, prompts, changes, says):
    with pytest.raises(UserError, match=says):
        generate(unequal, prompts, Sampling(**dict(max_new_tokens=NEW) | changes))


def test_stacked_blocks_write_the_same():
    model = tiny.model("llama")
    family, config = families.read(tiny.CONFIGS["llama"])
    config = dataclasses.replace(config, stacked=(Run(0, 1, 2),))
    graphdef = families.abstract(family, config, "clm", Policy()).graphdef
    stacked = Model(families.stack_blocks(model.params, (Run(0, 1, 2),)), graphdef)
    found, wanted = (generate(each, PROMPTS, Sampling(NEW)) for each in (stacked, model))
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]


def test_only_causal_models_write():
    for model in (tiny.model("bert"), tiny.model("gpt2", "none")):
        with pytest.raises(UserError, match="no causal language model"):
            generate(model, PROMPTS, Sampling(NEW))


def test_the_last_token_needs_no_position():
    model = tiny.model("gpt2", policy=Policy("bfloat16", "bfloat16", "xla"))
    assert len(generate(model, [[5] * 30], Sampling(11))[0]) == 11
