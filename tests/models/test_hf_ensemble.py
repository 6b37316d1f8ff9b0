import pytest

from tests.models import exported

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("name", "space"),
    [(name, "logits") for name in exported.ENSEMBLES] + [("gpt2", "probabilities")],
)
def test_pytorch_computes_and_writes_the_same(name, space, tmp_path):
    exported.make_ensemble(tmp_path, name, space)
    theirs = exported.check(tmp_path)

    # And so does what PyTorch writes.
    theirs.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", trust_remote_code=True
    )
    ours, copy = theirs.state_dict(), again.state_dict()
    assert ours.keys() == copy.keys()
    assert all(torch.equal(ours[key], copy[key]) for key in ours)


def test_a_cache_of_another_model_is_refused(tmp_path):
    exported.make_ensemble(tmp_path, "gpt2")
    theirs = exported.load(tmp_path, trust_remote_code=True)
    tokens = torch.arange(4, 10)[None]
    with torch.no_grad():
        alone = theirs.members[0](tokens, use_cache=True)
        cache = alone["cache" if "cache" in alone.keys() else "past_key_values"]
        with pytest.raises(ValueError, match="the cache is of another model"):
            theirs(tokens, cache=cache)
