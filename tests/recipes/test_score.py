"""Scores against PyTorch: a random GPT-2 on made-up questions, stories260K on real ones."""

import itertools
import json
import math

import jax
import numpy as np
import pytest

from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.recipes.evaluate import Options, evaluate_checkpoint, evaluate_run, evaluate_stage
from tests import smoke
from tests.models import tiny
from tests.tasks.likelihood import book, swag, tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tests.recipes import pytorch_scores  # noqa: E402

TEXT = "The man saw the dog . The fox ran home to bed , and sat again .\n\n" * 9


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Programs are compiled once. One thread is quickest for PyTorch on single short texts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with smoke.private_caches():
        yield
    torch.set_num_threads(threads)


def save(folder, seed):
    """A random GPT-2 of 40 positions, with its tokenizer, as an HF checkpoint."""
    changes = {"vocab_size": len(tokenizer())}
    kind, config = family.read(tiny.CONFIGS["gpt2"] | changes)
    model = tiny.model("gpt2", "clm", seed=seed, **changes)
    hf.save(folder, jax.device_get(model.params), kind, config, "clm")
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = save(tmp_path_factory.mktemp("gpt2"), 0)
    return folder, transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [
        swag(),
        swag(ctx_a="The man ran home. " * 9, label=0),  # does not fit
        swag(ctx_b="", endings=["sat", "ran home again, quickly. " * 2, "a hen", "the fox"]),
        swag(activity_label="Dog", endings=["a", "b", "to [title] bed", "man man man"], label=1),
    ] * 5
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    examples = [book(), book(("a", "man", "bed", "dog"), "bed", "The man saw the XXXXX .")]
    (folder / "cbtest_CN_test.txt").write_text("".join(examples) * 3)
    (folder / "text.txt").write_text(TEXT)
    return folder


def check_choices(found, report, values, acc, acc_norm=None):
    np.testing.assert_allclose(found.log_likelihoods_N, values, atol=1e-3)
    assert report["acc"] == acc and report.get("acc_norm") == acc_norm
    assert report["endings"] == len(values) and report["left_out"] == 0


def test_hellaswag(gpt2, files):
    folder, theirs = gpt2
    found, report = evaluate_checkpoint(
        str(folder), None, "hellaswag", str(files / "val.jsonl"), Options(batch_size=32)
    )
    values, *shares = pytorch_scores.hellaswag(theirs, tokenizer(), files / "val.jsonl", 40)
    check_choices(found, report, values, *shares)
    assert 0 < report["truncated"] < report["endings"] == 80
    assert (report["task"], report["precision"]) == ("hellaswag", "fp32")
    assert json.loads(json.dumps(report)) == report


def test_cbt_with_a_shorter_context(gpt2, files, tmp_path):
    folder, theirs = gpt2
    options = Options(seq_len=24, batch_size=8)
    found, report = evaluate_checkpoint(str(folder), None, "cbt/CN", str(files), options)
    values, acc = pytorch_scores.cbt(theirs, tokenizer(), files / "cbtest_CN_test.txt", 24)
    check_choices(found, report, values, acc)
    assert report["truncated"] == len(values)
    found.write(tmp_path / "new")
    written = (tmp_path / "new" / "likelihoods.jsonl").read_text()
    lines = [json.loads(line) for line in written.splitlines()]
    assert [line["log_likelihood"] for line in lines] == found.log_likelihoods_N.tolist()
    assert lines[4]["text"] == "The man saw the man ." and lines[4]["question"] == 1


@pytest.mark.parametrize(("window", "stride"), [(40, 40), (16, 5)])
def test_perplexity(gpt2, files, window, stride):
    folder, theirs = gpt2
    options = Options(seq_len=window, stride=stride)
    _, report = evaluate_checkpoint(
        str(folder), None, "perplexity", str(files / "text.txt"), options
    )
    ids = tokenizer().encode(TEXT)
    total, tokens = pytorch_scores.nats(theirs, ids, window, stride)
    assert report["tokens"] == tokens
    assert report["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert report["word_perplexity"] == pytest.approx(math.exp(total / len(TEXT.split())), rel=1e-3)


def test_documents_alone(gpt2, files):
    folder, theirs = gpt2
    options = Options(stride=40, documents="alone")
    _, report = evaluate_checkpoint(
        str(folder), None, "perplexity", str(files / "text.txt"), options
    )
    end = tokenizer().eos_token_id
    texts = TEXT.strip().split("\n\n")
    sums = [pytorch_scores.nats(theirs, [end, *tokenizer().encode(text)], 40, 40) for text in texts]
    total, tokens = map(sum, zip(*sums, strict=True))
    assert report["tokens"] == tokens
    assert report["loss"] == pytest.approx(total / tokens, abs=1e-4)


def test_beside_the_original(gpt2, files, tmp_path):
    data, options = str(files / "val.jsonl"), Options(batch_size=32)
    original, _ = evaluate_checkpoint(str(gpt2[0]), None, "hellaswag", data, options)
    changed, _ = evaluate_checkpoint(str(save(tmp_path, 1)), None, "hellaswag", data, options)
    found = changed.compared_with(original)
    differences = np.abs(changed.log_likelihoods_N - original.log_likelihoods_N)
    assert found["mean_difference"] == pytest.approx(differences.mean()) and differences.any()
    assert found["acc_retention"] is None or found["acc_retention"] >= 0
    assert original.compared_with(original)["mean_difference"] == 0.0


def test_a_stage_of_a_run(files, tmp_path):
    run = smoke.run("small_gpt2")
    text = str(files / "text.txt")
    options = Options(stride=8, batch_size=16, precision="fp32")
    report = evaluate_stage(str(run.folder), "student", "perplexity", text, None, options)[1]
    export = str(run.folder / "export" / "student")
    same = evaluate_checkpoint(export, None, "perplexity", text, options)[1]
    keys = set(same) - {"model", "commit", "seconds"}
    assert {key: report[key] for key in keys} == {key: same[key] for key in keys}
    assert report["stage"] == "student"
    every = evaluate_run(str(run.folder), "perplexity", text, options)
    assert list(every) == ["teacher", "baseline", "student"]
    assert "beside_teacher" not in every["teacher"][1]
    assert {key: every["student"][1][key] for key in keys} == {key: same[key] for key in keys}
    made, beside = every["student"][0], every["student"][1]["beside_teacher"]
    assert beside == made.compared_with(every["teacher"][0]) and beside["mean_difference"] > 0
    with pytest.raises(UserError, match="has no stage 'pupil'; have: teacher, "):
        evaluate_stage(str(run.folder), "pupil", "perplexity", text, None, options)
    (tmp_path / "config.json").write_text('{"task": {"name": "mlm"}}')
    (tmp_path / "results.json").write_text('{"config": "", "seed": 0, "stages": {}}')
    with pytest.raises(UserError, match="is a run of task 'mlm', whose models are not causal"):
        evaluate_stage(str(tmp_path), "student", "perplexity", text, None, options)


def test_mistakes(gpt2, files):
    def run(task, **options):
        data = str(files / "val.jsonl")
        evaluate_checkpoint(str(gpt2[0]), None, task, data, Options(**options))

    with pytest.raises(UserError, match="--task=swag: no such task .did you mean hellaswag"):
        run("swag")
    for task in ("hellaswag/x", "perplexity/y"):
        with pytest.raises(UserError, match=f"--task={task}: no such task.*have: agnews"):
            run(task)
    with pytest.raises(UserError, match="--task=cbt/XX: no such task .*; have: cbt/CN, cbt/NE"):
        run("cbt/XX")
    with pytest.raises(UserError, match="--seq_len=41: there are positions for 40 tokens"):
        run("hellaswag", seq_len=41)
    with pytest.raises(UserError, match="--batch_size=12 cannot be divided among 8 devices"):
        run("hellaswag", batch_size=12)
    with pytest.raises(UserError, match="unknown key config.task.stride"):
        run("hellaswag", stride=2)


@pytest.fixture(scope="module")
def stories(stories_folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(stories_folder).eval()
    return str(stories_folder), theirs, transformers.AutoTokenizer.from_pretrained(stories_folder)


def test_a_real_model_on_hellaswag(stories, data_folder, tmp_path):
    folder, theirs, its_tokenizer = stories
    file = tmp_path / "val.jsonl"
    with (data_folder / "hellaswag" / "hellaswag_val_1000.jsonl").open() as rows:
        file.write_text("".join(itertools.islice(rows, 0, 300, 20)))
    found, report = evaluate_checkpoint(folder, None, "hellaswag", str(file), Options(seq_len=200))
    values, *shares = pytorch_scores.hellaswag(theirs, its_tokenizer, file, 200)
    check_choices(found, report, values, *shares)
    assert report["questions"] == 15 and report["truncated"] > 0


def test_a_real_model_on_cbt(stories, data_folder):
    folder, theirs, its_tokenizer = stories
    options = Options(seq_len=256)
    found, report = evaluate_checkpoint(folder, None, "cbt", str(data_folder / "cbt"), options)
    files = sorted((data_folder / "cbt").glob("*_test_*"))
    every = [pytorch_scores.cbt(theirs, its_tokenizer, file, 256) for file in files]
    values = [value for values, _ in every for value in values]
    check_choices(found, report, values, np.mean([acc for _, acc in every]))
    assert [found["acc"] for found in report["groups"].values()] == [acc for _, acc in every]


@pytest.mark.parametrize("stride", [128, 50])
def test_a_real_model_on_text(stories, data_folder, tmp_path, stride):
    folder, theirs, its_tokenizer = stories
    whole = (data_folder / "lm_text" / "tinystories_197k.txt").read_text(encoding="utf-8")[:4000]
    file = tmp_path / "stories.txt"
    file.write_text(whole, encoding="utf-8")
    options = Options(seq_len=128, stride=stride)
    _, report = evaluate_checkpoint(folder, None, "perplexity", str(file), options)
    total, tokens = pytorch_scores.nats(theirs, its_tokenizer.encode(whole), 128, stride)
    assert report["tokens"] == tokens > 1000
    assert report["loss"] == pytest.approx(total / tokens, abs=1e-4)
    assert report["word_perplexity"] == pytest.approx(
        math.exp(total / len(whole.split())), rel=1e-3
    )
