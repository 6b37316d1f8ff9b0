import copy

import jax
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.data import tokenizers
from kd_jax.errors import UserError

DOCUMENTS = [f"document {i} says " + "some more words, " * (i % 5) + "end" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train_tokenizer("bpe", DOCUMENTS, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(DOCUMENTS))
    (tmp_path / "test.txt").write_text("\n".join(DOCUMENTS[:7]))
    return {
        "train": {"path": str(tmp_path / "train.txt")},
        "test": {"path": str(tmp_path / "test.txt")},
        "cache_dir": str(tmp_path / "cache"),
    }


def make(data, tokenizer, **keys):
    config = {"name": "clm", "seq_len": 16, **keys}
    task = plugins.load("tasks", "clm", "make").make(config, data, tokenizer)
    assert task.head == "clm"
    return task


def encoded(tokenizer, documents):
    ids = tokenizer(documents)["input_ids"]
    return [token for document in ids for token in (*document, tokenizer.eos_token_id)]


def test_batches_have_the_shapes_and_types_that_are_promised(data, tokenizer):
    task = make(data, tokenizer)
    shapes = make({}, None).shapes(4)
    for batch in (task.train(4, seed=0)[0], task.held_out("test", 4)[0]):
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
            assert isinstance(array, np.ndarray)
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_documents_may_be_joined_by_the_token_of_beginnings(data, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    one, other = (
        make(data, tokenizer, separator=name).held_out("test", 4)[0].tokens_BT
        for name in ("eos", "bos")
    )
    assert (one == tokenizer.eos_token_id).any()
    want = np.where(one == tokenizer.eos_token_id, tokenizer.bos_token_id, one)
    np.testing.assert_array_equal(other, want)
    with pytest.raises(UserError, match="config.task.separator='sep': have eos, bos"):
        make(data, tokenizer, separator="sep")


def test_every_token_but_the_first_is_predicted_once_from_those_before_it(data, tokenizer):
    want = encoded(tokenizer, DOCUMENTS[:7])
    predicted = []
    for batch in make(data, tokenizer).held_out("test", 4).batches():
        rows = zip(batch.tokens_BT, batch.mask_BT, batch.labels, batch.weights, strict=True)
        for tokens_T, mask_T, labels_T, weights_T in rows:
            predicted += labels_T[weights_T > 0].tolist()
            inside = int(weights_T.sum())
            # The label of a position is the token at the next one: shifted once.
            assert tokens_T[1:inside].tolist() == labels_T[: max(0, inside - 1)].tolist()
            assert mask_T[:inside].all() and (weights_T <= mask_T).all()
    assert predicted == want[1:]
    assert (len(want) - 1) % 16  # so the last block was not full


def test_training_blocks_are_full_and_hold_the_text_in_order(data, tokenizer):
    task = make({**data, "validation": data["test"]}, tokenizer)
    stream = task.train(1, seed=0)
    want = encoded(tokenizer, DOCUMENTS)
    assert stream.size == (len(want) - 1) // 16
    rows = sorted((stream[step] for step in range(stream.size)), key=lambda batch: batch.ids_B[0])
    assert all(batch.weights.all() and batch.mask_BT.all() for batch in rows)
    assert np.concatenate([b.tokens_BT[0] for b in rows]).tolist() == want[: 16 * len(rows)]
    assert np.concatenate([b.labels[0] for b in rows]).tolist() == want[1 : 16 * len(rows) + 1]


def test_a_manifest_counts_documents_tokens_and_rows(data, tokenizer):
    task = make(data, tokenizer)
    for split, found in task.prepare().items():
        tokens = len(task._tokens(split))
        rows = (
            (tokens - 1) // task.seq_len if split == "train" else -(-(tokens - 1) // task.seq_len)
        )
        assert found["tokens"] == tokens and found["rows"] == rows > 0


def test_processes_share_the_batches_of_training_and_evaluation(data, tokenizer):
    task = make(data, tokenizer)
    for whole, parts in (
        (task.train(8, 3), [task.train(8, 3, p, 4) for p in range(4)]),
        (task.held_out("test", 8), [task.held_out("test", 8, p, 4) for p in range(4)]),
    ):
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *[p[1] for p in parts])
        assert jax.tree.all(jax.tree.map(np.array_equal, joined, whole[1]))
        assert {part.steps for part in parts} == {whole.steps}


def test_mistakes(data, tokenizer, tmp_path):
    with pytest.raises(UserError, match="unknown key config.task.masking; have: name, seq_len"):
        make(data, tokenizer, masking={})
    bert = tokenizers.train_tokenizer("wordpiece", DOCUMENTS, 100, tmp_path / "bert")
    with pytest.raises(UserError, match="has no eos_token, which causal language modelling needs"):
        make(data, bert).train(4, seed=0)


def test_beginnings_of_documents(data, tokenizer):
    """With the separator before them; none of a document that has no more tokens."""
    task, end = make(data, tokenizer), tokenizer.eos_token_id
    ids = tokenizer(DOCUMENTS[:7])["input_ids"]
    most = sorted(map(len, ids[1:]))[2] + 1  # all of the third shortest document: nothing follows
    found = task.beginnings("test", most)
    long = [document for document in ids[1:] if len(document) >= most]
    assert 0 < len(found) == len(long) < 4
    tokens_BT, lengths_B = found.padded(np.arange(len(found)), most + 4)
    assert lengths_B.tolist() == [most] * len(long) and not tokens_BT[:, most:].any()
    assert tokens_BT[:, :most].tolist() == [[end, *document[: most - 1]] for document in long]
