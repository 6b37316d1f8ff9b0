import os
import warnings
from pathlib import Path

import pytest

from kd_jax.data import python, source
from kd_jax.errors import UserError


def test_mistakes_in_the_config():
    with pytest.raises(UserError, match="unknown key config.data.test.pth .did you mean 'path'"):
        source.read({"pth": "x"}, "data.test")
    with pytest.raises(UserError, match="unknown data plug-in 'hob' .*files, hub, python, tfds"):
        source.read({"source": "hob"}, "data.test")
    with pytest.raises(UserError, match="config.data.test.path is not set"):
        source.read({"source": "hub"}, "data.test")
    with pytest.raises(UserError, match="config.data.test='x.txt' must be a dict"):
        source.read("x.txt", "data.test")


def test_pythons_own_text():
    documents = source.read({"source": "python"}, "data.train")
    assert documents.identity.count > 300
    text = "\n".join(documents)
    assert len(text) > 1_000_000 and "assert" in text


def test_docstrings_are_found_without_running_the_module(tmp_path):
    file = tmp_path / "module.py"
    file.write_text('"""Top."""\nclass C:\n    """Class."""\n    x = "\\d"\nraise SystemExit\n')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert python._docstrings(file) == "Top.\n\nClass."
    file.write_text("def broken(:")
    assert python._docstrings(file) == ""


def test_only_the_library_itself_is_read(tmp_path):
    for name in ("os.py", "json/decoder.py", "site-packages/numpy.py", "test/test_os.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    modules = [str(file.relative_to(tmp_path)) for file in python._modules(tmp_path)]
    assert modules == ["json/decoder.py", "os.py"]


def test_wikitext_files_give_articles():
    if "KD_JAX_DATA" not in os.environ:
        pytest.skip("KD_JAX_DATA is not set")
    folder = Path(os.environ["KD_JAX_DATA"]) / "wikitext-2-raw"
    documents = list(source.read({"path": str(folder / "wiki.valid.raw")}, "data.train"))
    assert len(documents) == 60  # as WikiText-2's authors count them
    assert documents[0].startswith("= Homarus gammarus =\nHomarus gammarus , known as")
    words = sum(len(document.split()) for document in documents)
    assert words == len((folder / "wiki.valid.raw").read_text().split())  # nothing is lost
