"""No process holds more of a model than its devices do."""

from benchmarks import start_up
from tests import forked


def test_memory_of_two_processes(monkeypatch):
    monkeypatch.setattr(start_up.subprocess, "run", forked.run)  # what writes the model
    for found in start_up.measure(layers=12, width=640):
        assert 0.5 < found["teacher"]["RssAnon"] <= 0.75
        assert found["student"]["RssAnon"] <= 0.45  # of it: 0.57, half of which is here
