import json
import os
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from kd_jax.data import tokenizers
from kd_jax.errors import UserError

DOCUMENTS = ["The quick brown fox jumps over the lazy dog.", "Pack my box, five dozen jugs!"] * 20


@pytest.mark.parametrize("kind, model_type", [("wordpiece", "bert"), ("bpe", "gpt2")])
def test_a_trained_tokenizer_loads_everywhere_and_is_the_same_each_time(tmp_path, kind, model_type):
    trained = tokenizers.train_tokenizer(kind, DOCUMENTS, 400, tmp_path / "a")
    again = tokenizers.train_tokenizer(kind, DOCUMENTS, 400, tmp_path / "b")
    assert trained.get_vocab() == again.get_vocab()
    # Beside a checkpoint's config.json, as an export has it.
    (tmp_path / "b" / "config.json").write_text(json.dumps({"model_type": model_type}))
    sentence = "The five foxes, pack of DOGS — über\n it"
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path / "b"),
        tokenizers.load_tokenizer(tmp_path / "a"),
    ):
        assert loaded(sentence)["input_ids"] == trained(sentence)["input_ids"]
        assert (
            loaded.decode(loaded("quick box")["input_ids"], skip_special_tokens=True) == "quick box"
        )
    assert len(trained.backend_tokenizer.encode(" quick", add_special_tokens=False).ids) == 1


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("declared", [None, "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_the_rules_are_those_of_tokenizer_json(tmp_path, kind, declared):
    # transformers 5 makes a Qwen2Tokenizer of whatever lies beside a Qwen2's config.json.
    trained = tokenizers.train_tokenizer(kind, DOCUMENTS, 400, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    if declared:
        file = tmp_path / "tokenizer_config.json"
        stated = json.loads(file.read_text()) | {"tokenizer_class": declared}
        file.write_text(json.dumps(stated))
    loaded, sentence = (
        tokenizers.load_tokenizer(tmp_path),
        "The 1234 foxes' DOGS — cafe\u0301\n\n it",
    )
    assert loaded(sentence)["input_ids"] == trained(sentence)["input_ids"]
    assert tokenizers.same_rules(loaded, trained)
    names = ("pad_token", "eos_token", "mask_token", "bos_token", "cls_token")
    assert [getattr(loaded, name) for name in names] == [getattr(trained, name) for name in names]
    # So an export's card tells whom to ask.
    assert tokenizers.reader_of(tmp_path) == "PreTrainedTokenizerFast"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if declared != "LlamaTokenizerFast":
        assert tokenizers.reader_of(tmp_path) == "AutoTokenizer"


def test_saves_nothing_of_this_machine_or_of_the_last_text(tmp_path):
    trained = tokenizers.train_tokenizer("bpe", DOCUMENTS, 300, tmp_path / "a")
    trained(DOCUMENTS, truncation=True, max_length=7)
    tokenizers.save_tokenizer(trained, tmp_path / "b")
    stated = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text())
    assert not stated.keys() & {"local_files_only", "is_local", "name_or_path", "max_length"}
    assert str(tmp_path) not in json.dumps(stated)
    backend = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    assert backend["truncation"] is None and backend["padding"] is None
    # An older save, with the length of some training.
    trained.backend_tokenizer.enable_truncation(7)
    trained.save_pretrained(tmp_path / "c")
    tokenizers.save_tokenizer(tokenizers.load_tokenizer(tmp_path / "c"), tmp_path / "d")
    again = json.loads((tmp_path / "d" / "tokenizer_config.json").read_text())
    assert again == stated | {"truncation_side": "right"}
    assert json.loads((tmp_path / "d" / "tokenizer.json").read_text()) == backend


def test_code_beside_a_tokenizer_is_never_run(tmp_path, monkeypatch):
    tokenizers.train_tokenizer("bpe", DOCUMENTS, 300, tmp_path)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    file = tmp_path / "tokenizer_config.json"
    stated = json.loads(file.read_text()) | {"tokenizer_class": "Own"}
    file.write_text(json.dumps(stated | {"auto_map": {"AutoTokenizer": [None, "own.Own"]}}))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who would be asked, and say yes
    with pytest.raises(UserError, match="it needs code of its own .auto_map., which is never run"):
        tokenizers.load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_special_tokens_of_trained_tokenizers(tmp_path):
    bert = tokenizers.train_tokenizer("wordpiece", DOCUMENTS, 200, tmp_path / "a")
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    assert [tokenizers.token_id(bert, name, "a test") for name in names] == [0, 1, 2, 3, 4]
    assert bert("fox")["input_ids"][0] == 2 and bert("fox")["input_ids"][-1] == 3
    gpt2 = tokenizers.train_tokenizer("bpe", DOCUMENTS, 300, tmp_path / "b")
    assert gpt2.eos_token == "<|endoftext|>" and len(gpt2) <= 300
    assert gpt2.decode(gpt2("naïve 中")["input_ids"]) == "naïve 中"  # every byte is in the alphabet
    with pytest.raises(UserError, match="has no mask_token, which masked language modelling needs"):
        tokenizers.vocabulary(gpt2)


def test_vocabulary_of_word_pieces(tmp_path):
    bert = tokenizers.train_tokenizer("wordpiece", DOCUMENTS, 200, tmp_path)
    vocabulary = tokenizers.vocabulary(bert)
    assert vocabulary.mask_id == 4 and len(vocabulary.maskable_V) == len(bert)
    assert np.flatnonzero(~vocabulary.maskable_V).tolist() == [0, 1, 2, 3, 4]
    for token, index in bert.get_vocab().items():
        assert vocabulary.starts_V[index] == (not token.startswith("##"))
    assert not vocabulary.starts_V.all()


def test_vocabulary_of_byte_level_tokens(tmp_path):
    gpt2 = tokenizers.train_tokenizer("bpe", DOCUMENTS, 300, tmp_path)
    gpt2.add_special_tokens({"mask_token": "<mask>"})
    vocabulary = tokenizers.vocabulary(gpt2)
    ids = gpt2("The fox\njumps")["input_ids"]
    tokens = gpt2.convert_ids_to_tokens(ids)
    starts = vocabulary.starts_V[ids].tolist()
    assert [s for t, s in zip(tokens, starts, strict=True) if t.startswith(("Ġ", "Ċ"))] == [
        True
    ] * 2
    assert sum(starts) == 2
    assert not vocabulary.maskable_V[gpt2.mask_token_id]


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="nothing does not exist"):
        tokenizers.load_tokenizer(tmp_path / "nothing")
    with pytest.raises(
        UserError, match="holds no tokenizer: it needs tokenizer.json, or vocab.txt"
    ):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(UserError, match="cannot load the tokenizer in"):
        tokenizers.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="unknown tokenizer kind 'unigram'; have: wordpiece, bpe"):
        tokenizers.train_tokenizer("unigram", DOCUMENTS, 100, tmp_path)


@pytest.mark.parametrize("name, size", [("bert-base-uncased", 30522), ("gpt2", 50257)])
def test_real_tokenizers(name, size):
    if "KD_JAX_DATA" not in os.environ:
        pytest.skip("KD_JAX_DATA is not set")
    folder = Path(os.environ["KD_JAX_DATA"]) / "tokenizers" / name
    assert len(tokenizers.load_tokenizer(folder)) == size


def test_vocabularies_too_small_for_the_alphabet(tmp_path):
    with pytest.raises(UserError, match="vocab_size=20 is too small: special tokens and single"):
        tokenizers.train_tokenizer("wordpiece", DOCUMENTS, 20, tmp_path)
    with pytest.raises(UserError, match="vocab_size=256 is too small: single bytes take 257"):
        tokenizers.train_tokenizer("bpe", DOCUMENTS, 256, tmp_path)
