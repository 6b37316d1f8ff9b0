"""The chat task: rows, packing, what is cut and dropped."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd_jax.data import encoded, files, splits
from kd_jax.data.chats import Template
from kd_jax.data.encoded import pack
from kd_jax.data.loader import Stream
from kd_jax.errors import UserError
from kd_jax.tasks import chat
from kd_jax.types import Model
from tests.models import tiny
from tests.tasks import chats
from tests.tasks.chats import conversation

ROWS = [
    conversation(f"is house {i} red?", "yes " * (i % 7 + 1), "why?", "it is") for i in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chats.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path, rows):
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return {"path": str(path)}


@pytest.fixture
def data(tmp_path):
    sources = {split: write(tmp_path / f"{split}.jsonl", ROWS) for split in ("train", "test")}
    return sources | {"cache_dir": str(tmp_path / "cache")}


def make(data, tokenizer, **keys):
    return chat.make({"name": "chat", "seq_len": 128, **keys}, data, tokenizer)


def supervised(stream):
    """(token before, label) of everything that is learned, sorted."""
    found = []
    for batch in stream.batches():
        at = batch.weights > 0
        found += zip(batch.tokens_BT[at].tolist(), batch.labels[at].tolist(), strict=True)
    return sorted(found)


@pytest.mark.parametrize("packed", [True, False])
def test_batches_have_the_promised_shapes(data, tokenizer, packed):
    task = make(data, tokenizer, packed=packed)
    shapes = make({}, None, packed=packed).shapes(4)
    for batch in (task.train(4, seed=0)[0], task.held_out("test", 4)[0]):
        assert jax.tree.structure(batch) == jax.tree.structure(shapes)
        for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
            assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize("packed", [True, False])
def test_all_answers_are_learnt_once(data, tokenizer, packed):
    want = []
    for row in chats.encode(Template(tokenizer), ROWS):
        at = np.flatnonzero(row.learned_N)
        want += zip(row.ids_N[at - 1].tolist(), row.ids_N[at].tolist(), strict=True)
    task = make(data, tokenizer, packed=packed)
    assert supervised(task.held_out("test", 3)) == sorted(want)
    about = task.prepare()["test"]
    assert about["learnt"] == len(want) and about["cut"] == about["dropped"] == 0
    assert about["rows"] < 20 if packed else about["rows"] == 20


def test_packed_rows_keep_conversations_apart(data, tokenizer):
    batch = make(data, tokenizer).held_out("test", 2)[0]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    for tokens_T, segments_T, mask_T in zip(
        batch.tokens_BT, batch.segments_BT, batch.mask_BT, strict=True
    ):
        real = int(mask_T.sum())
        assert (segments_T[real:] == 0).all() and (np.diff(segments_T[:real]) >= 0).all()
        begins = np.flatnonzero(np.diff(segments_T[:real], prepend=0))
        assert len(begins) > 1 and (np.diff(segments_T[begins]) == 1).all()
        assert (tokens_T[begins] == start).all()


def test_long_conversations_are_cut_and_those_without_an_answer_left_are_dropped(
    tmp_path, tokenizer, caplog
):
    early = conversation("red?", "yes " * 200)
    late = conversation("is it red? " * 50, "yes")
    data = {"test": write(tmp_path / "long.jsonl", [ROWS[0], early, late])}
    data["cache_dir"] = str(tmp_path / "cache")
    task = make(data, tokenizer, seq_len=64)
    with caplog.at_level("INFO", logger="kd_jax"):
        about = task.prepare()["test"]
        assert about["longest"] == max(task.examples("test").tokens.lengths_N)
    assert (about["conversations"], about["cut"], about["dropped"]) == (3, 2, 1)
    assert "of 3 conversations 2 are longer than 64 tokens and cut, 1 of them" in caplog.text
    batch = task.held_out("test", 4)[0]
    assert (batch.mask_BT.sum(axis=1) > 0).sum() == 2
    with pytest.raises(UserError, match="no conversation has a word of the assistant within"):
        make({**data, "test": write(tmp_path / "l.jsonl", [late])}, tokenizer, seq_len=64).prepare()


def test_held_out_conversations_are_not_trained_on(data, tokenizer):
    task = make(data, tokenizer, packed=False)
    about = task.prepare()
    assert (about["train"]["conversations"], about["validation"]["conversations"]) == (18, 2)
    trained, held = (task._rows(split).rows.items_N for split in ("train", "validation"))
    assert sorted([*trained, *held]) == list(range(20))


def test_of_one_conversation_nothing_can_be_held_out(tmp_path, tokenizer):
    data = {"train": write(tmp_path / "one.jsonl", ROWS[:1]), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="one.jsonl .config.data.train. is too small to hold"):
        make(data, tokenizer).prepare()


def test_tokens_are_kept_by_content(data, tokenizer, monkeypatch):
    first = make(data, tokenizer).held_out("test", 4)[0]
    monkeypatch.setattr(Template, "encode", None)  # not asked for again
    again = make(data, tokenizer).held_out("test", 4)[0]
    assert (first.tokens_BT == again.tokens_BT).all()
    with pytest.raises(TypeError):
        make(data, tokenizer, turns="last").prepare()


@pytest.mark.parametrize("packed", [True, False])
def test_batches_are_those_of_lists_in_memory(data, tokenizer, packed, monkeypatch):
    """The straightforward way, conversation by conversation: a run that began so goes on so."""
    monkeypatch.setattr("kd_jax.data.chats._SLICE", 100)  # characters: several slices
    seq_len = 60
    all_rows = chats.encode(Template(tokenizer), ROWS)
    held_N = splits.random_share(len(ROWS), 0.3, splits.HELD_OUT_SEED)
    task = make({**data, "held_out": 0.3}, tokenizer, packed=packed, seq_len=seq_len)
    for split, chosen_N in (("train", ~held_N), ("validation", held_N)):
        pieces = []
        for row in np.flatnonzero(chosen_N):
            ids_N, learned_N = all_rows[row]
            ends = np.flatnonzero(learned_N[1 : seq_len + 1])
            stop = ends[-1] + 1 if len(ends) else 0
            if stop:
                pieces.append((ids_N[:stop], ids_N[1 : stop + 1], learned_N[1 : stop + 1]))
        lengths = [len(piece[0]) for piece in pieces]
        rows = pack(lengths, seq_len) if packed else [[i] for i in range(len(pieces))]

        def want(ids_B, epochs_B, rows=rows, pieces=pieces):
            chosen = ([(*pieces[i], n) for n, i in enumerate(rows[b], 1)] for b in ids_B)
            return encoded.batch(ids_B, chosen, seq_len, packed)

        for seed in (None, 3):
            stream = Stream(len(rows), want, 2, seed=seed)
            found = task.train(2, 3) if seed else task.held_out(split, 2)
            for step in range(stream.steps or 12 if split == "train" or not seed else 0):
                same = jax.tree.map(np.array_equal, found[step], stream[step])
                assert all(jax.tree.leaves(same)), (split, seed, step)


def test_a_warm_start_reads_no_text(data, tokenizer, monkeypatch):
    for split in ("train", "test"):
        os.utime(data[split]["path"], (10**9, 10**9))
    first = make(data, tokenizer).prepare()
    monkeypatch.setattr(files, "lines", None)
    monkeypatch.setattr(Template, "encode", None)
    assert make(data, tokenizer).prepare() == first


def test_an_empty_table_is_named(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").write_text("\n")
    data = {"train": {"path": str(tmp_path / "empty.jsonl")}, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match="empty.jsonl .config.data.train. holds no rows"):
        make(data, tokenizer).prepare()


def test_settings_that_cannot_be(data, tokenizer):
    with pytest.raises(UserError, match="seq_len=2 must be at least 4"):
        make(data, tokenizer, seq_len=2)
    with pytest.raises(UserError, match="config.task.turns='first': have all, last"):
        make(data, tokenizer, turns="first")
    with pytest.raises(UserError, match="held_out=1 must be above 0 and below 1"):
        make({**data, "held_out": 1}, tokenizer)
    with pytest.raises(UserError, match="config.data.train is not set"):
        make({"test": data["test"]}, tokenizer).train(2, seed=0)
    with pytest.raises(UserError, match="unknown split 'dev'"):
        make(data, tokenizer).held_out("dev", 2)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_packed_rows_have_the_loss_of_single_ones(data, tokenizer, family):
    """Rotary positions and a table of positions; gradients as well."""
    sizes = {"vocab_size": 512, "max_position_embeddings": 128, "n_positions": 128}
    known = tiny.CONFIGS[family].keys()
    model = tiny.model(family, "clm", **{k: v for k, v in sizes.items() if k in known})

    @jax.jit
    def total(params, batch):
        def loss(params):
            output = Model(params, model.graphdef)(batch)
            return (
                -jax.nn.log_softmax(output.logits)[
                    jnp.arange(batch.tokens_BT.shape[0])[:, None],
                    jnp.arange(batch.tokens_BT.shape[1])[None],
                    batch.labels,
                ].ravel()
                @ batch.weights.ravel()
            )

        return jax.value_and_grad(loss)(params)

    found = []
    for packed in (True, False):
        stream = make(data, tokenizer, packed=packed).held_out("test", 4)
        sums = [total(model.params, jax.tree.map(jnp.asarray, b)) for b in stream.batches()]
        found.append(jax.tree.map(lambda *x: sum(np.asarray(v, np.float64) for v in x), *sums))
    tokens = make(data, tokenizer).prepare()["test"]["learnt"]
    (packed, packed_slopes), (single, single_slopes) = found
    assert abs(packed - single) / tokens < 1e-5
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a / tokens, b / tokens, atol=1e-5),
        packed_slopes,
        single_slopes,
    )


def test_the_column_tools_goes_to_the_template(tmp_path, tokenizer):
    shows = "{{ tools | tojson if tools else '' }}" + chats.CHATML
    own = chats.tokenizer(tmp_path, shows)
    rows = [
        {"messages": row, "tools": json.dumps([{"name": f"f{i}"}])} for i, row in enumerate(ROWS)
    ]
    file = tmp_path / "tools.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"test": {"path": str(file)}, "cache_dir": str(tmp_path / "cache")}
    task = make(data, own, packed=False)
    batch = task.held_out("test", 1)[3]
    assert own.decode(batch.tokens_BT[0]).startswith('[{"name": "f3"}]<|im_start|>user')
    file.write_text("".join(json.dumps(row | {"tools": None}) + "\n" for row in rows))
    assert make(data, own).prepare()["test"]["digest"] != task.prepare()["test"]["digest"]


def test_beginnings_of_answers(data, tokenizer):
    """Up to where the last answer begins, as a chat program asks for it; not of long ones."""
    task = make(data, tokenizer, seq_len=16)  # whatever the rows are
    asked = dict(add_generation_prompt=True, return_dict=False)
    wanted = [tokenizer.apply_chat_template(row[:-1], **asked) for row in ROWS]
    most = int(np.median([len(tokens) for tokens in wanted]))
    short = [tokens for tokens in wanted if len(tokens) <= most]
    found = task.beginnings("test", most)
    assert 0 < len(found) == len(short) < len(ROWS)
    tokens_BT, lengths_B = found.padded(np.arange(len(found)), most)
    for tokens_T, length, prompt in zip(tokens_BT, lengths_B, short, strict=True):
        assert tokens_T[:length].tolist() == prompt and not tokens_T[length:].any()
