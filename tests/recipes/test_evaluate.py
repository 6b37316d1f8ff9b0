import json
import math
import shutil

import pytest

from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.recipes.evaluate import Options, evaluate_checkpoint, evaluate_stage
from tests import smoke
from tests.run.test_models import save_with_other_rules

pytestmark = pytest.mark.usefixtures("caches")

FIGURES = ("loss", "perplexity", "accuracy", "kl", "agreement", "parameters", "size_mb")
NONE = Options()


@pytest.fixture(scope="module")
def run():
    return smoke.run("masked")


@pytest.fixture(scope="module")
def student(run):
    return str(run.folder / "export" / "student")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("The value of an expression is an object. Names refer to objects.\n" * 40)
    return str(file)


@pytest.mark.parametrize("stage", ["teacher", "baseline", "student"])
def test_a_stage_gives_the_figures_of_the_run(run, stage):
    found = evaluate_stage(str(run.folder), stage, "mlm", None, None, NONE).report
    there = run.results["stages"][stage]
    assert {k: found[k] for k in FIGURES if k in found} == {
        k: there[k] for k in FIGURES if k in there
    }
    assert ("kl" in found) == (stage != "teacher")
    assert (found["stage"], found["task"], found["split"]) == (stage, "mlm", "validation")
    assert found["data"] == run.results["data"]["validation"]
    assert json.loads(json.dumps(found)) == found


def test_a_causal_model_too():
    run = smoke.run("small_gpt2")
    found = evaluate_stage(str(run.folder), "student", None, None, None, NONE).report
    there = run.results["stages"]["student"]
    assert {k: found[k] for k in FIGURES} == {k: there[k] for k in FIGURES}


def test_export_and_checkpoint_agree_on_other_text(run, student, words):
    options = Options(teacher=student, seq_len=32, batch_size=8, precision="bf16")
    ours = evaluate_stage(str(run.folder), "baseline", None, words, None, options).report
    theirs = evaluate_stage(str(run.folder), "student", None, words, None, options).report
    export = evaluate_checkpoint(student, None, "mlm", words, options).report
    stated = {key for key in export if key not in ("model", "commit", "seconds")}
    assert {key: theirs[key] for key in stated} == {key: export[key] for key in stated}
    assert export["data"]["name"].endswith("words.txt") and export["split"] == "test"
    assert ours["kl"] > 1e-6 > export["kl"] and export["agreement"] == 1.0
    assert export["perplexity"] == math.exp(export["loss"])


def test_defaults_of_a_checkpoint(student, words):
    found = evaluate_checkpoint(student, None, "mlm", words, NONE).report
    assert (found["seq_len"], found["batch_size"], found["precision"]) == (32, 32, "fp32")
    assert found["teacher"] is None and "kl" not in found


def test_needs_no_cache_of_the_training_text(run, words, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path))
    evaluate_stage(str(run.folder), "teacher", None, words, None, NONE)
    assert len(list(tmp_path.glob("tokens-*/tokens.npy"))) == 1


def test_mistakes(run, student, words, tmp_path):
    with pytest.raises(UserError, match="has no stage 'pupil'; have: teacher, baseline, student"):
        evaluate_stage(str(run.folder), "pupil", None, None, None, NONE)
    with pytest.raises(UserError, match="is a run of task 'mlm', not 'clm'"):
        evaluate_stage(str(run.folder), "student", "clm", None, None, NONE)
    with pytest.raises(UserError, match="has no split 'test'; have: train, validation"):
        evaluate_stage(str(run.folder), "student", None, None, "test", NONE)
    with pytest.raises(UserError, match="not finished"):
        (tmp_path / "config.json").write_text("{}")
        evaluate_stage(str(tmp_path), "student", None, None, None, NONE)
    with pytest.raises(UserError, match="--task=mlmm: no such task .did you mean mlm"):
        evaluate_checkpoint(student, None, "mlmm", words, NONE)
    with pytest.raises(UserError, match="bert has no head 'clm'; have: "):
        evaluate_checkpoint(student, None, "clm", words, NONE)
    with pytest.raises(UserError, match="--batch_size=12 cannot be divided among 8 devices"):
        evaluate_checkpoint(student, None, "mlm", words, Options(batch_size=12))
    with pytest.raises(UserError, match="--batch_size=12 cannot be divided among 8 devices"):
        evaluate_stage(str(run.folder), "student", None, None, None, Options(batch_size=12))
    with pytest.raises(UserError, match="--seq_len=64: there are positions for 32 tokens"):
        evaluate_checkpoint(student, None, "mlm", words, Options(seq_len=64))
    with pytest.raises(UserError, match="nothing.txt"):
        evaluate_checkpoint(student, None, "mlm", str(tmp_path / "nothing.txt"), NONE)


def test_a_checkpoint_without_the_head(student, words, tmp_path):
    copy = shutil.copytree(student, tmp_path / "headless")
    kind, config = family.read(hf.read_config(copy))
    backbone = hf.load(copy, kind, config, "mlm")["backbone"]
    hf.save(copy, {"backbone": backbone}, kind, config, "none")
    with pytest.raises(UserError, match="weights are not those of a bert with head 'mlm'"):
        evaluate_checkpoint(str(copy), None, "mlm", words, NONE)


def test_a_teacher_with_another_tokenizer(student, words, tmp_path):
    teacher = shutil.copytree(student, tmp_path / "teacher")
    (teacher / "tokenizer.json").unlink()
    tokenizers.train_tokenizer("wordpiece", ["other words altogether"], 80, teacher)
    with pytest.raises(UserError, match="--teacher=.*teacher has another tokenizer than the model"):
        evaluate_checkpoint(student, None, "mlm", words, Options(teacher=str(teacher)))


def test_a_teacher_whose_tokenizer_has_other_rules_is_said(student, words, tmp_path, caplog):
    teacher = shutil.copytree(student, tmp_path / "teacher")
    tokenizer = tokenizers.load_tokenizer(teacher)
    (teacher / "tokenizer.json").unlink()
    save_with_other_rules(tokenizer, teacher)
    evaluate_checkpoint(student, None, "mlm", words, Options(teacher=str(student)))
    assert "cut otherwise" not in caplog.text
    evaluate_checkpoint(student, None, "mlm", words, Options(teacher=str(teacher)))
    assert f"--teacher={teacher} was trained on texts that its tokenizer cut oth" in caplog.text
