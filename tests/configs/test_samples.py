"""Made-up data of `:smoke`: the user's own, and always the same."""

import tempfile

from kd_jax.smoke import samples


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}


def test_made_up_data_is_the_users_own_and_always_the_same(tmp_path, monkeypatch, caplog):
    """Not under a name that all users of a machine share, where another may have made it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "shared"))
    found = []
    for user in ("first", "second"):
        monkeypatch.setenv("KD_JAX_CACHE", str(tmp_path / user))
        root = samples()
        assert root.is_relative_to(tmp_path / user) and samples() == root
        found.append(contents(root))
    assert found[0] == found[1] and len(found[0]) > 15

    spoilt = root / "SST-2" / "train.tsv"
    spoilt.write_bytes(spoilt.read_bytes().replace(b"\t1", b"\t0", 1))
    assert contents(samples()) == found[0] and f"{spoilt} is damaged" in caplog.text
