import dataclasses
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from etils import epath

from kd_jax import cli, storage
from kd_jax import export as command
from kd_jax.data import tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family, hf, model_config
from kd_jax.models.blueprint import Blueprint
from kd_jax.precision import Policy
from kd_jax.recipes import export, export_check
from kd_jax.report import card
from kd_jax.run import stage, workdir
from kd_jax.run.run import build
from kd_jax.train.checkpoint import Checkpoints
from tests import smoke
from tests.models import tiny
from tests.report import example_run

SOURCE = {"config_hash": "0123abcd", "stage": "student"}


def make(name: str, head: str):
    """A tiny model: (blueprint, params)."""
    kind, config = family.read(tiny.CONFIGS[name])
    blueprint = Blueprint(name, kind, config, head, Policy())
    build = jax.jit(lambda key: family.build(kind, config, head, Policy(), key).params)
    return blueprint, build(jax.random.key(1))


@pytest.fixture(scope="module")
def bert():
    return make("bert", "mlm")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    words = ["the cat sat on the mat", "a dog ran to the river"] * 10
    folder = tmp_path_factory.mktemp("tokenizer")
    return tokenizers.train_tokenizer("wordpiece", words, tiny.VOCAB, folder)


@pytest.fixture(autouse=True)
def no_start(monkeypatch):
    """The command does not change this process's logging and caches."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)


@pytest.fixture
def quick(monkeypatch):
    """Without the comparison, for tests of what happens around it."""
    monkeypatch.setattr(export_check, "check", lambda *_: {"kd_jax": 0.0})


def write(model, out, tokenizer=None, source=SOURCE, page="# card\n"):
    return export.publish(export.writer(*model), tokenizer, out, lambda *_: page, source)


def use(folder, monkeypatch):
    """Runs the program of an export's card, in its folder."""
    monkeypatch.chdir(folder)
    page = (folder / "README.md").read_text()
    program = page.partition("```python\n")[2].partition("```")[0]
    exec(compile(program, str(folder / "README.md"), "exec"), {"__name__": "card"})


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("bert", "mlm"),
        ("roberta", "mlm"),
        ("gpt2", "clm"),
        ("bert", "none"),
        ("bert", "span"),
        ("roberta", "classification"),
    ],
)
def test_writes_what_both_frameworks_load(tmp_path, name, head):
    blueprint, params = make(name, head)
    report = write((blueprint, params), tmp_path / "out")
    assert report["path"] == str(tmp_path / "out")
    assert report["checked_with"] == ["kd_jax", "pytorch"]
    assert report["max_logit_difference"]["kd_jax"] == 0.0
    assert 0.0 < report["max_logit_difference"]["pytorch"] < 1e-5
    again = hf.load(tmp_path / "out", blueprint.family, blueprint.config, head)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_writes_tokenizer_card_and_mark(tmp_path, bert, tokenizer, quick):
    report = write(bert, tmp_path / "out", tokenizer)
    assert tokenizers.load_tokenizer(tmp_path / "out").get_vocab() == tokenizer.get_vocab()
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"
    mark = storage.read_json(tmp_path / "out" / "export.json")
    assert mark == {"source": SOURCE} | {k: v for k, v in report.items() if k != "path"}


def test_a_decoder_whose_blocks_differ(tmp_path, tokenizer, capsys, monkeypatch):
    kind, config = family.read(tiny.CONFIGS["gpt2"])
    blocks = (
        model_config.bottleneck(16, 2, 2, 24),
        dataclasses.replace(config.own_shape, ffn_width=24),
    )
    config = dataclasses.replace(config, blocks=blocks)
    blueprint = Blueprint("gpt2", kind, config, "clm", Policy())
    params = tiny.model("gpt2", "clm", blocks=blocks).params
    out = tmp_path / "out"
    report = write((blueprint, params), out, tokenizer)
    assert report["checked_with"] == ["kd_jax", "pytorch"]
    assert 0.0 < report["max_logit_difference"]["pytorch"] < 1e-5
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
    # What was exported can be exported again, with a card that tells how to load it.
    command.main([f"--model={out}", f"--out={tmp_path / 'again'}"])
    assert "loaded again with pytorch: logits differ by" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json", "modeling_kd_jax.py"):
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    page = (tmp_path / "again" / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)" in page
    assert "`modeling_kd_jax.py`, which lies here" in page
    use(tmp_path / "again", monkeypatch)


def test_compares_without_padding_inside_the_text():
    kind, config = family.read(tiny.CONFIGS["roberta"])
    config = dataclasses.replace(config, vocab_size=4)
    batch = export_check.example_of(Blueprint("", kind, config, "mlm", Policy()))
    np.testing.assert_array_equal(batch.tokens_BT == config.pad_id, batch.mask_BT == 0)


def test_without_torch(tmp_path, bert, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    assert write(bert, tmp_path / "out")["checked_with"] == ["kd_jax"]


def spoil(factor):
    """hf.save, with one weight of the file changed afterwards."""
    save = hf.save

    def spoiled(folder, *args):
        save(folder, *args)
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        tensors["bert.encoder.layer.0.output.dense.weight"] *= factor
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})

    return spoiled


def test_wrong_weights_are_found_and_nothing_is_left(tmp_path, bert, monkeypatch):
    monkeypatch.setattr(hf, "save", spoil(2.0))
    with pytest.raises(RuntimeError, match="loaded again, .*/blocks/0/mlp/down/kernel differs"):
        write(bert, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_found(tmp_path, bert, monkeypatch):
    monkeypatch.setattr(hf, "save", spoil(np.nan))
    with pytest.raises(UserError, match="output.dense.weight holds 1536 values that are not fin"):
        write(bert, tmp_path / "out")


def test_a_cache_that_pytorch_does_not_heed_is_found(tmp_path, monkeypatch):
    # As transformers 5.24 did when it passed the cache by a name that the file did not know.
    name = "modeling_kd_jax.py"
    source = (family.PYTORCH / name).read_text()
    assert "= past_key_values if cache is None else cache" in source
    spoiled = source.replace("= past_key_values if cache is None else cache", "= None")
    (tmp_path / name).write_text(spoiled)
    monkeypatch.setattr(family, "PYTORCH", tmp_path)
    kind, config = family.read(tiny.CONFIGS["gpt2"])
    blocks = (dataclasses.replace(config.own_shape, ffn_width=24), config.own_shape)
    config = dataclasses.replace(config, blocks=blocks)
    blueprint = Blueprint("gpt2", kind, config, "clm", Policy())
    params = tiny.model("gpt2", "clm", blocks=blocks).params
    with pytest.raises(RuntimeError, match="logits differ: pytorch's text, with a cache, by"):
        write((blueprint, params), tmp_path / "out")


def test_is_repeated(tmp_path, bert, quick):
    write(bert, tmp_path / "out")
    write(bert, tmp_path / "out", page="# newer\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# newer\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("spoil", [lambda text: text[:40], lambda text: text.replace("b", "c", 1)])
def test_a_damaged_mark_is_named(tmp_path, bert, quick, spoil):
    write(bert, tmp_path / "out")
    mark = tmp_path / "out" / "export.json"
    mark.write_text(spoil(mark.read_text()))
    with pytest.raises(UserError, match=r"out/export.json is damaged.*; remove .*out to export an"):
        write(bert, tmp_path / "out")


@pytest.mark.parametrize("left", [[".out.partial"], [".out.partial", ".out.old"]])
def test_goes_on_after_a_kill(tmp_path, bert, quick, left):
    for name in left:
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_text("half")
    write(bert, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_goes_on_after_a_kill_at_the_very_end(tmp_path, bert, quick):
    write(bert, tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.old")
    write(bert, tmp_path / "out", page="# newer\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# newer\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("point", ["save", "rename"])
def test_the_old_export_stays_until_the_new_one_is_whole(tmp_path, bert, quick, monkeypatch, point):
    write(bert, tmp_path / "out")

    def fail(*_, **__):
        raise OSError("No space left on device")

    if point == "save":
        monkeypatch.setattr(hf, "save", fail)
    else:
        monkeypatch.setattr(export, "_put", fail)
    with pytest.raises(UserError, match="cannot write .*out: No space left on device"):
        write(bert, tmp_path / "out", page="# newer\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_is_there_whole_or_not_at_all(tmp_path, bert, monkeypatch):
    seen = []
    monkeypatch.setattr(
        export_check, "check", lambda *_: seen.append((tmp_path / "out").exists()) or {}
    )
    write(bert, tmp_path / "out")
    assert seen == [False]


def test_refuses_a_foreign_folder(tmp_path, bert, quick):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="exists and is no export of kd_jax; give another --out"):
        write(bert, tmp_path)
    with pytest.raises(UserError, match="exists and is no export"):
        write(bert, tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_refuses_another_export(tmp_path, bert, quick):
    write(bert, tmp_path / "out")
    with pytest.raises(UserError, match="holds another export .*student.*not .*baseline"):
        write(bert, tmp_path / "out", source=SOURCE | {"stage": "baseline"})


def test_takes_an_empty_folder(tmp_path, bert, quick):
    (tmp_path / "out").mkdir()
    write(bert, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.fixture
def checkpoint(tmp_path, bert, tokenizer):
    """A checkpoint as one finds it on the hub."""
    folder = tmp_path / "checkpoint"
    blueprint, params = bert
    hf.save(folder, params, blueprint.family, blueprint.config, "mlm")
    tokenizer.save_pretrained(folder)
    front = "---\nlicense: apache-2.0\nlanguage: en\n---\n# BERT\n"
    (folder / "README.md").write_text(front)
    return folder


def test_converts_a_checkpoint(tmp_path, checkpoint, capsys, monkeypatch):
    command.main([f"--model={checkpoint}", f"--out={tmp_path / 'out'}"])
    assert "loaded again with pytorch: logits differ by" in capsys.readouterr().out
    old, new = checkpoint / "model.safetensors", tmp_path / "out" / "model.safetensors"
    assert old.read_bytes() == new.read_bytes()
    assert tokenizers.has_tokenizer(tmp_path / "out")
    page = tmp_path / "out" / "README.md"
    stated = huggingface_hub.metadata_load(page)
    assert stated["license"] == "apache-2.0" and stated["language"] == "en"
    assert str(tmp_path) not in page.read_text()
    use(tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("head", ["classification", "span", "none"])
def test_cards_of_other_heads_can_be_used(tmp_path, tokenizer, head, monkeypatch):
    blueprint, params = make("bert", head)
    page = card.of_model(head, "small", "bert", None, {})
    export.publish(export.writer(blueprint, params), tokenizer, tmp_path / "out", page, SOURCE)
    use(tmp_path / "out", monkeypatch)
    export.publish(export.writer(blueprint, params), None, tmp_path / "bare", page, SOURCE)
    use(tmp_path / "bare", monkeypatch)


def test_what_is_exported_names_nothing_of_this_machine(tmp_path, checkpoint, quick):
    (checkpoint / "generation_config.json").write_text('{"temperature": 0.7}')  # not of an mlm
    export.export_checkpoint(str(checkpoint), None, str(tmp_path / "out"))
    for file in (tmp_path / "out").glob("*[!s]"):  # weights apart
        if file.suffix != ".safetensors":
            found = file.read_text()
            assert str(tmp_path) not in found and "local" not in found.replace("the local", ""), (
                file
            )
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_another_tokenizer_beside_a_qwen2(tmp_path, tokenizer, caplog, monkeypatch):
    # transformers 5 reads a Qwen2's tokenizer by rules of its own, whatever tokenizer.json says.
    blueprint, params = make("qwen2", "clm")
    origin, out = tmp_path / "origin", tmp_path / "out"
    origin.mkdir()
    wish = '{"temperature": 0.7, "do_sample": true, "max_length": 30}'
    (origin / "generation_config.json").write_text(wish)
    page = card.of_model("clm", "small", "qwen2", None, {})
    export.publish(export.writer(blueprint, params), tokenizer, out, page, SOURCE, None, [origin])
    again = tokenizers.load_tokenizer(out)
    assert again(export.SAMPLE)["input_ids"] == tokenizer(export.SAMPLE)["input_ids"]
    assert "AutoTokenizer tokenizes texts differently for this model" in caplog.text
    written = (out / "README.md").read_text()
    assert "tokenizer = PreTrainedTokenizerFast.from_pretrained(source)" in written
    assert "AutoTokenizer of transformers 5 would read other tokens" in written
    assert (out / "generation_config.json").read_text() == wish
    use(out, monkeypatch)


def test_a_tokenizer_that_reads_otherwise_is_found(tmp_path, bert, tokenizer, quick, monkeypatch):
    other = tokenizers.train_tokenizer("bpe", ["the cat sat on the mat"], 300, tmp_path / "other")
    monkeypatch.setattr(tokenizers, "load_tokenizer", lambda folder: other)
    with pytest.raises(RuntimeError, match="loaded again, the tokenizer reads .The 1,234"):
        write(bert, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_another_checkpoint_of_that_name_is_not_written_over(tmp_path, checkpoint, bert, quick):
    export.export_checkpoint(str(checkpoint), None, str(tmp_path / "out"))
    export.export_checkpoint(str(checkpoint), None, str(tmp_path / "out"))
    blueprint, params = bert
    spoil(2.0)(checkpoint, params, blueprint.family, blueprint.config, "mlm")
    with pytest.raises(UserError, match="holds another export"):
        export.export_checkpoint(str(checkpoint), None, str(tmp_path / "out"))


def test_a_head_that_does_not_exist(tmp_path, checkpoint, capsys):
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace("BertForMaskedLM", "BertForNextSentencePrediction"))
    with pytest.raises(SystemExit) as exit:
        command.main([f"--model={checkpoint}", f"--out={tmp_path / 'out'}"])
    assert exit.value.code == 1
    error = capsys.readouterr().err
    assert "architectures=['BertForNextSentencePrediction']; have: BertForMaskedLM, " in error


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        command.main(["--help"])
    assert exit.value.code == 0
    assert "python -m kd_jax.export --workdir=RUN" in capsys.readouterr().out


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, teacher, student): a run that trained nothing but looks finished, with two
    checkpoints of the student, the first of them the best."""
    folder = tmp_path_factory.mktemp("runs") / "example-0123abcd"
    words = folder.parent / "words.txt"
    words.write_text("the cat sat on the mat\n\na dog ran to the river\n\n" * 50)
    config = smoke.masked()
    config.data.train = {"source": "files", "path": str(words)}
    config.tokenizer.vocab_size = tiny.VOCAB
    config.mesh.fsdp = 8
    folder.mkdir()
    storage.write_json(folder / "config.json", workdir.resolved(config))
    run = build(config, epath.Path(folder))
    by_name = {each.name: each for each in run.stages}

    teacher = stage.create_state(run, by_name["teacher"], {})
    given = {"teacher": run.models["teacher"].cut(teacher.params["student"])}
    student = stage.create_state(run, by_name["student"], given)
    teacher, student = (state.replace(step=state.step + 1) for state in (teacher, student))
    worse = jax.tree.map(lambda x: 2 * x, student.params)
    later = student.replace(step=student.step + 1, params=worse)
    saved = [("teacher", 1.0, teacher), ("student", 1.0, student), ("student", 2.0, later)]
    for name, loss, state in saved:
        checkpoints = Checkpoints(folder / name / "checkpoints", keep=2)
        checkpoints.save(state, [loss])
        checkpoints.close()
    stages = {name: example_run.figures(2.0, name == "teacher") for name in example_run.STAGES}
    results = {
        "config": "example",
        "config_hash": workdir.config_hash(config),
        "commit": "89abcdef",
        "seed": 0,
        "versions": {"jax": "0.0.1"},
        "models": {key: {"name": f"{key}'s", "commit": None} for key in ("teacher", "student")},
        "data": {"train": {"name": str(words)}},
        "split": "validation",
        "stages": stages,
    }
    storage.write_json(folder / "results.json", results)
    cut = run.models["student"].cut  # eight devices pad tables
    return folder, *(cut(state.params["student"]) for state in (teacher, student))


def loaded(folder):
    kind, config = family.read(hf.read_config(folder))
    return hf.load(folder, kind, config, "mlm")


def test_exports_the_best_checkpoint_of_a_stage(tmp_path, finished):
    run, teacher, student = finished
    # Trained on eight devices, exported on one.
    report = export.export_stage(str(run), "student", str(tmp_path / "student"))
    assert report["checked_with"] == ["kd_jax", "pytorch"]
    jax.tree.map(
        np.testing.assert_array_equal, loaded(tmp_path / "student"), jax.device_get(student)
    )
    export.export_stage(str(run), "teacher", str(tmp_path / "teacher"))
    jax.tree.map(
        np.testing.assert_array_equal, loaded(tmp_path / "teacher"), jax.device_get(teacher)
    )
    assert tokenizers.has_tokenizer(tmp_path / "teacher")


def test_card_of_a_run(tmp_path, finished, quick):
    run, _, _ = finished
    export.export_stage(str(run), "student", str(tmp_path / "out"))
    page = (tmp_path / "out" / "README.md").read_text()
    stated = huggingface_hub.metadata_load(tmp_path / "out" / "README.md")
    assert stated == {
        "library_name": "transformers",
        "model-index": stated["model-index"],
        "pipeline_tag": "fill-mask",
        "tags": ["knowledge-distillation", "kd_jax"],
    }
    assert (
        "distilled with kd_jax on words.txt. The teacher is a model trained in the same run" in page
    )
    assert "| loss (nats/token) | 2.0000 | 2.0000 | 2.0000 | 0.0000 |" in page
    assert "kd_jax commit 89abcdef; jax 0.0.1." in page
    assert "AutoModelForMaskedLM.from_pretrained(source)" in page
    assert str(run.parent) not in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--model=m --stage=student", "--stage does not go with --model; leave it out"),
        ("--workdir=w --revision=v1", "--revision does not go with --workdir; leave it out"),
        ("--workdir=", "--workdir is empty"),
    ],
)
def test_flags_that_nothing_reads(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([*flags.split(), f"--out={tmp_path / 'out'}"])
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_a_place_that_is_taken_is_found_before_the_model_is_read(tmp_path, capsys):
    (tmp_path / "notes.txt").touch()
    for find in (export.export_checkpoint, export.export_stage):
        with pytest.raises(UserError, match="exists and is no export of kd_jax"):
            find("no/model", None, str(tmp_path))
    with pytest.raises(SystemExit):
        command.main(["--model=m", f"--out={tmp_path / 'notes.txt'}"])
    assert "notes.txt is a file; give another folder" in capsys.readouterr().err


def test_a_stage_that_does_not_exist(tmp_path, finished):
    with pytest.raises(UserError, match="has no stage 'pupil'; have: teacher, baseline, student"):
        export.export_stage(str(finished[0]), "pupil", str(tmp_path / "out"))


def test_a_stage_without_checkpoint(tmp_path, finished):
    with pytest.raises(UserError, match="baseline/checkpoints: no checkpoint; run"):
        export.export_stage(str(finished[0]), "baseline", str(tmp_path / "out"))


def test_another_head_has_no_onnx_files(tmp_path, finished):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="an encoder with the head 'mlm'; ONNX files"):
        export.export_stage(str(finished[0]), "student", str(out), with_onnx=True)
    assert not out.exists()
