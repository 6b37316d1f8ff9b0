"""Texts written after files of prompts and chats."""

import json

import jax
import numpy as np
import pytest

from kd_jax import api, storage
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.models.generate import Sampling, generate
from kd_jax.precision import Policy
from kd_jax.recipes import generate as recipe
from kd_jax.recipes.generate import Options
from kd_jax.run.sampler import TextWriter
from tests.models import tiny
from tests.tasks import chats

pytestmark = pytest.mark.usefixtures("caches")

WORDS = "the little red house is small and the big one is red".split()
TEXTS = [" ".join(WORDS[: 1 + i % 11]) + f" {i}" for i in range(20)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random Llama with a chat template, whose answers end now and then."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = chats.tokenizer(folder)
    tokenizers.save_tokenizer(tokenizer, folder)
    described = tiny.CONFIGS["llama"] | dict(vocab_size=len(tokenizer), initializer_range=0.5)
    described |= dict(max_position_embeddings=128)
    kind, config = family.read(described)
    hf.save(folder, family.build(kind, config, "clm", Policy(), jax.random.key(3)).params, kind,
            config, "clm")  # fmt: skip
    return str(folder)


@pytest.fixture(scope="module")
def own(model):
    return recipe.checkpoint(model, None, None)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_texts_stand_in_the_order_of_the_prompts(own, tmp_path):
    source, target = tmp_path / "prompts.txt", tmp_path / "new" / "out.jsonl"
    source.write_text("\n".join(TEXTS))
    done = recipe.generate_file(lambda: own, str(source), str(target), Options(max_new_tokens=6))
    assert done["rows"] == len(TEXTS) and list(target.parent.iterdir()) == [target]
    tokenizer = own[0].tokenizer
    prompts = tokenizer(TEXTS)["input_ids"]
    sampling = Sampling(6, stop=(tokenizer.eos_token_id,))
    subject = own[0].described.abstract().replace(params=own[0].params)
    found = lines(target)
    wanted = generate(jax.tree.map(np.asarray, subject), prompts, sampling)
    for index, (row, prompt, tokens_N) in enumerate(zip(found, prompts, wanted, strict=True)):
        text = tokenizer.decode([*prompt, *tokens_N], skip_special_tokens=True)
        assert TEXTS[index] + row["text"] == text and row["index"] == index
        assert row["tokens"] == len(tokens_N) and row["logp"] < 0
        assert row["ended"] == (tokens_N[-1] == tokenizer.eos_token_id)


def test_an_end_in_the_first_prompt_is_no_reason_to_cut_the_others(own, tmp_path):
    tokenizer, source = own[0].tokenizer, tmp_path / "prompts.txt"
    lines = [f"the red {tokenizer.eos_token}", "the little red"]
    source.write_text("\n".join(lines))
    found = recipe._read(source, own[0], Options(), own[1])
    wanted = [tokenizer(line)["input_ids"] for line in lines]
    assert [row.tolist() for row in found.tokens] == wanted
    assert wanted[0][-1] == tokenizer.eos_token_id


def test_an_interrupted_command_continues(own, tmp_path, monkeypatch):
    """In the middle, and within a line; other settings begin anew."""
    source = tmp_path / "prompts.jsonl"
    write(source, [{"id": f"n{i}", "prompt": text} for i, text in enumerate(TEXTS)])
    options = Options(text="prompt", max_new_tokens=5, temperature=1.0, samples=3, batch_size=8)
    options_of = lambda name: (lambda: own, str(source), str(tmp_path / name), options)  # noqa: E731
    recipe.generate_file(*options_of("whole.jsonl"))
    monkeypatch.setattr(recipe, "AT_ONCE", 1)
    write_all, parts = TextWriter.write, []

    def until_the_third(self, prompts, numbers):
        parts.append(numbers)
        if len(parts) == 3:
            raise KeyboardInterrupt
        return write_all(self, prompts, numbers)

    monkeypatch.setattr(TextWriter, "write", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        recipe.generate_file(*options_of("out.jsonl"))
    target, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    assert not target.exists()
    partial.write_bytes(partial.read_bytes()[:-7])
    recipe.generate_file(*options_of("out.jsonl"))
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not partial.exists() and parts[3][0] == 15  # 18 texts were there, the last one cut
    found = lines(target)
    assert [(row["id"], row["sample"]) for row in found[:4]] == [
        *(("n0", sample) for sample in range(3)),
        ("n1", 0),
    ]
    assert len({row["text"] for row in found[:3]}) > 1


def test_lines_of_another_command_are_not_continued(tmp_path):
    for about, kept in (({"seed": 0}, 0), ({"seed": 0}, 2), ({"seed": 1}, 0)):
        found = storage.Lines(tmp_path / "a.jsonl", about)
        assert found.count == kept
        if not kept:
            found.append([1, 2])


def test_chats_are_asked_as_the_template_does(own, tmp_path):
    said = [chats.conversation("is it red?", "yes", "why?"), chats.conversation("is it?", "no")]
    source, target = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    write(source, [{"messages": messages} for messages in said])
    found = recipe._read(source, own[0], Options(), {})
    tokenizer = own[0].tokenizer
    asked = dict(add_generation_prompt=True, return_dict=False)
    wanted = [tokenizer.apply_chat_template(row, **asked) for row in (said[0], said[1][:1])]
    assert [row.tolist() for row in found.tokens] == wanted
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in found.stop
    recipe.generate_file(lambda: own, str(source), str(target), Options(max_new_tokens=4))
    assert [row["index"] for row in lines(target)] == [0, 1]


@pytest.mark.parametrize(
    "rows, changes, says",
    [
        ([{"text": "a"}, {"text": " "}], {}, "line 2: the text is empty"),
        ([{"prompt": "a"}], {}, "no column 'text'; set --text to one of: prompt"),
        ([{"messages": [{"role": "assistant", "content": "a"}]}], {}, "no message before the assi"),
        ([{"messages": "a"}], {}, "line 1: 'a' is no list of messages"),
        ([{"text": "a " * 200}], {}, "line 1: the prompt has .* tokens, and --max_new_tokens=128"),
        ([{"text": "a"}], {"samples": 2}, "--samples=2 of a prompt would be the same"),
        ([{"text": "a"}], {"temperature": -1.0}, "--temperature=-1.0"),
        ([{"text": "a"}], {"text": "a", "messages": "b"}, "--text and --messages: give one"),
        ([{"text": "a"}], {"samples": 0}, "--samples=0 must be at least 1"),
        ([{"text": "a"}], {"seed": -1}, "--seed=-1 must be at least 0 and at most 4294967295"),
        ([{"text": "a"}], {"batch_size": 3}, "--batch_size=3 cannot be divided among 8 devices"),
    ],
)
def test_mistakes(own, rows, changes, says, tmp_path):
    source = write(tmp_path / "in.jsonl", rows)
    with pytest.raises(UserError, match=says):
        recipe.generate_file(lambda: own, source, str(tmp_path / "out.jsonl"), Options(**changes))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_texts_from_python(model, own, tmp_path):
    source = write(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS[:2]])
    recipe.generate_file(
        lambda: own, source, str(tmp_path / "out.jsonl"), Options(max_new_tokens=4)
    )
    found = api.load(model).generate(TEXTS[:2], max_new_tokens=4)
    assert found == lines(tmp_path / "out.jsonl") and len(found) == 2


def test_a_line_without_its_end_is_made_again(tmp_path):
    found = storage.Lines(tmp_path / "a.jsonl", {})
    found.append([1, 23])
    for cut in (1, 2):  # what is left of the last line is a number as well
        found.partial.write_bytes(found.partial.read_bytes()[:-cut])
        found = storage.Lines(tmp_path / "a.jsonl", {})
        assert found.count == 1
        found.append([23])
    assert found.finish() is None and (tmp_path / "a.jsonl").read_text() == "1\n23\n"
