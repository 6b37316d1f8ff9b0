"""A real trained Llama, stories260K, against PyTorch: logits, loss over real text, written text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.models.generate import Sampling, generate
from kd_jax.types import Batch
from tests.models.test_parity import load

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

ROWS, LENGTH = 32, 256


@pytest.fixture(scope="module")
def stories(stories_folder):
    """(our model, PyTorch's, tokenizer)."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories_folder).eval()
    return (
        load(stories_folder, "clm")[0],
        theirs,
        transformers.AutoTokenizer.from_pretrained(stories_folder),
    )


def test_logits_and_loss_over_real_text(stories, data_folder):
    ours, theirs, tokenizer = stories
    text = (data_folder / "lm_text" / "tinystories_197k.txt").read_text(encoding="utf-8")
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
    rows_NT = ids[: len(ids) // LENGTH * LENGTH].reshape(-1, LENGTH)
    rows_NT = rows_NT[: len(rows_NT) // ROWS * ROWS]
    assert rows_NT.size > 60_000

    @jax.jit
    def run(model, tokens_BT):
        mask_BT = jnp.ones(tokens_BT.shape)
        logits_BTV = model(Batch(None, tokens_BT, mask_BT, None, None)).logits
        logs = jax.nn.log_softmax(logits_BTV[:, :-1])
        return logits_BTV, -jnp.take_along_axis(logs, tokens_BT[:, 1:, None], 2).mean()

    losses = []
    for tokens_BT in rows_NT.reshape(-1, ROWS, LENGTH):
        logits_BTV, loss = run(ours, tokens_BT)
        with torch.no_grad():
            wanted = theirs(torch.tensor(tokens_BT).long()).logits
            flat = wanted[:, :-1].flatten(0, 1), torch.tensor(tokens_BT[:, 1:]).long().flatten()
            losses.append((loss, torch.nn.functional.cross_entropy(*flat).item()))
        if len(losses) == 1:
            np.testing.assert_allclose(logits_BTV, wanted.numpy(), atol=1e-4)
    mine, its = np.mean(losses, axis=0)
    assert mine == pytest.approx(its, abs=1e-4)
    assert 1.0 < mine < 2.0  # nats a token: it can write


def test_greedy_text_is_pytorchs(stories):
    ours, theirs, tokenizer = stories
    texts = ["Once upon a time", "The dog", "One day, a little girl named Mia found a shiny"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    found = generate(ours, prompts, Sampling(40, stop=(tokenizer.eos_token_id,)))
    for prompt, new in zip(prompts, found, strict=True):
        wanted = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert new.tolist() == wanted[0, len(prompt) :].tolist()
    assert "there was a little girl named Lily" in tokenizer.decode(found[0])
