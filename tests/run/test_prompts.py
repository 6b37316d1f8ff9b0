"""What models write after: a function of seed and step, in each process its share."""

import types

import numpy as np
import pytest

from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.run.prompts import Prompts
from kd_jax.tasks import clm, mlm

TEXTS = [f"a story of {i} cats and {i % 7} dogs that meet" for i in range(40)]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = tokenizers.train_tokenizer("bpe", TEXTS, 300, folder)
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    data = {"train": {"path": str(folder / "text.txt")}, "cache_dir": str(folder), "held_out": 0.2}
    return clm.make({"name": "clm", "seq_len": 16}, data, tokenizer)


def prompts(task, length=6, seed=3, process_index=0, process_count=1):
    run = types.SimpleNamespace(
        tasks={"student": task},
        config=types.SimpleNamespace(seed=seed),
        processes=dict(process_index=process_index, process_count=process_count),
    )
    settings = types.SimpleNamespace(name="student", model="student", batch_size=4)
    return Prompts(run, settings, length)


def test_batches_are_functions_of_seed_and_step(task):
    one, again, other = prompts(task), prompts(task), prompts(task, seed=4)
    for step in (0, 7, 30):
        tokens_BT, lengths_B, ids_B = one.batch(step)
        assert tokens_BT.shape == (4, 6) and lengths_B.tolist() == [6] * 4
        assert [x.tolist() for x in again.batch(step)] == [x.tolist() for x in one.batch(step)]
        assert other.batch(step)[2].tolist() != ids_B.tolist()
        np.testing.assert_array_equal(one.train.padded(ids_B, 6)[0], tokens_BT)
    assert len({int(i) for step in range(8) for i in one.batch(step)[2]}) > 16


def test_processes_share_the_rows(task):
    whole = prompts(task)
    halves = [prompts(task, process_index=i, process_count=2) for i in range(2)]
    for both, wanted in (
        ([half.batch(5) for half in halves], whole.batch(5)),
        ([half.held_out(6) for half in halves], whole.held_out(6)),
    ):
        for parts, want in zip(zip(*both, strict=True), wanted, strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), want)
    rows = whole.held_out(100)[0].tolist()
    held = {tuple(row) for row in rows}
    assert len(rows) == 100 and rows[len(held)] == rows[0]  # from the first one on again
    trained = whole.train.padded(np.arange(len(whole.train)), 6)[0]
    assert 1 < len(held) < 8 and not held & {tuple(row) for row in trained.tolist()}


def test_mistakes(task):
    with pytest.raises(UserError, match=r"no prompt of at most 99 tokens.*prompt_tokens"):
        prompts(task, length=99)
    other = mlm.make({"name": "mlm"}, {"train": {"path": "text.txt"}}, None)
    with pytest.raises(UserError, match="config.task.name='mlm': clm and chat have prompts"):
        prompts(other)
