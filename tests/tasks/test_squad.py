import json

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from kd_jax import plugins
from kd_jax.data import tokenizers
from kd_jax.errors import UserError

WORDS = "red blue green black white pink grey gold".split()


def article(number, questions=3, impossible=()):
    """Two paragraphs with some questions each; those in `impossible` have no answer."""
    paragraphs = []
    for part in "ab":
        words = [f"{word}{number}" for word in WORDS] * 3
        context = f"In {part}{number}: " + " ".join(words)
        qas = []
        for i in range(questions):
            answer = f"{words[i]} {words[i + 1]}"
            found = {"answer_start": context.index(answer), "text": answer}
            key = f"{number}{part}{i}"
            qas.append({"id": key, "question": f"Which {i}?", "answers": [found]})
            if impossible:
                gone = i in impossible
                qas[-1] |= {"is_impossible": gone, "answers": [] if gone else [found]}
        paragraphs.append({"context": context, "qas": qas})
    return {"title": f"T{number}", "paragraphs": paragraphs}


def write(path, *articles):
    path.write_text(json.dumps({"version": "?", "data": articles}))
    return {"path": str(path)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [" ".join(f"{word}{i}" for word in WORDS) for i in range(9)] + ["Which one? In a b :"]
    return tokenizers.train_tokenizer("wordpiece", texts, 300, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def first(tmp_path):
    return {
        "train": write(tmp_path / "train.json", *map(article, range(6))),
        "test": write(tmp_path / "test.json", article(7)),
        "held_out": 0.3,
    }


@pytest.fixture
def second(tmp_path):
    articles = [article(i, impossible=(1,)) for i in range(6)]
    return {
        "train": write(tmp_path / "train2.json", *articles),
        "test": write(tmp_path / "test2.json", article(7, impossible=(0, 2))),
        "held_out": 0.3,
    }


def make(data, tokenizer=None, **keys):
    config = dict(name="squad", seq_len=32, doc_stride=6, max_question_length=6, **keys)
    return plugins.load("tasks", "squad", "make").make(config, data, tokenizer)


def outputs_of(task, split, null=0.0, seed=None):
    """Logits that choose the labels, with `null` added to [CLS]; noise where there is a seed."""
    rows, rng = task.rows(split), np.random.default_rng(seed)
    outputs = []
    for length, labels in zip(rows.lengths_N, rows.labels_NP, strict=True):
        logits = np.zeros((2, task.seq_len), np.float32)
        logits[[0, 1], labels] = 5
        logits[:, 0] += null
        if seed is not None:
            logits += rng.normal(size=logits.shape)
        logits[:, length:] = -1e9
        outputs.append(logits)
    return outputs


def test_no_context_is_on_both_sides(first):
    task = make(first)
    assert (task.head, task.labels, task.regression, task.primary) == ("span", (), False, "f1")
    counts = {split: found["examples"] for split, found in task.prepare().items()}
    assert counts == {"train": 24, "validation": 12, "test": 6}
    titles = [{q.title for q in task.examples(s).questions} for s in ("train", "validation")]
    assert not titles[0] & titles[1] and len(titles[1]) == 2
    assert len(task.texts("train")) == 48 and "Which 2?" in task.texts("train")


def test_one_article_is_held_out_by_paragraph(tmp_path):
    task = make({"train": write(tmp_path / "a.json", article(0))})
    contexts = [{q.context for q in task.examples(s).questions} for s in ("train", "validation")]
    assert [len(found) for found in contexts] == [1, 1] and not contexts[0] & contexts[1]


def test_articles_and_contexts_of_another_file_are_left_out(tmp_path, first):
    copied = article(2)
    copied["title"] = "another title"
    other = article(4)
    other["paragraphs"][0]["context"] += " changed"
    other["paragraphs"][1]["context"] += " changed"
    write(tmp_path / "other.json", copied, other)
    first["train"]["without"] = str(tmp_path / "other.json")
    whole = make(first)._whole("train")
    assert {q.title for q in whole.questions} == {"T0", "T1", "T3", "T5"}
    first["train"]["without"] = first["train"]["path"]
    with pytest.raises(UserError, match="train.json .* holds nothing that .*train.json lacks"):
        make(first)._whole("train")


def test_articles_that_may_be_shared(first, tmp_path):
    """Only the contexts of the other file are left out, whatever their articles."""
    whole = make(first)._whole("train").questions
    title, shared = whole[0].title, whole[0].context
    other = article(0)
    other["paragraphs"] = other["paragraphs"][:1]
    first["train"]["without"] = write(tmp_path / "other.json", other)["path"]
    first["train"]["same_articles"] = True
    kept = make(first)._whole("train").questions
    assert kept == [question for question in whole if question.context != shared]
    assert title in {question.title for question in kept} and len(kept) < len(whole)


def test_batches_have_the_shapes_that_are_promised(first, tokenizer):
    task = make(first, tokenizer)
    assert len(task.rows("train")) > len(task.examples("train"))
    batch = task.train(4, seed=0)[0]
    shapes = task.shapes(4, batch.tokens_BT.shape[1])
    assert jax.tree.structure(batch) == jax.tree.structure(shapes)
    for array, shape in zip(jax.tree.leaves(batch), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
    assert batch.labels.shape == (4, 2) and batch.types_BT is not None


def test_right_logits_give_right_answers(first, tokenizer):
    task = make(first, tokenizer)
    # [CLS] is the label of windows without the answer; it must not count as an answer.
    found = task.score("test", outputs_of(task, "test", null=50.0))
    assert found["exact_match"] == found["f1"] == 100.0
    assert list(found) == ["loss", "exact_match", "f1"] and set(found) > set(task.metrics)
    predictions = task.predictions("test", outputs_of(task, "test"))
    assert predictions["7a1"] == "blue7 green7" and list(predictions) == list(
        task.examples("test").golds
    )


def test_loss_is_the_cross_entropy_of_start_and_end(first, tokenizer):
    task = make(first, tokenizer)
    outputs = outputs_of(task, "test", seed=0)
    labels = task.rows("test").labels_NP
    want = np.mean(
        [
            -(log_softmax(o[0])[a] + log_softmax(o[1])[b]) / 2
            for o, (a, b) in zip(outputs, labels, strict=True)
        ]
    )
    assert task.score("test", outputs)["loss"] == pytest.approx(want, rel=1e-5)


def slow_best(task, split, outputs):
    """{id: (best score, null score)} by trying every span of every window."""
    made, found = task.rows(split), {}
    for row, logits in enumerate(outputs):
        key = task.examples(split).questions[made.question_N[row]].id
        tokens = range(made.first_N[row], made.first_N[row] + made.count_N[row])
        spans = [logits[0, s] + logits[1, e] for s in tokens for e in tokens if 0 <= e - s < 4]
        score, null = found.get(key, (-np.inf, np.inf))
        found[key] = max(score, *spans), min(null, logits[0, 0] + logits[1, 0])
    return found


def test_the_best_span_of_all_windows(second, tokenizer):
    task = make(second, tokenizer, max_answer_length=4, n_best=32, null_threshold=0.0)
    outputs = outputs_of(task, "test", seed=1)
    odds = {key: best.null_odds for key, best in task._best("test", outputs).items()}
    want = {key: null - best for key, (best, null) in slow_best(task, "test", outputs).items()}
    assert odds == pytest.approx(want, abs=1e-4)
    few = make(second, tokenizer, max_answer_length=1, n_best=1, null_threshold=0.0)
    assert all(few._best("test", outputs)[key].null_odds >= odds[key] for key in odds)
    texts = make(second, tokenizer, max_answer_length=1, best_non_null=True).predictions(
        "test", outputs
    )
    assert all(" " not in answer and answer for answer in texts.values())


def test_questions_without_an_answer(second, tokenizer):
    task = make(second, tokenizer, null_threshold=0.0)
    outputs = outputs_of(task, "test", null=4.0)
    found = task.score("test", outputs)
    for name in ("", "HasAns_", "NoAns_"):
        assert found[f"{name}exact_match"] == found[f"{name}f1"] == 100
    assert found["null_threshold"] == 0.0
    predictions = task.predictions("test", outputs)
    assert [predictions[f"7a{i}"] for i in range(3)] == ["", "blue7 green7", ""]
    never = make(second, tokenizer, null_threshold=-100)
    assert set(never.predictions("test", outputs).values()) == {""}
    assert never.score("test", outputs)["f1"] == pytest.approx(200 / 3)
    forced = make(second, tokenizer, best_non_null=True)
    assert all(forced.predictions("test", outputs).values())
    found = forced.score("test", outputs)
    assert (found["HasAns_f1"], found["NoAns_f1"]) == (100, 0) and "null_threshold" not in found


def test_a_manifest_counts_windows_and_questions_without_an_answer(second, tokenizer):
    task = make(second, tokenizer)
    found = task.prepare()["test"]
    answers = [bool(question.answers) for question in task.examples("test").questions]
    classes = {"answerable": sum(answers), "unanswerable": len(answers) - sum(answers)}
    assert found["classes"] == classes and min(classes.values()) > 0
    assert found["rows"] == len(task.rows("test")) and found["longest"] > 0


def test_the_threshold_is_tuned_on_held_out_questions(second, tokenizer):
    task = make(second, tokenizer)
    held = outputs_of(task, "validation", null=-20.0)  # with 0, every question is answered
    found = task.score("validation", held)
    assert found["f1"] == 100
    tuned = task.tuned(held)
    assert tuned.threshold == found["null_threshold"] and task.threshold is None
    outputs = outputs_of(task, "test", null=-20.0)
    assert tuned.score("test", outputs)["f1"] == 100
    fixed = make(second, tokenizer, null_threshold=0.0)
    assert fixed.score("test", outputs)["NoAns_f1"] == 0 and fixed.tuned(held) is fixed
    with pytest.raises(UserError, match="config.task.null_threshold is not set: tune it on the"):
        task.score("test", outputs)


def test_v1_needs_no_threshold(first, tokenizer):
    task = make(first, tokenizer)
    assert task.tuned(outputs_of(task, "validation")) is task


def test_predictions_of_another_system_score_the_same(second, tokenizer, tmp_path):
    task = make(second, tokenizer, null_threshold=0.0)
    outputs = outputs_of(task, "test", seed=3)
    path = str(tmp_path / "p.json")
    task.write_submission("test", outputs, path)
    read = task.read_predictions("test", path)
    assert (
        read == task.predictions("test", outputs) == json.loads((tmp_path / "p.json").read_text())
    )
    scored = task.score("test", outputs)
    assert task.score_predictions("test", read).items() <= scored.items()


@pytest.mark.parametrize(
    "content, message",
    [
        ("[", "cannot be read as JSON"),
        ('["7a0"]', "must be an object of question ids and texts"),
        ('{"7a0": "x", "7a0": "y"}', "question '7a0' is there twice"),
        ('{"8a0": "x"}', "test.json has no question '8a0'"),
        ('{"7a0": 3}', "question '7a0': 3 is no text"),
        ('{"7a0": "x"}', "lacks 5 of 6 questions: '7a1'"),
    ],
)
def test_broken_files_of_predictions(first, tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises(UserError, match=f"p.json.*{message}"):
        make(first).read_predictions("test", str(tmp_path / "p.json"))


def test_another_tokenizer_has_windows_of_its_own(first, tokenizer, tmp_path):
    task = make(first, tokenizer)
    want = task.score("test", outputs_of(task, "test"))
    single = tokenizers.train_tokenizer(
        "wordpiece", ["red blue Which one? :0123456789 "], 60, tmp_path
    )
    other = task.with_tokenizer(single)
    assert len(other.rows("test")) > len(task.rows("test"))
    assert other.examples("test") is task.examples("test")
    assert task.score("test", outputs_of(task, "test")) == want


def test_mistakes(first):
    with pytest.raises(UserError, match="config.task.n_best=0 must be at least 1"):
        make(first, n_best=0)
    with pytest.raises(UserError, match="config.task.null_threshold='0' should be a number"):
        make(first, null_threshold="0")
    with pytest.raises(UserError, match="unknown key config.data.test.wihtout"):
        make({"test": {"path": "x", "wihtout": "y"}}).examples("test")
    with pytest.raises(UserError, match="none.json does not exist"):
        make({"test": {"path": "none.json"}}).examples("test")


@pytest.mark.parametrize(
    "name, count, none", [("xquad.en", 1_190, 0), ("cs224n-dev-v2.0", 6_078, 3_168)]
)
def test_the_real_files(data_folder, name, count, none):
    task = make({"test": {"path": str(data_folder / "squad" / f"{name}.json")}})
    assert task.prepare()["test"]["examples"] == count
    golds = task.examples("test").golds
    assert sum(not answers for answers in golds.values()) == none
    perfect = {
        key: max(answers, key=len, default="") for key, answers in golds.items()
    }  # one is "A"
    found = task.score_predictions("test", perfect)
    assert set(found.values()) == {100.0} and ("NoAns_f1" in found) == (none > 0)


def test_real_windows_hold_their_answers(data_folder):
    tokenizer = tokenizers.load_tokenizer(data_folder / "tokenizers" / "bert-base-uncased")
    data = {"train": {"path": str(data_folder / "squad" / "xquad.en.json")}, "held_out": 0.1}
    config = dict(name="squad", seq_len=128, doc_stride=32, max_question_length=48)
    task = plugins.load("tasks", "squad", "make").make(config, data, tokenizer)
    found = task.score("validation", outputs_of(task, "validation"))
    assert found["exact_match"] > 99 and found["f1"] > 99.5  # all but answers of over 30 tokens
