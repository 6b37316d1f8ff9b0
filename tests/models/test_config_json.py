"""Class names: read from config.json, written to it."""

import re

import pytest

from kd_jax.errors import UserError
from kd_jax.models import config_json
from kd_jax.models import family as families
from tests.models import tiny


def read(**keys):
    return families.read(tiny.CONFIGS["bert"] | keys)


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 2}, ("a", "b")),
        ({"id2label": {str(i): f"c{i}" for i in range(11)}}, tuple(f"c{i}" for i in range(11))),
        ({"id2label": {"0": "score"}, "problem_type": "regression"}, ("score",)),
    ],
)
def test_reads(keys, expected):
    assert read(**keys)[1].labels == expected


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"id2label": {"1": "a", "2": "b"}}, "have: 1, 2"),
        ({"id2label": {}}, "have: none"),
        ({"id2label": {"0": "a"}, "num_labels": 2}, "where that is given (2); have: 0"),
        ({"num_labels": 0}, "have: none"),
        ({"id2label": ["a", "b"]}, "id2label should be dict"),
        (
            {"id2label": {"0": "other", "1": "good", "2": "other"}},
            "id2label gives classes 0 and 2 one name, 'other'",
        ),
        ({"problem_type": "multi_label_classification"}, "problem_type='multi_label"),
        ({"problem_type": "regression"}, "problem_type='regression' with 2 labels"),
    ],
)
def test_refuses(keys, says):
    with pytest.raises(UserError, match=re.escape(says)) as error:
        read(**keys)
    assert str(error.value).startswith("config.json: ")


def test_writes_what_it_reads():
    family, config = read(num_labels=3)
    written = families.write(family, config, "classification")
    assert "num_labels" not in written
    assert written["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert written["label2id"] == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert written["problem_type"] == "single_label_classification"
    assert families.read(written)[1] == config
    # HF takes the width of a span head from the number of labels.
    assert "id2label" not in families.write(family, config, "span")
    family, config = read(id2label={"0": "score"})
    assert families.write(family, config, "classification")["problem_type"] == "regression"


def test_order():
    assert config_json.order_in_file(("a", "b", "c"), ("C", "a", "b")) == [1, 2, 0]
    assert config_json.order_in_file(("a", "b"), ("LABEL_0", "LABEL_1")) == [0, 1]
    assert config_json.order_in_file(("a", "a"), ("a", "a")) == [0, 1]
