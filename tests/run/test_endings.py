"""The tokens that end what a model writes."""

import json
import types

import pytest

from kd_jax.errors import UserError
from kd_jax.run import endings
from kd_jax.tasks import chat
from tests.tasks import chats


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chats.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def run(tokenizer, folder, stop=(), init="model", **ends):
    """A run whose models declare `ends`, by name; in files next to their weights."""
    models = {}
    for name in ("teacher", "student"):
        place = folder / name
        place.mkdir(exist_ok=True)
        if name in ends:
            (place / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[name]}))
        config = types.SimpleNamespace(vocab_size=len(tokenizer))
        models[name] = types.SimpleNamespace(name=name, folder=place, config=config)
    task = chat.make({"name": "chat"}, {}, tokenizer)
    return types.SimpleNamespace(
        models=models,
        task=task,
        tokenizers=dict.fromkeys(models, tokenizer),
        config=types.SimpleNamespace(rollout=types.SimpleNamespace(stop=stop)),
        section=lambda model: types.SimpleNamespace(init=init),
        trained={"student"},
    )


def test_turns_end_as_in_the_template_and_as_the_model_declares(tokenizer, tmp_path):
    end = chat.make({"name": "chat"}, {}, tokenizer).end_of_text
    assert tokenizer.convert_ids_to_tokens(end) in tokenizer.chat_template
    other = next(number for number in range(len(tokenizer)) if number != end)
    found = run(tokenizer, tmp_path, teacher=[other, end], student=other)
    assert endings.of(found, "student", "teacher") == tuple(sorted({end, other}))


def test_a_teacher_that_ends_turns_otherwise_is_refused(tokenizer, tmp_path):
    end = chat.make({"name": "chat"}, {}, tokenizer).end_of_text
    other = next(number for number in range(len(tokenizer)) if number != end)
    with pytest.raises(UserError, match="ends a turn with .* never to stop.*rollout.stop"):
        endings.of(run(tokenizer, tmp_path, teacher=other), "student", "teacher")
    found = run(tokenizer, tmp_path, teacher=other)
    found.trained.add("teacher")  # on this template
    assert endings.of(found, "student", "teacher") == (end,)
    name = tokenizer.convert_ids_to_tokens(other)
    found = run(tokenizer, tmp_path, stop=(name,), teacher=other)
    assert endings.of(found, "student", "teacher") == tuple(sorted({end, other}))


def test_a_student_that_never_saw_the_template(tokenizer, tmp_path, caplog):
    found = run(tokenizer, tmp_path)
    endings.warn_of_new_template(found, "student", follows="")
    assert "student comes without a chat template" in caplog.text
    caplog.clear()
    endings.warn_of_new_template(found, "student", follows="warm")
    (tmp_path / "student" / "chat_template.jinja").write_text("{{ messages }}")
    endings.warn_of_new_template(found, "student", follows="")
    assert not caplog.text
    endings.warn_of_new_template(run(tokenizer, tmp_path, init="scratch"), "student", follows="")
    assert "student begins as random numbers" in caplog.text
