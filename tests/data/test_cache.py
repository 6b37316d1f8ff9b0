"""Files made once, and where they are kept."""

import threading

from kd_jax.data import cache


def test_one_writer_at_a_time(tmp_path):
    order = []

    def second():
        with cache.lock(tmp_path / "x.lock"):
            order.append("second")

    with cache.lock(tmp_path / "x.lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_the_cache_folder_is_the_config_or_the_environment_or_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_JAX_CACHE", "/from/environment")
    assert str(cache.folder("/from/config")) == "/from/config"
    assert str(cache.folder(None)) == "/from/environment"
    monkeypatch.delenv("KD_JAX_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder(None) == tmp_path / ".cache" / "kd_jax"


def test_a_file_is_made_once_and_whole(tmp_path):
    file, calls = tmp_path / "new" / "x.bin", []

    def write(path):
        calls.append(path.name)
        path.write_text("whole")
        assert not file.exists()

    assert [cache.once(file, write) for _ in range(2)] == [False, True]
    assert len(calls) == 1 and file.read_text() == "whole"
    assert sorted(path.name for path in file.parent.iterdir()) == ["x.bin", "x.lock"]
