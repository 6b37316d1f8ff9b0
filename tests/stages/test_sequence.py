"""Texts that the teacher writes once, and the stage that learns them."""

import dataclasses
import importlib
import logging
import types

import numpy as np
import pytest

from kd_jax.data import cache
from kd_jax.errors import UserError
from kd_jax.run.run import build
from kd_jax.run.sampler import Text, TextWriter
from kd_jax.run.teaching import TeacherLogits, given_teachers
from kd_jax.stages import sequence
from kd_jax.stages.sequence import Texts
from tests import smoke


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with smoke.private_caches():
        config = importlib.import_module("configs.sequence_stories").get_config("smoke")
        config.stages.sequence.update(prompts=20, samples=2)
        config.eval.batch_size = 16
        yield build(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def teachers(run):
    return TeacherLogits(run, given_teachers(run))


@pytest.fixture
def parts(monkeypatch):
    """How many texts are written at a time; raises KeyboardInterrupt at number `parts.end`."""

    class Parts(list):
        end = None

    made, write = Parts(), TextWriter.write

    def noted(self, prompts, numbers):
        if len(made) == made.end:
            raise KeyboardInterrupt
        made.append(len(prompts))
        return write(self, prompts, numbers)

    monkeypatch.setattr(TextWriter, "write", noted)
    monkeypatch.setattr(sequence, "AT_ONCE", 8)
    return made


def stage(run, **own):
    this = run.stage("sequence")
    return dataclasses.replace(this, own=this.own | own)


def same(one, other):
    assert one.ended_N.tolist() == other.ended_N.tolist()
    for ours, theirs in ((one.prompts, other.prompts), (one.tokens, other.tokens)):
        assert [row.tolist() for row in ours] == [row.tolist() for row in theirs]


def test_they_are_written_once_and_an_interrupted_run_continues(run, teachers, parts, caplog):
    this = stage(run, seed=1)
    parts.end = 2
    with pytest.raises(KeyboardInterrupt):
        sequence.written(run, this, teachers)
    parts.end = None
    texts = sequence.written(run, this, teachers)
    assert parts == [16, 16, 8]  # none of them twice
    same(sequence.written(run, dataclasses.replace(this, steps=99), teachers), texts)
    same(sequence.written(run, stage(run, seed=1, prompts=8), teachers), part(texts, 16))
    assert parts == [16, 16, 8]
    assert len(texts.tokens) == 40 and all(len(row) for row in texts.tokens)
    assert (texts.prompts[0] == texts.prompts[1]).all()
    assert texts.tokens[0].tolist() != texts.tokens[1].tolist()
    assert {int(row[0]) for row in texts.prompts} == {run.task.end_of_text}
    entry = min(
        cache.entries(sequence._folder(run), "texts-*"),
        key=lambda entry: (entry / "counts.npy").stat().st_size,
    )
    (entry / "tokens.npy").write_bytes((entry / "tokens.npy").read_bytes()[:-4])
    with caplog.at_level(logging.WARNING):
        same(sequence.written(run, this, teachers), texts)
    assert "tokens.npy is damaged" in caplog.text and parts == [16, 16, 8, 8]


def test_equal_prompts_have_texts_of_their_own(run, teachers, monkeypatch):
    prompts = sequence.beginnings(run, stage(run), 8, "train")
    same = np.full_like(prompts.lengths_N, prompts.lengths_N.min())
    some = dataclasses.replace(prompts, starts_N=0 * same, lengths_N=same)
    monkeypatch.setattr(sequence, "beginnings", lambda *given: some)
    texts = sequence.written(run, stage(run, prompts=6), teachers)
    assert len({row.tobytes() for row in texts.prompts}) == 1
    assert len({row.tobytes() for row in texts.tokens}) == 12


def test_a_text_ends_before_an_id_that_the_tokenizer_lacks(tmp_path):
    def write(prompts, numbers):
        assert len({*numbers}) == 3
        return [
            Text(np.array(tokens, np.int32), True, np.zeros(len(tokens)))
            for tokens in ([4, 9, 1], [4, 12, 1], [10, 1])
        ]

    prompt = np.array([1, 5])
    writer = types.SimpleNamespace(write=write)
    sequence._write(lambda: writer, [(prompt, number) for number in range(3)], 10, tmp_path)
    tokens, counts, ended = (
        np.load(tmp_path / f"{name}.npy").tolist() for name in ("tokens", "counts", "ended")
    )
    assert (tokens, counts, ended) == ([4, 9, 1, 4], [3, 1, 0], [True, False, False])


def part(texts, count):
    return Texts(texts.prompts[:count], texts.tokens[:count], texts.ended_N[:count])


def test_other_settings_are_other_texts(run, teachers, parts):
    texts = sequence.written(run, stage(run), teachers)
    count = len(parts)
    for other in (dict(seed=3), dict(temperature=0.5)):
        found = sequence.written(run, stage(run, **other), teachers)
        assert [x.tolist() for x in found.tokens] != [x.tolist() for x in texts.tokens]
    assert len(parts) == 3 * count
    greedy = sequence.written(run, stage(run, temperature=0.0), teachers)
    assert [x.tolist() for x in greedy.tokens[::2]] == [x.tolist() for x in greedy.tokens[1::2]]


TEXTS = Texts(
    [np.array([1, 5, 6]), np.array([1, 7])],
    [np.array([8, 9, 1]), np.array([4])],
    np.array([True, False]),
)


def test_only_what_was_written_is_learned(run):
    batch = TEXTS.batch(np.array([1, 0]), 7)
    assert batch.tokens_BT.tolist() == [[1, 7, 0, 0, 0, 0, 0], [1, 5, 6, 8, 9, 0, 0]]
    assert batch.labels.tolist() == [[7, 4, 0, 0, 0, 0, 0], [5, 6, 8, 9, 1, 0, 0]]
    assert batch.weights.tolist() == [[0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]]
    assert batch.mask_BT.sum(axis=1).tolist() == [2, 5]
    stream = sequence._batches(run, stage(run), TeacherLogits(run, given_teachers(run)))[1]
    assert (
        stream[0].tokens_BT.shape
        == run.stage("sequence").step_inputs(run, run.stage("sequence")).batch.tokens_BT.shape
        == (16, 24)
    )


def test_short_texts_and_those_without_an_end_can_be_left_out(run):
    kept = lambda **own: sequence._kept(TEXTS, stage(run, **own)).tokens  # noqa: E731
    assert len(kept()) == 2
    for own in (dict(ended_only=True), dict(least_tokens=2)):
        assert [row.tolist() for row in kept(**own)] == [[8, 9, 1]]
    with pytest.raises(UserError, match="sequence: no text has 4 tokens and an end; raise max"):
        kept(least_tokens=4, ended_only=True)


@pytest.mark.parametrize(
    "own, says",
    [
        (dict(max_new_tokens=500), "are 508, but .* has positions for 32; lower one"),
        (dict(samples=2, temperature=0.0), "samples=2 texts would be the same: temperature=0"),
        (dict(top_p=0.0), "top_p=0.0"),
    ],
)
def test_mistakes(own, says, tmp_path):
    config = importlib.import_module("configs.sequence_stories").get_config("smoke")
    config.stages.sequence.update(own)
    with pytest.raises(UserError, match=says):
        build(config)
