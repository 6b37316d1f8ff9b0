import json
from types import SimpleNamespace

from kd_jax.run import models
from kd_jax.tasks import text


def test_a_teacher_whose_tokenizer_cuts_texts_otherwise(tmp_path, caplog):
    own = text.train_tokenizer("bpe", ["the cat sat on the mat"] * 9, 270, tmp_path / "own")
    text.save_tokenizer(own, tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    entries = json.loads(file.read_text())
    entries["normalizer"] = {"type": "Lowercase"}
    file.write_text(json.dumps(entries))
    config = json.loads((tmp_path / "other" / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(config))

    def check(name):
        model = SimpleNamespace(
            config=SimpleNamespace(vocab_size=300), folder=tmp_path / name, name=name
        )
        models.check_shared(own, {"teacher": model})
        return caplog.text

    assert check("own") == ""
    assert "teacher other was trained on texts that its tokenizer cut otherwise" in check("other")
