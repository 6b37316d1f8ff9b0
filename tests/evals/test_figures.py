import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from kd_jax.evals import pictures


@pytest.fixture
def drawn(monkeypatch):
    """The matplotlib figures that were saved."""
    saved, save = [], Figure.savefig

    def keep(self, *args, **settings):
        saved.append(self)
        save(self, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def notes(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def frames(figure):
    return [p.get_xy() for p in figure.axes[0].patches if isinstance(p, Rectangle)]


def test_confusion_matrix(tmp_path, drawn):
    path = tmp_path / "new" / "confusion.png"
    written = pictures.confusion_matrix(["no", "yes"], [[9000, 1000], [1, 3]], path, "student")
    assert written == str(path)
    assert imread(path)[..., :3].std() > 0.05
    assert notes(drawn[0]) == ["9,000", "1,000", "1", "3"]
    shares = drawn[0].axes[0].images[0].get_array()
    np.testing.assert_allclose(shares, [[0.9, 0.1], [0.25, 0.75]])
    assert frames(drawn[0]) == []


def test_a_class_that_never_occurs(tmp_path, drawn):
    pictures.confusion_matrix(["a", "b"], [[0, 0], [1, 3]], tmp_path / "c.png")
    assert drawn[0].axes[0].images[0].get_array()[0].tolist() == [0, 0]


@pytest.mark.parametrize(("bigger", "corner"), [(True, (0.5, -0.5)), (False, (-0.5, 0.5))])
def test_heat_map_marks_the_best(tmp_path, drawn, bigger, corner):
    values = [[0.91, 0.93], [0.90, np.nan]]
    path = tmp_path / "sweep.png"
    labels = ("alpha", "temperature", "accuracy")
    pictures.heat_map(["0.5", "1"], ["1", "2"], values, path, "sst2", labels, bigger)
    assert path.exists()
    assert notes(drawn[0]) == ["0.9100", "0.9300", "0.9000", ""]
    assert frames(drawn[0]) == [corner]
    axes = drawn[0].axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("alpha", "temperature")


def test_a_heat_map_of_nothing(tmp_path, drawn):
    pictures.heat_map(["1"], ["1"], [[np.nan]], tmp_path / "sweep.png")
    assert notes(drawn[0]) == [""] and frames(drawn[0]) == []


def test_large_matrices_carry_no_numbers(tmp_path, drawn):
    names = [f"intent_{i}" for i in range(77)]
    pictures.confusion_matrix(names, np.eye(77), tmp_path / "c.png")
    assert notes(drawn[0]) == []
