"""Exported models of our own PyTorch classes, and what they have to do whatever version of
transformers reads them:

    python -m tests.models.exported make FOLDER     # writes one of each; needs kd_jax
    python -m tests.models.exported check FOLDER    # needs torch, transformers and numpy alone

The second command runs in an environment of another version as well.
"""

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
DECODERS = {
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
    "llama": {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"sliding_window": 4, "use_sliding_window": False},
    "phi": {"tie_word_embeddings": True},  # with a bias of the head's own
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 1, 0]},
    "mistral": {},
    "phi3": {"sliding_window": 6},
    "olmo2": {"num_key_value_heads": 4},
    "gemma3_text": {},
}
ENCODERS = {"bert": {}, "roberta": {}, "xlm-roberta": {}, "electra": {}, "distilbert": {}}
ENSEMBLES = {"qwen2": {}, "llama": {"tie_word_embeddings": True}, "gpt2": {}}
WEIGHTS = (0.5, 0.2, 0.3)
EXPECTED = "expected.npz"  # what kd_jax computes and writes
PROMPT, NEW = 8, 8


def unequal(name: str, head: str = "clm", **changes):
    """(model, family, config) with a slim block, a bottleneck with wider heads, and an own one."""
    from kd_jax.models import family as families
    from kd_jax.models import model_config
    from tests.models import tiny

    layers = {"gpt2": "n_layer", "distilbert": "n_layers"}.get(name, "num_hidden_layers")
    changes = {layers: 3} | changes
    family, config = families.read(tiny.CONFIGS[name] | changes)
    own = config.own_shape
    shared = own.num_heads // own.num_kv_heads
    slim = dataclasses.replace(own, num_heads=2, num_kv_heads=2 // shared, ffn_width=20)
    narrow = model_config.bottleneck(24, 2, 2 // shared, 18)
    blocks = (slim, narrow, own)
    config = dataclasses.replace(config, blocks=blocks)
    return tiny.model(name, head, blocks=blocks, **changes), family, config


def make_encoder(folder: Path, name: str, head: str = "classification"):
    """Writes an encoder whose blocks differ to `folder`; returns `unequal`'s."""
    from kd_jax.models import hf
    from tests.models import tiny

    model, family, config = unequal(name, head, **ENCODERS[name])
    hf.save(folder, model.params, family, config, head)
    batch = tiny.batch(name).replace(types_BT=None)
    output = run(model, batch)
    hidden = dict(zip(("hidden0", "hidden1", "hidden2", "hidden3"), output.hidden, strict=True))
    if head == "classification":
        hidden["classes"] = np.asarray(output.logits)[:, 0]
    np.savez(folder / EXPECTED, tokens=batch.tokens_BT, mask=batch.mask_BT, **hidden)
    return model, family, config


def make_decoder(folder: Path, name: str):
    """Writes a decoder whose blocks differ to `folder`; returns `unequal`'s."""
    from kd_jax.models import hf

    model, family, config = unequal(name, **DECODERS[name])
    hf.save(folder, model.params, family, config, "clm")
    _expect(folder, name, lambda batch: np.asarray(run(model, batch).logits))
    return model, family, config


def make_ensemble(folder: Path, name: str, space: str = "logits") -> None:
    """Writes an ensemble of three to `folder`."""
    from scipy.special import log_softmax, logsumexp

    from kd_jax.models import family as families
    from kd_jax.models import hf
    from tests.models import tiny

    changes = ENSEMBLES[name]
    kind, config = families.read(tiny.CONFIGS[name] | changes)
    members = [tiny.model(name, "clm", seed=seed, **changes) for seed in range(3)]
    params = [model.params for model in members]
    hf.save_ensemble(folder, params, WEIGHTS, space, kind, config)
    weights = np.array(WEIGHTS)[:, None, None, None]

    def mean(batch):
        logits = np.stack([np.asarray(run(model, batch).logits, np.float64) for model in members])
        if space == "logits":
            return (weights * logits).sum(0)
        return logsumexp(log_softmax(logits, axis=-1), axis=0, b=weights)

    _expect(folder, name, mean)


def run(model, batch):
    """The model's output, compiled once for each kind of model."""
    return _compiled()(model, batch)


@functools.cache
def _compiled():
    import jax

    return jax.jit(lambda model, batch: model(batch))


def _expect(folder: Path, name: str, logits_of: Callable) -> None:
    """Writes down logits of a batch, and what is the likeliest after a prompt, token by token."""
    from tests.models import tiny

    batch = tiny.batch(name)
    tokens_BT, mask_BT = np.asarray(batch.tokens_BT), np.asarray(batch.mask_BT)
    text_BT = np.where(np.arange(tokens_BT.shape[1]) < PROMPT, tokens_BT, 0)
    for place in range(PROMPT, PROMPT + NEW):
        logits = logits_of(batch.replace(tokens_BT=text_BT, mask_BT=np.ones_like(mask_BT)))
        text_BT[:, place] = logits[:, place - 1].argmax(-1)
    text = text_BT[:, : PROMPT + NEW]
    logits = logits_of(batch)
    np.savez(folder / EXPECTED, tokens=tokens_BT, mask=mask_BT, logits=logits, text=text)


def load(folder: Path, auto: str = "AutoModelForCausalLM", **options):
    """What PyTorch finds there, having taken and missed nothing."""
    import transformers

    model, info = getattr(transformers, auto).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def check_encoder(folder: Path, auto: str = "AutoModelForSequenceClassification"):
    """Holds the encoder in `folder` against what kd_jax computed; returns it."""
    import torch

    model = load(folder, auto, trust_remote_code=True)
    want = dict(np.load(folder / EXPECTED))
    tokens, mask = (torch.from_numpy(want[name]).long() for name in ("tokens", "mask"))
    with torch.no_grad():
        found = model(input_ids=tokens, attention_mask=mask, output_hidden_states=True)
    real = want["mask"] > 0
    assert len(found.hidden_states) == 4
    for number, hidden in enumerate(found.hidden_states):
        expected = want[f"hidden{number}"][real]
        np.testing.assert_allclose(hidden.numpy()[real], expected, rtol=0, atol=1e-4)
    if "classes" in want:
        assert found.logits.abs().max() > 0.1
        np.testing.assert_allclose(found.logits.numpy(), want["classes"], rtol=0, atol=1e-4)
    return model


def check(folder: Path):
    """Holds the model in `folder` against what kd_jax computed and wrote; returns it."""
    import torch

    torch.set_num_threads(1)
    if "text" not in np.load(folder / EXPECTED):
        return check_encoder(folder)
    model = load(folder, trust_remote_code=True)
    want = {name: torch.from_numpy(value) for name, value in np.load(folder / EXPECTED).items()}
    tokens, mask, text = want["tokens"].long(), want["mask"].long(), want["text"].long()
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=mask).logits
        real = mask > 0
        assert logits.abs().max() > 1.0
        np.testing.assert_allclose(logits[real], want["logits"][real], rtol=0, atol=1e-4)
        _check_arguments(model, tokens)
        _check_texts(model, text)
    return model


def _check_texts(model, text) -> None:
    """Greedy texts are kd_jax's, however keys and values are kept; beams need no cache."""
    import torch

    def written(prompt, **options):
        found = model.generate(
            prompt,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            **dict(attention_mask=torch.ones_like(prompt), eos_token_id=None) | options,
        )
        return found.tolist()

    prompt = text[:, :PROMPT]
    for way in ({}, {"use_cache": False}):
        assert written(prompt, **way) == text.tolist(), way
    unused = min(set(range(model.config.vocab_size)) - set(text.flatten().tolist()))
    looked_up = written(prompt[:1], prompt_lookup_num_tokens=2, eos_token_id=unused)
    assert looked_up == text[:1].tolist()
    beams = [written(prompt, num_beams=3, use_cache=use) for use in (True, False)]
    assert beams[0] == beams[1]
    # A row that begins with padding goes on as it does without.
    padded = torch.cat([torch.zeros_like(prompt[:, :3]), prompt], 1)
    mask = torch.ones_like(padded).index_fill_(1, torch.arange(3), 0)
    assert [row[3:] for row in written(padded, attention_mask=mask)] == text.tolist()
    if hasattr(model, "members"):
        refuses(ValueError, lambda: written(prompt, cache_implementation="static"))
    else:
        assert written(prompt, cache_implementation="static") == text.tolist()


def _check_arguments(model, tokens) -> None:
    """The cache goes in and out under either name; what the model does not know is refused."""
    whole = model(tokens).logits
    for name in ("past_key_values", "cache"):
        assert name in inspect.signature(model.forward).parameters
        first = model(tokens[:, :9], use_cache=True)
        cache = first["cache" if "cache" in first.keys() else "past_key_values"]
        rest = model(tokens[:, 9:], **{name: cache}).logits
        np.testing.assert_allclose(rest, whole[:, 9:], rtol=0, atol=1e-4)
    refuses(ValueError, lambda: model(tokens, past_key_values=cache, cache=cache))
    for odd in ({"token_type_ids": tokens}, {"past": cache}, {"output_attentions": True}):
        refuses(TypeError, lambda odd=odd: model(tokens, **odd))
    model(tokens, output_attentions=False, token_type_ids=None)
    kept = model(tokens, logits_to_keep=2).logits
    np.testing.assert_allclose(kept, whole[:, -2:], rtol=0, atol=1e-4)
    assert isinstance(model(tokens, return_dict=False), tuple)


def refuses(error: type[Exception], call: Callable) -> None:
    try:
        call()
    except error:
        return
    raise AssertionError(f"no {error.__name__}")


def main(verb: str, folder: str) -> None:
    if verb == "make":
        for name in DECODERS:
            make_decoder(Path(folder, f"{name}-unequal"), name)
        for name in ENCODERS:
            make_encoder(Path(folder, f"{name}-unequal"), name)
        for name in ENSEMBLES:
            make_ensemble(Path(folder, f"{name}-ensemble"), name)
        return
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    paths = sorted(Path(folder).iterdir())
    assert paths, f"{folder} is empty: make comes before check"
    for path in paths:
        check(path)
        print(f"  {path.name}: right")


if __name__ == "__main__":
    main(*sys.argv[1:])
