"""Text embedding: what is read, the rows, batches of whole examples, and figures from vectors."""

import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from kd_jax import smoke
from kd_jax.data import source, tokenizers
from kd_jax.data.loader import lengths_of
from kd_jax.data.source import Documents
from kd_jax.errors import UserError
from kd_jax.metrics import embedding as metrics
from kd_jax.tasks import command, embedding

WORDS = "red blue green black white pink grey gold".split()
_SOME = [" ".join(WORDS[(i + j) % 8] for j in range(1 + i % 9)) + f" {i % 20}" for i in range(40)]
TEXTS = _SOME + _SOME[:5]
STS = [{"sentence1": TEXTS[i], "sentence2": TEXTS[-i - 1], "score": i % 6} for i in range(12)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizers.train_tokenizer("wordpiece", TEXTS, 120, tmp_path_factory.mktemp("tokenizer"))


def write(path, rows):
    lines = rows if isinstance(rows[0], str) else map(json.dumps, rows)
    path.write_text("\n".join(lines) + "\n")
    return {"path": str(path)}


def of_columns(count, rows=45):
    """Rows of so many texts, called a, b, c, ..."""
    return [{"abcd"[k]: TEXTS[(i * (k + 1) + k) % 45] for k in range(count)} for i in range(rows)]


@pytest.fixture
def data(tmp_path):
    return {
        "train": write(tmp_path / "train.txt", TEXTS),
        "validation": write(tmp_path / "sts.jsonl", STS),
        "test": write(tmp_path / "test.jsonl", STS[:7]),
    }


@pytest.fixture
def triplets(tmp_path, data):
    return data | {"train": write(tmp_path / "triplets.jsonl", of_columns(3))}


def make(data, tokenizer=None, **keys):
    config = {"name": "embedding", "seq_len": 24, **keys}
    return embedding.make(ConfigDict(config), ConfigDict(data), tokenizer)


ABC = ("a", "b", "c")


def texts_of(batch, task):
    """The text of each row of a batch, by its id."""
    return [task.examples("train").texts[i] for i in batch.ids_B]


def test_equal_texts_are_one_row(data, triplets, tokenizer):
    task = make(data, tokenizer)
    assert task.examples("train").texts == list(dict.fromkeys(TEXTS))
    assert len(task.rows("train")) == len(set(TEXTS)) < len(task.examples("train")) == 45
    task = make(triplets, tokenizer, columns=ABC)
    assert len(task.rows("train")) == len({text for row in of_columns(3) for text in row.values()})
    manifest = task.prepare()
    assert list(manifest) == ["train", "validation", "test"]
    assert [manifest[s]["examples"] for s in manifest] == [45, 12, 7]
    assert manifest["validation"]["texts"] == len({t for r in STS for t in list(r.values())[:2]})
    assert len({about["digest"] for about in manifest.values()}) == 3
    assert not {"rows", "cut"} & make(data).prepare()["train"].keys()  # no tokenizer
    assert task.texts("train") == task.examples("train").texts


def test_a_batch_has_whole_examples(triplets, tokenizer):
    task = make(triplets, tokenizer, columns=ABC)
    stream, seen = task.train(4, seed=3), []
    assert stream.steps_per_epoch == 45 // 4 and task.shapes(4).tokens_BT.shape == (12, 16)
    for step in range(11):
        batch = stream[step]
        assert batch.labels[:, 0].tolist() == [0, 1, 2] * 4 and batch.labels.dtype == np.int32
        assert batch.weights.tolist() == [[1.0]] * 12
        ids_EG = batch.ids_B.reshape(4, 3).tolist()
        seen += [tuple(task.examples("train").texts[i] for i in ids) for ids in ids_EG]
        longest = task.rows("train").lengths_N[batch.ids_B].max()
        assert longest <= batch.tokens_BT.shape[1] == min(b for b in task.buckets if b >= longest)
        shape = task.shapes(4, batch.tokens_BT.shape[1])
        assert jax.tree.all(jax.tree.map(lambda a, b: a.shape == b.shape, batch, shape))
    assert set(seen) <= {tuple(row.values()) for row in of_columns(3)} and len(set(seen)) > 40
    assert len(task.buckets) > 1


def test_buckets_are_those_of_the_longest_texts(triplets, tokenizer):
    task = make(triplets, tokenizer, columns=ABC)
    lengths = dict(zip(task.texts("train"), task.rows("train").lengths_N, strict=True))
    longest = [max(lengths[text] for text in row.values()) for row in of_columns(3)]
    assert task.buckets == lengths_of(np.array(longest), 24)


def test_batches_are_a_function_of_seed_and_step(triplets, tokenizer):
    def ids(seed, steps=range(12), **processes):
        stream = make(triplets, tokenizer, columns=ABC).train(4, seed, **processes)
        return [stream[step].ids_B.tolist() for step in steps]

    assert ids(1) == ids(1) != ids(2)
    assert ids(1, [9]) == ids(1)[9:10]
    halves = [ids(1, process_index=i, process_count=2) for i in range(2)]
    assert [a + b for a, b in zip(*halves, strict=True)] == ids(1)
    assert all(len(each) == 6 for each in halves[0])


def test_what_fills_a_batch_up_has_no_weight(triplets, tokenizer, tmp_path):
    few = triplets | {"train": write(tmp_path / "few.jsonl", of_columns(3, rows=3))}
    batch = make(few, tokenizer, columns=ABC).train(4, seed=0)[0]
    assert batch.labels[:, 0].tolist() == [0, 1, 2] * 4
    assert batch.weights[:, 0].tolist() == [1.0] * 9 + [0.0] * 3
    assert (batch.ids_B < 0).tolist() == [False] * 9 + [True] * 3
    assert batch.mask_BT[9:].sum() == 0 < batch.mask_BT[:9].sum(axis=1).min()


def test_a_pass_has_every_text_once(data, tokenizer):
    task = make(data, tokenizer)
    stream = task.held_out("validation", 8)
    ids = np.concatenate([stream[step].ids_B for step in range(stream.steps)])
    assert sorted(ids[ids >= 0]) == list(range(len(task.examples("validation").texts)))


def test_prompts_change_the_texts(triplets, data, tokenizer):
    prompts = dict(query_prompt="pink ", document_prompt="gold ")
    plain, task = (make(triplets, tokenizer, columns=ABC, **keys) for keys in ({}, prompts))
    anchors = {row["a"] for row in of_columns(3)}
    expected = {f"pink {a}" for a in anchors}
    expected |= {f"gold {row[key]}" for row in of_columns(3) for key in "bc"}
    assert set(task.texts("train")) == expected
    assert not set(task.rows("train").digests) & set(plain.rows("train").digests)
    assert task.prepare()["train"]["digest"] != plain.prepare()["train"]["digest"]
    scored = make(data, **prompts).examples("test")
    assert all(text.startswith("pink ") for text in scored.texts)
    assert make(data, **prompts).texts("train")[0] == f"pink {TEXTS[0]}"


def test_several_sources_of_training(data, tmp_path):
    more = write(tmp_path / "more.csv", ["body", "brown", "red"])
    several = data | {"train": {"b": {"text": "body", **more}, "a": data["train"]}}
    found = make(several).examples("train")
    assert sorted(found.texts) == sorted([*set(TEXTS), "brown", "red"]) and len(found) == 47
    assert "more.csv" in found.name and "train.txt" in found.name
    with pytest.raises(UserError, match="no column 'text'"):
        make(data | {"train": {"b": more, "a": data["train"]}}).examples("train")


def test_several_sources_have_their_places_and_splits(data, monkeypatch):
    asked = []

    def read(spec, where):
        asked.append((where, dict(spec).get("split")))
        return Documents(where, lambda: iter([where]))

    monkeypatch.setattr(source, "read", read)
    several = {"a": {"source": "hub"}, "b": {"source": "hub", "split": "more"}}
    assert len(make(data | {"train": several}).examples("train")) == 2
    assert asked == [("data.train.a", "train"), ("data.train.b", "more")]


def test_figures_are_those_of_the_vectors(data, tmp_path):
    task = make(data)
    texts = task.examples("test").texts
    vectors_ND = np.random.default_rng(0).normal(size=(len(texts), 4)).astype(np.float32)
    found = task.score("test", list(vectors_ND))
    sides = [
        vectors_ND[[texts.index(r[key]) for r in STS[:7]]] for key in ("sentence1", "sentence2")
    ]
    assert found == metrics.similarity(*sides, [row["score"] for row in STS[:7]])
    assert (task.primary, task.larger) == ("spearman", True) and list(found) == [*task.metrics]
    with pytest.raises(ValueError, match="1 vectors of"):
        task.score("test", list(vectors_ND[:1]))


def test_retrieval_is_scored(data, tmp_path):
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(WORDS)]
    queries = [{"_id": key, "text": text} for key, text in (("x", "red"), ("d1", "blue"))]
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    write(folder / "corpus.jsonl", corpus)
    write(folder / "queries.jsonl", queries)
    write(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", "x\td0\t1", "d1\td2\t1"])
    task = make(data | {"test": {"path": str(folder)}}, scored="retrieval", document_prompt="a ")
    found = task.examples("test")
    assert found.texts == ["red", "blue", *(f"a {word}" for word in WORDS)] and len(found) == 2
    # The query d1 is nearest to the document d1, which is itself, then to d2.
    vectors = np.concatenate([np.eye(8)[:2] + np.eye(8)[2] * [[0], [0.5]], np.eye(8)])
    assert task.score("test", list(vectors)) == dict.fromkeys(metrics.RETRIEVAL, 1.0)
    assert task.primary == "ndcg@10"
    plain = make(data | {"test": {"path": str(folder)}}, scored="retrieval").examples("test")
    assert plain.texts == WORDS and plain.digest != found.digest


def test_reranking_is_scored(data, tmp_path, caplog):
    rows = [
        {"query": "red", "positive": ["blue"], "negative": ["green", "gold"]},
        {"query": "pink", "positive": ["grey"], "negative": []},
        {"query": "gold", "positive": ["red", "blue"], "negative": ["green"]},
    ]
    data["test"] = write(tmp_path / "rerank.jsonl", rows)
    task = make(data, scored="reranking")
    found = task.examples("test")
    assert "1 rows without positive or negative are left out" in caplog.text
    at = {text: i for i, text in enumerate(found.texts)}
    assert set(at) == {"red", "blue", "green", "gold"}
    vectors_ND = np.eye(4, dtype=np.float32)
    vectors_ND[at["red"]] += 2 * vectors_ND[at["green"]] + vectors_ND[at["blue"]]
    # Near red are green, blue, gold, in this order; all are as far from gold, green first.
    average = (1 / 2 + (1 / 2 + 2 / 3) / 2) / 2
    assert task.score("test", list(vectors_ND)) == pytest.approx({"map": average, "mrr@10": 1 / 2})
    data["test"] = write(tmp_path / "rerank.jsonl", rows[1:2])
    with pytest.raises(UserError, match="no row with both positive and negative"):
        make(data, scored="reranking").examples("test")


@pytest.mark.parametrize(
    ("split", "rows", "keys", "message"),
    [
        ("train", [{"a": "x", "b": "y"}, {"a": " ", "b": "y"}], {}, "line 2: 'a' is empty; remove"),
        ("train", [{"a": "x", "b": "\u200b"}], {}, "line 1: 'b' is empty"),
        ("train", [{"a": "x", "c": "y"}], {}, "no column 'b'; set config.task.columns to one of"),
        ("train", [{"a": "x", "b": ["y"]}], {}, "line 1: 'b' holds .'y'., not text"),
        ("train", ["x", "\u200b"], {"columns": ()}, "file.txt, text 2 is empty; remove it"),
        ("test", [STS[0] | {"score": "high"}], {}, "line 1: label 'high' is no number"),
        ("test", [STS[0] | {"sentence2": ""}], {}, "line 1: 'sentence2' is empty"),
        ("test", STS, {"text": "s"}, "no column 's'; set config.task.text to one of"),
        ("test", STS, {"scored": "retrieval"}, "corpus.jsonl .config.data.test. does not exist"),
        ("test", STS, {"scored": "reranking"}, "no column 'query'; set config.data to a table"),
        (
            "test",
            [{"query": "x", "positive": ["y"], "negative": [""]}],
            {"scored": "reranking"},
            "line 1: a document is empty",
        ),
    ],
)
def test_what_is_wrong_is_named(data, tmp_path, split, rows, keys, message):
    suffix = "txt" if isinstance(rows[0], str) else "jsonl"
    data[split] = write(tmp_path / f"file.{suffix}", rows)
    with pytest.raises(UserError, match=message):
        make(data, **{"columns": ("a", "b"), **keys}).examples(split)


def test_nothing_is_held_out(data):
    del data["validation"]
    with pytest.raises(UserError, match="config.data.validation is not set: texts alone select no"):
        make(data).prepare()
    with pytest.raises(UserError, match="unknown key config.data.held_out"):
        make(data | {"held_out": 0.1})


def test_without_a_teacher_pairs_alone_can_be_learnt_from(data, triplets):
    assert make(triplets, columns=ABC).labels_only == {"contrastive": {"weight": 1.0}}
    for columns in ((), ("a",)):
        with pytest.raises(UserError, match="lone texts say nothing without a teacher"):
            make(data, columns=columns).labels_only  # noqa: B018


def test_command_lines_name_the_kinds_of_sets(data):
    assert command.config("embedding/sts", dict(text="a", label="y", query_prompt="q: ")) == {
        "name": "embedding", "scored": "sts", "text": "a", "label": "y", "query_prompt": "q: "
    }  # fmt: skip
    made = command.build("embedding/sts", {}, data["test"])
    assert made.splits == ("test",) and made.prepare()["test"]["examples"] == 7
    with pytest.raises(UserError, match="did you mean embedding/retrieval"):
        command.find("retrieval")
    with pytest.raises(UserError, match="--task=embedding/sts needs --data"):
        command.build("embedding/sts", {}, None)


@pytest.mark.parametrize("columns", [(), ("q", "p"), ("q", "p", "n", "m")])
@pytest.mark.parametrize("scored", ["sts", "retrieval", "reranking"])
def test_smoke(columns, scored, tokenizer):
    config = dict(name="embedding", columns=columns, scored=scored, text="other")
    changes, data = embedding.make.smoke(config, {}, smoke.samples())
    task = embedding.make(config | changes, data, tokenizer)
    manifest = task.prepare()
    assert manifest["train"]["examples"] == 160 and manifest["test"]["examples"] >= 24
    assert len(task.train(8, 0)[0].ids_B) == 8 * max(1, len(columns))
