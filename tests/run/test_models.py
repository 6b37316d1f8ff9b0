import json
from types import SimpleNamespace

from kd_jax.data import tokenizers
from kd_jax.run import models


def save_with_other_rules(tokenizer, folder):
    """Saves a tokenizer of the same vocabulary that makes other letters of texts first."""
    tokenizers.save_tokenizer(tokenizer, folder)
    file = folder / "tokenizer.json"
    entries = json.loads(file.read_text())
    entries["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(entries))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_teacher_whose_tokenizer_cuts_texts_otherwise(tmp_path, caplog):
    own = tokenizers.train_tokenizer("bpe", ["the cat sat on the mat"] * 9, 270, tmp_path / "own")
    save_with_other_rules(own, tmp_path / "other")

    def check(name):
        model = SimpleNamespace(
            config=SimpleNamespace(vocab_size=300), folder=tmp_path / name, name=name
        )
        models.check_shared(own, {"teacher": model})
        return caplog.text

    assert check("own") == ""
    assert "teacher other was trained on texts that its tokenizer cut otherwise" in check("other")
