import json
import math

import pytest

from kd_jax.errors import UserError
from kd_jax.recipes import export
from kd_jax.recipes.evaluate import Options, evaluate_checkpoint, evaluate_stage
from tests import smoke

FIGURES = ("loss", "perplexity", "accuracy", "kl", "agreement", "parameters", "size_mb")
NONE = Options()


@pytest.fixture(scope="module", autouse=True)
def caches():
    with smoke.private_caches():
        yield


@pytest.fixture(scope="module")
def run():
    return smoke.run("quickstart")


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
    found = evaluate_stage(str(run.folder), stage, "mlm", None, None, NONE)
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
    found = evaluate_stage(str(run.folder), "student", None, None, None, NONE)
    there = run.results["stages"]["student"]
    assert {k: found[k] for k in FIGURES} == {k: there[k] for k in FIGURES}


def test_export_and_checkpoint_agree_on_other_text(run, student, words):
    options = Options(seq_len=32, batch_size=8, precision="bf16")
    ours = evaluate_stage(str(run.folder), "student", None, words, None, options)
    theirs = evaluate_checkpoint(student, None, "mlm", words, options)
    assert ours["loss"] == theirs["loss"] and ours["accuracy"] == theirs["accuracy"]
    assert "kl" in ours and "kl" not in theirs  # the run has a teacher
    assert theirs["data"]["documents"] == ours["data"]["documents"] > 0
    assert theirs["data"]["name"].endswith("words.txt") and theirs["split"] == "test"
    assert theirs["perplexity"] == math.exp(theirs["loss"])


def test_beside_itself_there_is_no_divergence(student, words):
    found = evaluate_checkpoint(student, None, "mlm", words, Options(teacher=student))
    assert abs(found["kl"]) < 1e-6 and found["agreement"] == 1.0
    assert found["teacher"] == student
    assert (found["seq_len"], found["batch_size"], found["precision"]) == (32, 32, "fp32")


def test_another_teacher_than_the_run_had(run, student, words):
    options = Options(teacher=student)
    found = evaluate_stage(str(run.folder), "student", None, words, None, options)
    assert found["kl"] < 1e-3 < 1.0 == found["agreement"]


def test_needs_no_cache_of_the_training_text(run, words, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path))
    evaluate_stage(str(run.folder), "teacher", None, words, None, NONE)
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 1


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
    with pytest.raises(UserError, match="unknown tasks plug-in 'glue'; have: clm, mlm"):
        evaluate_checkpoint(student, None, "glue", words, NONE)
    with pytest.raises(UserError, match="bert has no head 'clm'; have: "):
        evaluate_checkpoint(student, None, "clm", words, NONE)
    with pytest.raises(UserError, match="--batch_size=12 cannot be divided among 8 devices"):
        evaluate_checkpoint(student, None, "mlm", words, Options(batch_size=12))
    with pytest.raises(UserError, match="eval.batch_size: 12 rows cannot be divided among 8"):
        evaluate_stage(str(run.folder), "student", None, None, None, Options(batch_size=12))
    with pytest.raises(UserError, match="--seq_len=64: the models have positions for 32 tokens"):
        evaluate_checkpoint(student, None, "mlm", words, Options(seq_len=64))
    with pytest.raises(UserError, match="nothing.txt"):
        evaluate_checkpoint(student, None, "mlm", str(tmp_path / "nothing.txt"), NONE)


def test_a_checkpoint_without_the_head(student, words, tmp_path):
    from kd_jax.models import family, hf

    source = student
    kind, config = family.read(hf.read_config(source))
    params = hf.load(source, kind, config, "mlm")
    params.pop("head")
    hf.save(tmp_path / "headless", params, kind, config, "none")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "headless" / name).write_bytes(
            (run_file := source + "/" + name) and open(run_file, "rb").read()
        )
    with pytest.raises(UserError, match="weights are not those of a bert with head 'mlm'"):
        evaluate_checkpoint(str(tmp_path / "headless"), None, "mlm", words, NONE)


def test_a_teacher_of_another_vocabulary(student, words, tmp_path):
    other = smoke.run("small_gpt2").folder / "export" / "student"
    with pytest.raises(UserError, match="has no head 'mlm'|has another tokenizer than the model"):
        evaluate_checkpoint(student, None, "mlm", words, Options(teacher=str(other)))
    assert export
