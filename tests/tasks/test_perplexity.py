import copy
import math

import numpy as np
import pytest
from tokenizers import processors

from kd_jax.errors import UserError
from kd_jax.tasks import perplexity
from tests.tasks.likelihood import tokenizer

TEXT = " The man saw the dog . \n\n The dog ran home ,\n quickly .\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def made(path, **config):
    return perplexity.scoring(config, {"test": {"source": "files", "path": path}})


def test_a_text_file_is_one_text_as_it_stands(file):
    task = made(file, seq_len=8, stride=3)
    assert list(task.scored) == [TEXT] and task.manifest()["examples"] == 1
    scored = task.encoded(tokenizer(), 100)
    ids = tokenizer()(TEXT)["input_ids"]
    values_N = -scored._stretches.counts_N.astype(float)  # one nat a token
    found = scored.figures(values_N)
    assert found["loss"] == 1.0 and found["perplexity"] == math.e
    assert found["tokens"] == len(ids) - 1 and found["words"] == len(TEXT.split()) == 13
    assert found["word_perplexity"] == pytest.approx(math.exp((len(ids) - 1) / 13))
    assert (found["seq_len"], found["stride"], found["documents"]) == (8, 3, "joined")
    records = list(scored.records(values_N))
    assert len(records) == found["windows"] == 1 + math.ceil((len(ids) - 9) / 3)
    assert records[0] == {"window": 0, "tokens": 8, "log_likelihood": -8.0}
    assert scored.hits(values_N) == {} and scored.chance is None


def test_documents_alone_begin_with_a_token_of_their_own(file):
    task = made(file, documents="alone")
    documents = ["The man saw the dog .", "The dog ran home ,\n quickly ."]
    assert [text.strip() for text in task.scored] == documents
    scored = task.encoded(tokenizer(), 100)
    ids = [tokenizer()(text)["input_ids"] for text in task.scored]
    assert scored.figures(np.zeros(2))["tokens"] == sum(map(len, ids))
    end = tokenizer().eos_token_id
    rows = [
        row[mask > 0].tolist()
        for batch in scored.rows.batches(1)
        for row, mask in zip(batch.tokens_BT, batch.mask_BT, strict=True)
    ]
    assert sorted(rows, key=len) == sorted([[end, *own[:-1]] for own in ids], key=len)


def test_other_documents_are_joined_by_a_blank_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a dog"}\n{"text": "a fox"}\n')
    assert list(made(str(tmp_path / "rows.jsonl")).scored) == ["a dog\n\na fox"]
    alone = made(str(tmp_path / "rows.jsonl"), documents="alone")
    assert list(alone.scored) == ["a dog", "a fox"]
    assert alone.manifest()["digest"] != made(str(tmp_path / "rows.jsonl")).manifest()["digest"]


def test_windows_are_as_long_as_the_model_allows_and_move_by_half(file):
    def stated(max_tokens, **config):
        found = made(file, **config).encoded(tokenizer(), max_tokens)
        return tuple(found._stated[key] for key in ("seq_len", "stride"))

    assert stated(64) == (64, 32) and stated(10_000) == (2048, 1024)
    assert stated(64, seq_len=10) == (10, 5) and stated(64, stride=64) == (64, 64)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"stride": 65}, "config.task.stride=65 is more than the 64 tokens of a window"),
        ({"stride": 0}, "config.task.stride=0 must be at least 1"),
        ({"seq_len": "8"}, "config.task.seq_len='8' should be a whole number"),
        ({"documents": "apart"}, "config.task.documents='apart': have joined, alone"),
    ],
)
def test_mistakes(config, message, file):
    with pytest.raises(UserError, match=message):
        made(file, **config).encoded(tokenizer(), 64)


def test_no_text(tmp_path):
    with pytest.raises(UserError, match="perplexity needs a text: set config.data.test"):
        perplexity.scoring({}, None)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="a.txt: one token in all, nothing to predict"):
        made(str(tmp_path / "a.txt")).encoded(tokenizer(), 64)


def test_a_tokenizer_that_ends_texts_scores_the_same_tokens(file):
    plain, ends = tokenizer(), copy.deepcopy(tokenizer())
    name = plain.eos_token
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {name}", special_tokens=[(name, plain.eos_token_id)]
    )
    for documents in ("joined", "alone"):
        task = made(file, seq_len=8, documents=documents)
        found, wanted = (task.encoded(each, 100)._stretches for each in (ends, plain))
        assert ends("a")["input_ids"] != plain("a")["input_ids"]
        np.testing.assert_array_equal(found.tokens_F, wanted.tokens_F)
