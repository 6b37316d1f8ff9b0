"""The command line from outside, and everything that can be wrong with a config or its inputs.

Mistakes are found in this process; what else a command says or leaves shows in others.
"""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import safetensors.numpy
from etils import epath

from kd_jax import cli, main
from kd_jax.data import tokenizers as tokenizers
from kd_jax.errors import UserError
from kd_jax.models import family, hf
from kd_jax.precision import Policy
from kd_jax.recipes import distil
from kd_jax.run import workdir
from kd_jax.run.run import build
from tests import forked, tiny_config

SIZES = dict(
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_config.write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with its tokenizer, as on the hub."""
    folder = tmp_path_factory.mktemp("hub") / "tiny-bert"
    tokenizer = tokenizers.train_tokenizer("wordpiece", [tiny_config.TEXT], 128, folder)
    hf_json = {"model_type": "bert", "vocab_size": len(tokenizer), **SIZES}
    kind, config = family.read(hf_json)
    import jax

    params = family.build(kind, config, "mlm", Policy(), jax.random.key(0)).params
    hf.save(folder, params, kind, config, "mlm")
    return folder


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "tiny-bert"))


@pytest.fixture
def config(text):
    return tiny_config.get_config(str(text))


@pytest.fixture
def from_checkpoint(config, checkpoint):
    """The teacher is `checkpoint`, and so is the tokenizer."""
    config.teacher.model, config.teacher.architecture = str(checkpoint), {}
    config.tokenizer.train = ""
    config.stages = dict(student={})
    return config


@pytest.fixture
def error(tmp_path, capsys, monkeypatch):
    """Runs a config that is wrong and gives back the one line that it ends with."""
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))

    def of(config, steps=0) -> str:
        run = tmp_path / "run"
        with pytest.raises(SystemExit) as left, cli.plain_errors():
            with workdir.enter(config, "tiny", str(run)) as place:
                distil.run(config, place)
        assert left.value.code == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        line = lines[0]
        assert line.startswith("error: ")
        assert not list(run.glob("*/metrics.csv"))  # nothing has been trained
        return line.removeprefix("error: ")

    return of


# The config's own values.


def test_batch_that_the_devices_do_not_divide(config, error):
    config.batch_size = 12
    assert error(config) == (
        "batch size of teacher: 12 rows cannot be divided among 8 devices x 1 micro-batches; make "
        "it a multiple of 8"
    )


def test_batch_of_one_stage_that_the_devices_do_not_divide(config, error):
    config.stages.student.batch_size = 4
    assert error(config).startswith("batch size of student: 4 rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.optim.__setitem__("lr", 1.0), "unknown key config.optim.lr; have: learning_r"),
        (
            lambda c: c.__setitem__("batchsize", 8),
            "unknown key config.batchsize (did you mean 'batch_size'?); have: recipe",
        ),
        (
            lambda c: c.eval.__delitem__("every"),
            "missing from the config: config.eval.every; kd_jax",
        ),
        (
            lambda c: c.data.__setitem__("heldout", 0.1),
            "unknown key config.data.heldout (did you mean 'held_out'?)",
        ),
        (lambda c: c.task.__setitem__("length", 8), "unknown key config.task.length; have: name"),
        (
            lambda c: c.__setitem__("task", dict(name="mlm", seq_len=8.5)),
            "config.task.seq_len=8.5 should be a whole number",
        ),
        (
            lambda c: c.stages.student.__setitem__("step", 8),
            "unknown key config.stages.student.step (did you mean 'steps'?)",
        ),
        (
            lambda c: c.stages.student.__setitem__("steps", "many"),
            "config.stages.student.steps='many' should be a whole number",
        ),
        (
            lambda c: c.stages.student.__setitem__("optim", dict(rate=1.0)),
            "unknown key config.stages.student.optim.rate",
        ),
        (
            lambda c: c.stages.__setitem__("assistant", {}),
            "config.stages=['assistant', 'student', ",
        ),
        (lambda c: c.eval.__setitem__("every", 0), "config.eval.every=0 must be at least 1"),
        (lambda c: c.__setitem__("accumulate", 0), "config.accumulate=0 must be at least 1"),
        (lambda c: c.__setitem__("seed", -1), "config.seed=-1 must be at least 0"),
        (lambda c: c.__setitem__("precision", "fp16"), "precision='fp16': have fp32, bf16"),
        (lambda c: c.task.__setitem__("name", "mml"), "unknown tasks plug-in 'mml' (did you mean"),
        (
            lambda c: c.objective.__setitem__("kll", dict(weight=1.0)),
            "unknown objectives plug-in 'kll' (did you mean 'kl'?); have: akl, attention, ce, ",
        ),
        (
            lambda c: c.objective.kl.__setitem__("temperature", 0),
            "objective.kl.temperature=0.0 must",
        ),
        (lambda c: c.objective.kl.__setitem__("tau", 2), "objective.kl: unknown tau; have weight"),
        (
            lambda c: c.optim.schedule.__setitem__("kind", "step"),
            "optim.schedule.kind='step': have",
        ),
        (
            lambda c: c.optim.__setitem__("learning_rate_multipliers", ((".*", 0.0),)),
            "optim.learning_rate_multipliers freezes every parameter",
        ),
        (
            lambda c: c.student.__setitem__("init", "copy"),
            "config.student.init='copy': have teacher",
        ),
        (
            lambda c: c.student.__setitem__("init", "model"),
            "config.student.init='model': set student.model to a checkpoint",
        ),
        (
            lambda c: c.student.architecture.__setitem__("hidden_size", 32),
            "student.init from teacher layers: width is 16 in the teacher and 32 in the student",
        ),
        (
            lambda c: c.student.architecture.__setitem__("layers", 2),
            "student.architecture: unknown layers; have: ",
        ),
        (
            lambda c: c.student.architecture.__setitem__("hidden_size", 15),
            "vocab_size=128) over the config.json of the teacher: 2 attention heads do not divide "
            "the width 15",
        ),
        (
            lambda c: c.teacher.architecture.__setitem__("model_type", "berd"),
            "unknown model_type 'berd'",
        ),
        (
            lambda c: c.task.__setitem__("seq_len", 20),
            "config.task.seq_len=20: teacher bert of teacher.architecture has positions for 16",
        ),
        (lambda c: c.tokenizer.__setitem__("vocab_size", 8), "vocab_size=8 is too small"),
        (
            lambda c: c.__setitem__("resume", "runs/none/student"),
            "config.resume=runs/none/student: ",
        ),
        (
            lambda c: c.data.__setitem__("train", dict(source="file", path="x")),
            "unknown data plug-in 'file' (did you mean 'files'?); have: files, hub, python, tfds",
        ),
    ],
)
def test_a_wrong_value(config, error, change, message):
    with config.unlocked():
        change(config)
    assert message in error(config)


# What the config points to.


def test_missing_weights(from_checkpoint, checkpoint, error):
    (checkpoint / "model.safetensors").unlink()
    line = error(from_checkpoint)
    assert f"{checkpoint}: no weights; want model.safetensors or" in line


def test_truncated_weights(from_checkpoint, checkpoint, error):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    line = error(from_checkpoint)
    assert f"{weights}: truncated or not safetensors" in line and "download it again" in line


def test_a_tensor_of_a_wrong_shape(from_checkpoint, checkpoint, error):
    weights = checkpoint / "model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    name = "bert.encoder.layer.0.intermediate.dense.bias"
    tensors[name] = tensors[name][:-1]
    safetensors.numpy.save_file(tensors, weights)
    line = error(from_checkpoint)
    assert "encoder.layer.0.intermediate.dense.bias has shape (31,)" in line and "(32,)" in line


@pytest.mark.parametrize("stages", [("teacher", "student"), ("student",)])
def test_weights_are_looked_at_before_the_text(from_checkpoint, checkpoint, error, stages):
    (checkpoint / "model.safetensors").unlink()
    from_checkpoint.stages = {name: {} for name in stages}
    from_checkpoint.data.train.path = "no/such/file.txt"
    assert "no weights" in error(from_checkpoint)


def test_an_unknown_model_type(from_checkpoint, checkpoint, error):
    described = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(described | {"model_type": "llama9"}))
    line = error(from_checkpoint)
    assert (
        "llama9" in line and "have: bert, distilbert, electra, gemma3_text, gpt2, llama, " in line
    )


def test_a_folder_that_is_not_there(from_checkpoint, error):
    from_checkpoint.teacher.model = "./no/such/folder"
    assert error(from_checkpoint) == "./no/such/folder: no such folder"


def test_a_student_of_another_vocabulary(from_checkpoint, checkpoint, error):
    other = checkpoint.with_name("other")
    shutil.copytree(checkpoint, other)
    entries = json.loads((other / "tokenizer.json").read_text())
    words = entries["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (other / "tokenizer.json").write_text(json.dumps(entries))
    from_checkpoint.student.model, from_checkpoint.student.init = str(other), "model"
    line = error(from_checkpoint)
    assert f"student {other} was trained with another tokenizer than the run's" in line
    assert "choose teacher and student of one vocabulary" in line


def test_a_student_with_too_few_words(from_checkpoint, checkpoint, error):
    from_checkpoint.student.architecture = dict(vocab_size=100)
    line = error(from_checkpoint)
    assert "student" in line and "has a vocabulary of 100, the tokenizer has ids up to" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: remove it from config.data.train.path"),
        (b"\n \n", "holds no text: remove it from config.data.train.path"),
        (b"a\n\nb\n\nc\n\nol\xe9\n", "line 7: byte 11 (0xe9) is not UTF-8; convert the file"),
        (b"one\n\ntwo\n", "too few for a block of config.task.seq_len=16"),
    ],
)
def test_a_text_that_is_none(config, tmp_path, error, original, content, message):
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    config.data.train.path = str(file)
    config.tokenizer.train, config.tokenizer.path = "", str(original)
    assert message in error(config)


def test_a_text_that_is_not_there(config, error):
    config.data.train.path = "no/such/*.txt"
    assert "config.data.train.path='no/such/*.txt': no such file, looking in" in error(config)


def test_a_tokenizer_is_not_trained_into_a_bucket(config):
    with pytest.raises(UserError, match="tokenizer.train='wordpiece' needs a local --workdir, not"):
        build(config, epath.Path("gs://bucket/run"))


def test_no_random_teacher_is_meant_by_mistake(config, error):
    config.teacher.architecture = {}
    assert error(config) == (
        "teacher: set teacher.model, or teacher.architecture.model_type and its sizes"
    )


# The command line.


@pytest.fixture(scope="module")
def command(text, tmp_path_factory):
    """Runs kd_jax.main and gives back its status, output, errors and seconds."""
    folder = tmp_path_factory.mktemp("command")

    def run(*arguments, **environment):
        began = time.monotonic()
        process = forked.start(list(arguments), folder, **environment)
        status = process.wait()
        return status, process.output(), process.error(), time.monotonic() - began

    run.config = f"--config={tiny_config.__file__}:{text}"
    run.folder = folder
    return run


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs kd_jax.main in this process, which ends with status 1, and gives back its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    own = logging.getLogger("kd_jax")
    monkeypatch.setattr(own, "handlers", [cli._Log()])
    monkeypatch.setattr(own, "propagate", False)
    monkeypatch.setattr(own, "level", logging.INFO)

    def of(*arguments) -> list[str]:
        with pytest.raises(SystemExit) as ended:
            main.main(arguments)
        assert ended.value.code == 1
        return capsys.readouterr().err.splitlines()

    return of


def one_line(lines) -> str:
    (line,) = lines
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_a_mistake_ends_the_command(command):
    status, _, error, _ = command(command.config, "--config.recipe=pretrian")
    assert status == 1
    assert "unknown recipes plug-in 'pretrian'" in one_line(error.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.foo=1"], "config: no key 'foo'; config has accumulate, batch_size, checkpoint"),
        (
            ["--config.optim.learning_rat=1"],
            "no key 'optim.learning_rat' (did you mean --config.optim.learning_rate or",
        ),
        (
            ["--config.learning_rate=1"],
            "config: no key 'learning_rate' (did you mean --config.optim.learning_rate?); config",
        ),
        (
            ["--config.objective.kl.temp=1"],
            "objective.kl: unknown temp; have weight, term, positions, rows, share, temperature",
        ),
        (
            ["--config.objective.hiden.weight=1"],
            "unknown objectives plug-in 'hiden' (did you mean 'hidden'",
        ),
        (
            ["--config.stages.student.step=3"],
            "unknown key config.stages.student.step (did you mean 'steps'?)",
        ),
        (["--config.student.architecture.layers=2"], "student.architecture: unknown layers; have"),
        (["--steps=3"], "unknown flag --steps (did you mean --config.steps or"),
        (
            ["--config.optim.schedule=cosine"],
            "schedule=cosine: a section; set its keys, one by one",
        ),
        (["config.steps=3"], "'config.steps=3' is no flag; did you mean --config.steps=3?"),
        (["smoke"], "'smoke' is no flag; flags begin with --"),
        (["--config.steps=many"], "--config.steps=many should be a whole number"),
        (
            ["--config.recipe=pretrian"],
            "unknown recipes plug-in 'pretrian' (did you mean 'pretrain'",
        ),
        (["--workdirr=x"], "workdirr"),
        (["--process_id=1"], "--process_id given without --coordinator, --process_count"),
    ],
)
def test_a_wrong_flag(command, refused, arguments, message):
    assert message in one_line(refused(command.config, *arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: --config=FILE is missing"),
        (
            ["configs/quickstart.py:smoke", "--workdir=x"],
            "error: --config=FILE is missing; did you mean --config=configs/quickstart.py:smoke?",
        ),
    ],
)
def test_without_a_config_there_is_the_usage(refused, arguments, message):
    *usage, line = refused(*arguments)
    assert line == message
    assert "    python -m kd_jax.main --config=configs/quickstart.py" in usage


def test_a_config_file_that_is_not_there(refused):
    line = one_line(refused("--config=quickstat.py"))
    said = "--config=quickstat.py: no such file, and no experiment of that name; did you mean "
    assert line == f"{said}quickstart?"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:\n", "mistake.py:1: invalid syntax"),
        ("\nfrom kd_jax import confg\n", "mistake.py:2: ImportError: cannot import name 'confg'"),
        (
            "def get_config():\n    return wrong\n",
            "mistake.py:2: NameError: name 'wrong' is not defined",
        ),
        (
            "from kd_jax import config\n\n\ndef get_config():\n"
            "    c = config.base('pretrain')\n    c.steps = 'ten'\n    return c\n",
            "mistake.py:6: TypeError: Could not override field 'steps'",
        ),
        (
            "from kd_jax import config, smoke\n\n\ndef get_config(arg=None):\n"
            "    return smoke.or_smoke(config.base('pretrain'), 'tiny')\n",
            "unknown variant 'tiny'; have: smoke",
        ),
    ],
)
def test_a_config_file_with_a_mistake(refused, tmp_path, source, message):
    file = tmp_path / "mistake.py"
    file.write_text(source)
    assert message in one_line(refused(f"--config={file}"))


def test_a_hub_that_cannot_be_reached(command, tmp_path):
    """No server answers at this address; another test has one that never answers."""
    unreachable = dict(HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    status, output, error, seconds = command(
        f"--config={forked.ROOT / 'configs/pretrain_wikitext.py'}", **unreachable
    )
    assert status == 1 and seconds < 10
    (line,) = error.splitlines()
    assert line.startswith("error: model 'google-bert/bert-large-")
    for named in ("HF_TOKEN", "teacher.model", "`:smoke`", "cannot be reached"):
        assert named in line


def test_the_run_directory_is_named_by_the_config_and_printed_first(command):
    status, output, error, _ = command(command.config, "--config.data.train.path=nothing.txt")
    assert status == 1
    (line,) = output.splitlines()
    folder = line.removeprefix("run directory: ")
    assert folder.startswith("runs/tiny_config-")
    assert not (command.folder / folder).exists()  # nothing is written before the checks pass
    again = command(command.config, "--config.data.train.path=nothing.txt")[1]
    other = command(command.config, "--config.data.train.path=none.txt")[1]
    assert again == output != other


def test_help(command):
    status, output, error, _ = command("--help")
    assert "--workdir" in output + error and "--config" in output + error


def test_a_place_where_one_may_not_write(command, refused):
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    line = one_line(refused(command.config, "--workdir=/proc/run"))
    assert "set its permissions, or give another folder" in line
