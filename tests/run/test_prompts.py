"""What models write after: a function of seed and step, in each process its share."""

import types

import numpy as np
import pytest

from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.run import prompts as own
from kd_jax.tasks import clm, mlm

TEXTS = [f"a story of {i} cats and {i % 7} dogs that meet" for i in range(40)]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    tokenizer = tokenizers.train_tokenizer("bpe", TEXTS, 300, folder)
    (folder / "text.txt").write_text("\n\n".join(TEXTS))
    data = {"train": {"path": str(folder / "text.txt")}, "cache_dir": str(folder), "held_out": 0.2}
    return clm.make({"name": "clm", "seq_len": 16}, data, tokenizer)


def run_of(task, seed=3, process_index=0, process_count=1):
    run = types.SimpleNamespace(
        tasks={"student": task},
        config=types.SimpleNamespace(seed=seed),
        processes=dict(process_index=process_index, process_count=process_count),
    )
    return run, types.SimpleNamespace(name="student", model="student", batch_size=4)


def prompts(task, length=6, **run):
    return own.Prompts(*run_of(task, **run), length)


def test_batches_are_functions_of_seed_and_step(task):
    one, again, other = prompts(task), prompts(task), prompts(task, seed=4)
    trained = own.beginnings(*run_of(task), 6, "train")
    for step in (0, 7, 30):
        tokens_BT, lengths_B, ids_B = one.batch(step)
        assert tokens_BT.shape == (4, 6) and lengths_B.tolist() == [6] * 4
        assert [x.tolist() for x in again.batch(step)] == [x.tolist() for x in one.batch(step)]
        assert other.batch(step)[2].tolist() != ids_B.tolist()
        np.testing.assert_array_equal(trained.padded(ids_B, 6)[0], tokens_BT)
    assert len({int(i) for step in range(8) for i in one.batch(step)[2]}) > 16


@pytest.fixture
def process(monkeypatch):
    """Makes this process another one of two."""

    def become(index, count=2):
        monkeypatch.setattr("jax.process_index", lambda: index)
        monkeypatch.setattr("jax.process_count", lambda: count)

    return become


def held_out(task, count):
    return own.held_out(*run_of(task), 6, count, "validation")


def test_processes_share_the_rows(task, process):
    batches, held, whole = [], [], [prompts(task).batch(5), held_out(task, 6)]
    for index in range(2):
        process(index)
        batches.append(prompts(task, process_index=index, process_count=2).batch(5))
        held.append(held_out(task, 6))
    for both, wanted in zip((batches, held), whole, strict=True):
        for parts, want in zip(zip(*both, strict=True), wanted, strict=True):
            np.testing.assert_array_equal(np.concatenate(parts), want)


def test_held_out_prompts_are_no_training_prompts(task):
    rows, found = held_out(task, 100)[0].tolist(), own.beginnings(*run_of(task), 6, "train")
    held = {tuple(row) for row in rows}
    assert len(rows) == 100 and rows[len(held)] == rows[0]  # from the first one on again
    trained = found.padded(np.arange(len(found)), 6)[0]
    assert 1 < len(held) < 8 and not held & {tuple(row) for row in trained.tolist()}


def test_mistakes(task):
    with pytest.raises(UserError, match=r"no prompt of at most 99 tokens.*prompt_tokens"):
        prompts(task, length=99)
    other = mlm.make({"name": "mlm"}, {"train": {"path": "text.txt"}}, None)
    with pytest.raises(UserError, match="config.task.name='mlm': clm and chat have prompts"):
        prompts(other)
