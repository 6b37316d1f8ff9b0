import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
import torch
import transformers

import kd_jax
from kd_jax import embed as command
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.models.model_config import Texts
from kd_jax.recipes import embed
from kd_jax.recipes.embed import Options
from kd_jax.run import subject
from tests.models import tiny

pytestmark = pytest.mark.usefixtures("caches")

TEXTS = [f"row {i} is {'good' if i % 3 else 'bad'}" + " really" * (i % 9) for i in range(40)]
PROMPTS = Texts((("document", ""), ("query", "is it good ")), None, "cosine", 24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A random embedder with prompts and a tokenizer."""
    folder = tmp_path_factory.mktemp("embedder")
    kind, config = family.read(tiny.CONFIGS["bert"])
    config = dataclasses.replace(config, texts=PROMPTS)
    hf.save(folder, tiny.model("bert", "embedding").params, kind, config, "embedding")
    tokenizers.train_tokenizer("wordpiece", TEXTS, tiny.VOCAB, folder)
    return str(folder)


@pytest.fixture(scope="module")
def wanted(model, tmp_path_factory):
    """(file of the texts, their vectors)"""
    folder = tmp_path_factory.mktemp("wanted")
    source, target = folder / "texts.txt", folder / "vectors.npy"
    source.write_text("\n".join(TEXTS) + "\n")
    run(model, source, target)
    return source, np.load(target)


def run(model, source, target, **options):
    given = Options(batch_size=8, **options)
    open_model = functools.partial(embed.checkpoint, model, None, given.precision)
    return embed.embed_file(open_model, str(source), str(target), given)


def pooled(folder, texts):
    """The normalized means of PyTorch's hidden states."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = tokenizers.load_tokenizer(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden, real = model(**rows).last_hidden_state, rows["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * real).sum(1) / real.sum(1)).numpy()


def test_vectors_are_pytorch_s(model, wanted):
    np.testing.assert_allclose(wanted[1], pooled(model, TEXTS), rtol=0, atol=2e-6)
    assert wanted[1].dtype == np.float32 and wanted[1].shape == (40, 32)
    found = kd_jax.load(model).embed(TEXTS[:9], prompt_name="query", batch_size=8, dimensions=5)
    want = pooled(model, ["is it good " + text for text in TEXTS[:9]])[:, :5]
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6)
    assert np.abs(found - wanted[1][:9, :5]).max() > 0.01  # the prompt changes something


def test_a_loaded_model_stays_in_memory(model, wanted, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    loaded = kd_jax.load(folder)
    loaded.embed(TEXTS[:1], batch_size=8)
    shutil.rmtree(folder)
    np.testing.assert_array_equal(loaded.embed(TEXTS, batch_size=8), wanted[1])


def test_another_config_is_another_model(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    described = json.loads((folder / "config.json").read_text())
    described["num_attention_heads"] *= 2
    (folder / "config.json").write_text(json.dumps(described))
    own, other = (embed.checkpoint(str(each), None, None) for each in (model, folder))
    assert own.digest != other.digest
    same = embed.checkpoint(model, None, None)
    assert own.digest == same.digest != embed._cut(same, 4).digest


def test_vectors_that_are_not_finite_are_refused(model, wanted, tmp_path):
    own = embed.checkpoint(model, None, None)
    load = lambda: jax.tree.map(lambda x: np.full(x.shape, np.nan, np.float32), own.params)  # noqa: E731
    spoilt = dataclasses.replace(own, load=load)
    with pytest.raises(
        UserError, match="embedder.*: its outputs are not finite; its weights hold NaN"
    ):
        embed.embed_file(lambda: spoilt, str(wanted[0]), str(tmp_path / "a.npy"), Options())
    assert not (tmp_path / "a.npy").exists()


def test_ids_of_several_types_and_large_ones(model, tmp_path):
    for ids, wanted in (
        ([2**63 + 5, 7], [str(2**63 + 5), "7"]),
        ([1, "a", None], ["1", "a", None]),
    ):
        rows = [json.dumps({"id": each, "text": "row"}) for each in ids]
        (tmp_path / "rows.jsonl").write_text("\n".join(rows))
        run(model, tmp_path / "rows.jsonl", tmp_path / "vectors.parquet")
        found = pyarrow.parquet.read_table(tmp_path / "vectors.parquet")
        assert found["id"].to_pylist() == wanted
        (tmp_path / "vectors.parquet").unlink()


def test_calls_with_few_texts_share_a_program(model, wanted, monkeypatch):
    seen, original = set(), embed.predict

    def predict(student, batches, *others):
        batches = list(batches)
        seen.update(batch.tokens_BT.shape for batch in batches)
        return original(student, batches, *others)

    monkeypatch.setattr(embed, "predict", predict)
    loaded = kd_jax.load(model)
    for few in (TEXTS[:1], TEXTS[4:5], TEXTS[2:5]):
        assert len(loaded.embed(few)) == len(few)
    assert seen == {(8, 16)}  # a row on each of eight devices
    alone = np.concatenate([loaded.embed([text]) for text in TEXTS[:9]])
    np.testing.assert_allclose(alone, wanted[1][:9], rtol=0, atol=2e-6)
    seen.clear()
    loaded.embed([*TEXTS[:8], "row " * 16])
    assert seen == {(32, 24)}
    assert [subject.rows_for(texts, 256) for texts in (8, 9, 33, 129)] == [8, 32, 128, 256]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("one text", {}, r"give a list of texts, as \['one text'\], not a text alone"),
        (["a"], {"dimensions": 0}, "--dimensions=0 must be at least 1"),
        (["a"], {"dimensions": 2.5}, "--dimensions=2.5 should be a whole number"),
        (["a"], {"batch_size": 0}, "--batch_size=0 cannot be divided among 8 devices"),
        (["a", ""], {}, "^texts, row 2: the text is empty"),
        (["a"], {"rows": 3}, "no option 'rows'; have: text, prompt_name"),
    ],
)
def test_mistakes_in_python(model, texts, options, message):
    with pytest.raises(UserError, match=message):
        kd_jax.load(model).embed(texts, **options)


def test_a_table(model, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "AT_ONCE", 16)
    rows = [{"id": f"n{i}", "passage": text} for i, text in enumerate(TEXTS)]
    rows[20]["passage"] = " "
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = tmp_path / "new" / "vectors.parquet"
    done = run(model, tmp_path / "rows.jsonl", target, text="passage", keep_empty=True)
    assert (done["rows"], done["dimensions"]) == (40, 32)
    found = pyarrow.parquet.read_table(target).to_pydict()
    assert found["index"] == list(range(40)) and found["id"] == [row["id"] for row in rows]
    vectors = np.array(found["vector"], np.float32)
    assert np.isnan(vectors[20]).all()
    others = np.arange(40) != 20
    np.testing.assert_allclose(vectors[others], wanted[1][others], rtol=0, atol=2e-6)
    assert list(target.parent.iterdir()) == [target]


def test_goes_on_where_it_was_killed(model, wanted, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(embed, "AT_ONCE", 16)
    source, vectors = wanted
    target, computed = tmp_path / "vectors.npy", []
    original = embed.predict

    def killed(after):
        def predict(*args):
            if len(computed) == after:
                raise KeyboardInterrupt
            computed.append(1)
            return original(*args)

        monkeypatch.setattr(embed, "predict", predict)

    killed(2)
    with pytest.raises(KeyboardInterrupt):
        run(model, source, target)
    partial = tmp_path / "vectors.npy.partial"
    assert not target.exists() and len(list(partial.glob("*.npy"))) == 2
    kept = shutil.copytree(partial, tmp_path / "kept")
    damaged = next(partial.glob("000000000016-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    killed(99)
    run(model, source, target)
    assert len(computed) == 4 and f"{damaged} is damaged" in caplog.text
    np.testing.assert_array_equal(np.load(target), vectors)
    assert not partial.exists()
    # What belongs to another command is not taken.
    for changes in ({"dimensions": 4}, {"prompt": "row "}):
        shutil.copytree(kept, partial)
        computed.clear()
        run(model, source, target, **changes)
        assert len(computed) == 3
    assert np.load(target).shape == (40, 32)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"prompt_name": "other"},
            "--prompt_name=other: {model} has the prompts document, query; ",
        ),
        ({"prompt_name": "query", "prompt": ""}, "--prompt and --prompt_name: give one of them"),
        ({"dimensions": 33}, "--dimensions=33: {model} has vectors of 32 only"),
        ({"text": "x"}, "has no columns"),
    ],
)
def test_mistakes_leave_nothing(model, wanted, tmp_path, options, message):
    with pytest.raises(UserError) as error:
        run(model, wanted[0], tmp_path / "out.npy", **options)
    assert message.format(model=model) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written_or_read(model, wanted, tmp_path):
    with pytest.raises(UserError, match="cannot write .csv; have: .npy, .parquet"):
        run("nowhere", wanted[0], tmp_path / "out.csv")  # found before the model is opened
    (tmp_path / "empty.txt").write_text("a\n\nb\n")
    with pytest.raises(UserError, match="empty.txt, line 2: the text is empty"):
        run(model, tmp_path / "empty.txt", tmp_path / "out.npy")


def test_a_base_model_and_the_command(tmp_path, wanted, capsys, monkeypatch):
    """Hidden states are averaged and normalized."""
    monkeypatch.setattr("kd_jax.cli.start_jax", lambda: None)
    kind, config = family.read(tiny.CONFIGS["bert"])
    hf.save(tmp_path / "base", tiny.model("bert", "mlm").params, kind, config, "mlm")
    tokenizers.train_tokenizer("wordpiece", TEXTS, tiny.VOCAB, tmp_path / "base")
    argv = [f"--model={tmp_path / 'base'}", f"--input={wanted[0]}"]
    command.main([*argv, f"--output={tmp_path / 'out.npy'}", "--dimensions=31", "--batch_size=8"])
    assert "out.npy: 40 vectors of 31 dimensions in " in capsys.readouterr().out
    lengths = np.linalg.norm(np.load(tmp_path / "out.npy"), axis=1)
    assert (lengths < 1).all() and (lengths > 0.8).all() and jax.device_count() == 8
    with pytest.raises(SystemExit):
        command.main([*argv, f"--output={tmp_path / 'out.txt'}"])
    assert "error: --output=" in capsys.readouterr().err
