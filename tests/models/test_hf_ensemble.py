import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from kd_jax.models import family as families
from kd_jax.models import hf_ensemble
from tests.models import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

WEIGHTS = (0.5, 0.2, 0.3)
CASES = [("qwen2", {}), ("llama", {"tie_word_embeddings": True}), ("gpt2", {})]


def made(folder, name, changes, space="logits"):
    kind, config = families.read(tiny.CONFIGS[name] | changes)
    members = [tiny.model(name, "clm", seed=seed, **changes) for seed in range(3)]
    params = [model.params for model in members]
    hf_ensemble.save(folder, params, WEIGHTS, space, kind, config)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return members, loaded.eval()


@pytest.mark.parametrize("space", ["logits", "probabilities"])
@pytest.mark.parametrize("name, changes", CASES)
def test_pytorch_gives_the_same_mean(name, changes, space, tmp_path):
    members, theirs = made(tmp_path, name, changes, space)
    batch = tiny.batch(name)
    logits = np.stack([np.asarray(model(batch).logits, np.float64) for model in members])
    weights = np.array(WEIGHTS)[:, None, None, None]
    if space == "logits":
        wanted = (weights * logits).sum(0)
    else:
        wanted = logsumexp(log_softmax(logits, axis=-1), axis=0, b=weights)
    with torch.no_grad():
        found = theirs(
            input_ids=torch.tensor(np.asarray(batch.tokens_BT)).long(),
            attention_mask=torch.tensor(np.asarray(batch.mask_BT)).long(),
        ).logits
    real = np.asarray(batch.mask_BT) > 0
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-4)


@pytest.mark.parametrize("name, changes", CASES)
def test_it_writes_as_without_a_cache(name, changes, tmp_path):
    _, theirs = made(tmp_path, name, changes)
    prompt = torch.tensor([[5, 6, 7], [8, 9, 4]])
    mask = torch.ones_like(prompt)
    how = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        cached = theirs.generate(prompt, use_cache=True, pad_token_id=0, **how)
        whole = theirs.generate(prompt, use_cache=False, pad_token_id=0, **how)
    assert cached.shape == (2, 11) and torch.equal(cached, whole)


@pytest.mark.parametrize("name, changes", CASES)
def test_a_saved_copy_is_the_same(name, changes, tmp_path):
    _, theirs = made(tmp_path / "one", name, changes)
    theirs.save_pretrained(tmp_path / "two")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "two", trust_remote_code=True
    )
    ours, copy = theirs.state_dict(), again.state_dict()
    assert ours.keys() == copy.keys()
    assert all(torch.equal(ours[key], copy[key]) for key in ours)
