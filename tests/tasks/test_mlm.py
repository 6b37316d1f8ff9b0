import jax
import ml_collections
import numpy as np
import pytest

from kd_jax import plugins
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.tasks import mlm

CLS, SEP, MASK, PAD = 2, 3, 4, 0
DOCUMENTS = [f"document {i} says " + "some more words, " * (i % 5) + "end" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train_tokenizer(
        "wordpiece", DOCUMENTS, 100, tmp_path_factory.mktemp("tokenizer")
    )


@pytest.fixture
def data(tmp_path):
    (tmp_path / "train.txt").write_text("\n".join(DOCUMENTS))
    (tmp_path / "test.txt").write_text("\n".join(DOCUMENTS[:7]))
    return {
        "train": {"path": str(tmp_path / "train.txt")},
        "test": {"source": "files", "path": str(tmp_path / "test.txt")},
        "cache_dir": str(tmp_path / "cache"),
    }


def make(data, tokenizer, **keys):
    config = ml_collections.ConfigDict({"name": "mlm", "seq_len": 16, **keys})
    task = plugins.load("tasks", "mlm", "make").make(
        config, ml_collections.ConfigDict(data), tokenizer
    )
    assert task.head == "mlm"
    return task


def restored(batch):
    """The tokens as they were before masking."""
    tokens_BT = batch.tokens_BT.copy()
    for row in range(len(tokens_BT)):
        used_P = batch.weights[row] > 0
        tokens_BT[row, batch.positions_BP[row][used_P]] = batch.labels[row][used_P]
    return tokens_BT


def encoded(tokenizer, documents):
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    return [token for document in ids for token in (*document, SEP)]


def test_batches_have_the_shapes_and_types_that_are_promised(data, tokenizer):
    task = make(data, tokenizer)
    shapes = make({}, None).shapes(4)  # neither tokenizer nor data are there
    for batch in (task.train(4, seed=0)[0], task.held_out("test", 4)[0]):
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
            assert isinstance(array, np.ndarray)
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


def test_held_out_rows_cover_all_of_the_text(data, tokenizer):
    stream = make(data, tokenizer).held_out("test", 4)
    text_ids = []
    for batch in stream.batches():
        for tokens_T, mask_T in zip(restored(batch), batch.mask_BT, strict=True):
            row = tokens_T[mask_T > 0].tolist()
            assert not row or (row[0], row[-1]) == (CLS, SEP)
            assert (tokens_T[mask_T == 0] == PAD).all() or not row
            text_ids += row[1:-1]
    assert text_ids == encoded(tokenizer, DOCUMENTS[:7])
    assert len(text_ids) % 14  # so the last block was not full


def test_only_text_is_predicted(data, tokenizer):
    task = make(data, tokenizer)
    for batch in (task.train(8, seed=0)[0], *task.held_out("test", 8).batches()):
        used_BP = batch.weights > 0
        assert batch.labels[used_BP].min() > MASK
        # Blank rows have weight 0 throughout.
        assert (used_BP.any(axis=1) == (batch.ids_B >= 0)).all()
        assert (np.take_along_axis(batch.mask_BT, batch.positions_BP, axis=1)[used_BP] == 1).all()


def test_masks_change_with_the_epoch_but_not_on_held_out_text(data, tokenizer):
    task = make(data, tokenizer)
    stream = task.train(1, seed=0)
    rows = [[stream[s] for s in range(e * stream.size, (e + 1) * stream.size)] for e in range(3)]
    masks = [{int(b.ids_B[0]): b.positions_BP.tolist() for b in epoch} for epoch in rows]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        same = [masks[one][i] == masks[other][i] for i in masks[one]]
        assert np.mean(same) < 0.2  # 2 of 14 positions can agree by chance
    first, second = (make(data, tokenizer).held_out("validation", 2) for _ in range(2))
    assert first.steps == second.steps
    for a, b in zip(first.batches(), second.batches(), strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_training_rows_do_not_depend_on_the_batch_size(data, tokenizer):
    task = make(data, tokenizer)
    large, small = task.train(8, seed=5), task.train(2, seed=5)
    for step in range(large.size // 8 + 2):  # across an epoch's end
        parts = [small[4 * step + i] for i in range(4)]
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
        assert jax.tree.all(jax.tree.map(np.array_equal, joined, large[step]))


def test_validation_is_held_out_of_train(data, tokenizer):
    task = make({**data, "held_out": 0.25}, tokenizer)
    manifest = task.prepare()
    assert [manifest[s]["documents"] for s in ("train", "validation", "test")] == [30, 10, 7]
    assert sum(manifest[s]["tokens"] for s in ("train", "validation")) == len(
        encoded(tokenizer, DOCUMENTS)
    )
    own = make({**data, "validation": data["test"]}, tokenizer).prepare()
    assert [own[s]["documents"] for s in ("train", "validation", "test")] == [40, 7, 7]
    alone = make({"test": data["test"], "cache_dir": data["cache_dir"]}, tokenizer).prepare()
    assert list(alone) == ["test"]


def test_bernoulli_overflow_is_counted(data, tokenizer):
    task = make(data, tokenizer, masking={"mode": "bernoulli", "rate": 0.5})
    stream = task.train(8, seed=0)
    kept = sum(stream[step].weights.sum() for step in range(20))
    assert task.masking.selected - task.masking.dropped == kept and task.masking.dropped > 0


def test_mistakes(data, tokenizer, tmp_path):
    with pytest.raises(UserError, match="config.task.seqlen .did you mean 'seq_len'"):
        make(data, tokenizer, seqlen=3)
    with pytest.raises(UserError, match="config.task.masking.mode='no'"):
        make(data, tokenizer, masking={"mode": "no"})
    with pytest.raises(UserError, match="unknown key config.data.trian .did you mean 'train'"):
        make({"trian": None}, tokenizer)
    with pytest.raises(UserError, match="seq_len=3 must be at least 4"):
        make(data, tokenizer, seq_len=3)
    with pytest.raises(UserError, match="config.data.held_out=0 must be above 0"):
        make({**data, "held_out": 0}, tokenizer)
    with pytest.raises(UserError, match="config.data.test is not set"):
        make({}, tokenizer).held_out("test", 4)
    with pytest.raises(UserError, match="unknown split 'dev'; have: train, validation, test"):
        make(data, tokenizer).held_out("dev", 4)
    with pytest.raises(UserError, match="tokens, too few for a block of config.task.seq_len=9999"):
        make(data, tokenizer, seq_len=9999).train(4, seed=0)
    (tmp_path / "one.txt").write_text("one document")
    with pytest.raises(UserError, match="too small to hold anything out: .*by blank lines"):
        make({"train": {"path": str(tmp_path / "one.txt")}}, tokenizer).train(4, seed=0)


def test_a_tokenizer_without_the_tokens_it_needs(data, tmp_path):
    gpt2 = tokenizers.train_tokenizer("bpe", DOCUMENTS, 300, tmp_path / "gpt2")
    with pytest.raises(UserError, match="has no mask_token, which masked language modelling needs"):
        mlm.make({"name": "mlm"}, data, gpt2)
