import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from kd_jax.data import source
from kd_jax.errors import UserError


class Notes(tfds.core.GeneratorBasedBuilder):
    """A tiny dataset."""

    code_path = Path(__file__)  # tfds would import this test to find it
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        answers = tfds.features.Sequence({"word": tfds.features.Text(), "at": np.int64})
        features = {"text": tfds.features.Text(), "number": np.int64, "answers": answers}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for number in range(count):
            answers = {"word": ["ö", "n"][:number], "at": [1, 0][:number]}
            yield number, {"text": f"nöte {number}", "number": number, "answers": answers}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    builder = Notes(data_dir=tmp_path_factory.mktemp("tfds"), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


def read(path, where="data.train", **keys):
    return source.read({"source": "tfds", "path": path, **keys}, where)


def test_a_prepared_dataset_is_read_without_tensorflow(folder):
    assert sorted(read(folder)) == [f"nöte {number}" for number in range(5)]
    assert len(list(read(folder, "data.test"))) == 2
    assert "tensorflow" not in sys.modules


def test_all_features_of_a_prepared_dataset(folder):
    found = source.table({"source": "tfds", "path": folder}, "data.test")
    rows = sorted(zip(*found.columns.values(), strict=True), key=lambda row: "nöte 1" in row)
    columns = sorted(found.columns)
    assert columns == ["answers", "number", "text"]
    assert [dict(zip(found.columns, row, strict=True)) for row in rows] == [
        {"text": "nöte 0", "number": 0, "answers": {"word": [], "at": []}},
        {"text": "nöte 1", "number": 1, "answers": {"word": ["ö"], "at": [1]}},
    ]
    assert found.place(1) == f"tfds {folder}:test, row 1"


def test_mistakes_list_what_there_is(folder, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="validation.split.: .*have: train, test"):
        read(folder, "data.validation")
    with pytest.raises(UserError, match="no text in 'number'; set config.data.train.text .*: text"):
        read(folder, text="number")
    with pytest.raises(UserError, match="no tfds dataset 'imdb_revs' .*imdb_revs not found"):
        read("imdb_revs")
    with pytest.raises(UserError, match="'imdb_reviews' is not prepared .*tfds build"):
        read("imdb_reviews")
