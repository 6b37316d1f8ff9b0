import copy
import json
import logging

import jax
import pytest
from transformers import PreTrainedTokenizerFast

from kd_jax.data import tokenizers as tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family
from kd_jax.models.blueprint import Blueprint
from kd_jax.recipes import export
from kd_jax.recipes.evaluate import Options, evaluate_checkpoint, evaluate_stage
from kd_jax.report import runs
from kd_jax.run import provenance
from tests import smoke
from tests.models import tiny
from tests.tasks import likelihood as scoring

pytestmark = pytest.mark.usefixtures("caches")

TEXT = "The man saw the dog .\n\nThe fox ran home to bed .\n\n" * 20


@pytest.fixture
def said(caplog):
    """The lines of the log."""
    caplog.set_level(logging.INFO, "kd_jax")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture(scope="module")
def beginning():
    """A tokenizer that begins texts with <s>, as Llama's does, and has </s> too."""
    plain = copy.deepcopy(scoring.tokenizer())  # other tests read with it
    plain.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    backend = plain.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", plain.bos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def words(tmp_path):
    (tmp_path / "words.txt").write_text(TEXT)
    return str(tmp_path / "words.txt")


def exported(folder, tokenizer, **task):
    """A random Llama as a run with this config.task exports it."""
    changes = {"vocab_size": len(tokenizer)}
    hf_json = tiny.CONFIGS["llama"] | changes
    kind, config = family.read(hf_json)
    params = jax.device_get(tiny.model("llama", "clm", **changes).params)
    model = Blueprint("tiny", kind, config, "clm", config.policy)
    data = {"train": {"path": "/home/me/secret/a.txt"}}
    results = {"data": {"train": {"name": "/home/me/secret/a.txt without 2%", "digest": "1f"}}}
    known = provenance.of_run({"task": task, "data": data}, results, tokenizer)
    page = lambda *_: ""  # noqa: E731
    export.publish(export.writer(model, params), tokenizer, folder, page, {"model": "tiny"}, known)
    return str(folder)


def loss(model, words, **options):
    found = evaluate_checkpoint(model, None, "clm", words, Options(batch_size=32, **options)).report
    return found["loss"], found["seq_len"], found["separator"]


def test_a_student_is_evaluated_on_rows_like_those_of_its_training(
    tmp_path, beginning, words, said
):
    model = exported(tmp_path / "bos", beginning, name="clm", seq_len=16, separator="bos")
    other = exported(tmp_path / "eos", beginning, name="clm", seq_len=16)
    kept = json.loads((tmp_path / "bos" / "kd_jax.json").read_text())
    assert kept.pop("digest") and kept == {
        "task": {"name": "clm", "seq_len": 16, "separator": "bos"},
        "data": {"train": {"name": "a.txt without 2%", "digest": "1f"}},
    }
    found, theirs = loss(model, words), loss(other, words)
    assert found[1:] == (16, "bos") and theirs[1:] == (16, "eos") and found[0] != theirs[0]
    assert "as in the model's training: name clm, seq_len 16, separator bos" in said()
    assert loss(model, words, separator="eos") == theirs  # a flag goes before what is recorded
    for folder in ("bos", "eos"):
        (tmp_path / folder / "kd_jax.json").unlink()
    assert loss(model, words, seq_len=16) == loss(other, words, seq_len=16) == found
    assert "documents are joined by <s>, with which the tokenizer begins texts" in said()


def test_an_export_gives_the_figures_of_its_run(words):
    run = smoke.run("small_gpt2")
    student = run.folder / "export" / "student"
    ours = evaluate_stage(
        str(run.folder), "student", None, words, None, Options(batch_size=64)
    ).report
    alone = evaluate_checkpoint(str(student), None, "clm", words, Options(batch_size=64)).report
    keys = ("seq_len", "separator", "data", "parameters")
    assert [ours[key] for key in keys] == [alone[key] for key in keys]
    task = json.loads((student / "kd_jax.json").read_text())["task"]
    assert task["seq_len"] == run.config.task.seq_len == alone["seq_len"]
    assert "Text became rows as `kd_jax.json` says: name clm" in (student / "README.md").read_text()


def test_perplexity_and_choices_begin_texts_as_in_training(tmp_path, beginning, words):
    model = exported(tmp_path / "eos", beginning, name="clm", seq_len=12)

    def tokens(task, **options):
        options = Options(batch_size=8, **options)
        found, report = evaluate_checkpoint(model, None, task, data[task], options)
        return found, report

    (tmp_path / "val.jsonl").write_text(json.dumps(scoring.swag()) + "\n")
    data = {"perplexity": words, "hellaswag": str(tmp_path / "val.jsonl")}
    for task in data:
        found, _ = tokens(task)
        changed, _ = tokens(task, separator="bos")
        stretches = found.task.rows._stretches.tokens_F, changed.task.rows._stretches.tokens_F
        assert [row[0] for row in stretches] == [beginning.eos_token_id, beginning.bos_token_id]
    assert tokens("perplexity")[1]["seq_len"] == 12
    assert tokens("perplexity", seq_len=16)[1]["seq_len"] == 16


def test_texts_begin_with_the_separator(beginning):
    ids = tokenizers.begun_by(beginning, "eos")("The man")["input_ids"]
    assert ids == [beginning.eos_token_id, *beginning("The man")["input_ids"][1:]]
    assert (
        tokenizers.begun_by(beginning, "bos") is tokenizers.begun_by(beginning, None) is beginning
    )
    assert beginning("The man")["input_ids"][0] == beginning.bos_token_id  # it is as it was


def test_training_with_ends_where_texts_have_beginnings_is_said(beginning, words, said, tmp_path):
    from kd_jax.tasks import clm

    data = {"train": {"path": words}, "held_out": 0.2, "cache_dir": str(tmp_path)}
    clm.make({"name": "clm", "seq_len": 8, "separator": "bos"}, data, beginning).prepare()
    assert "separator" not in said()
    clm.make({"name": "clm", "seq_len": 8}, data, beginning).prepare()
    assert "documents are joined by </s> (separator=eos), while the tokenizer begins" in said()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "kd_jax.json: damaged"),
        ("[]", "no object `task` in it"),
        ('{"task": {"name": "clmm"}}', "kd_jax.json: unknown tasks plug-in 'clmm'"),
        ('{"task": {"name": "clm", "length": 3}}', "kd_jax.json: unknown key config.task.length"),
        ('{"task": {"name": "clm", "seq_len": "8"}}', "kd_jax.json: config.task.seq_len='8'"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, content, message):
    (tmp_path / "kd_jax.json").write_text(content)
    with pytest.raises(UserError, match=message):
        provenance.read(tmp_path)


def test_real_stories_have_their_own_separator(stories_folder, data_folder, said):
    """1.93 nats a token; joined by </s>, which the model has never met, they have 2.32."""
    text = str(data_folder / "lm_text" / "tinystories_197k.txt")
    own = loss(str(stories_folder), text, seq_len=128)
    assert own[2] == "bos" and round(own[0], 2) == 1.93
    assert "--separator=eos or bos chooses" in said()
    assert round(loss(str(stories_folder), text, seq_len=128, separator="eos")[0], 2) == 2.32


def test_an_ensemble_names_its_members(tmp_path):
    (tmp_path / "export" / "member_1").mkdir(parents=True)
    (tmp_path / "export" / "member_1" / "model.safetensors").touch()
    error = runs.Run(tmp_path, {}, {}).no_stage("student", ())
    assert str(error) == (
        f"{tmp_path} has no stage 'student'; have: none; --model takes what it has exported: "
        f"{tmp_path}/export/member_1"
    )
