"""Plug-ins of one's own: modules in a folder that kd_jax finds as it finds its own."""

from pathlib import Path
from types import ModuleType

import pytest


def plug_in(
    monkeypatch: pytest.MonkeyPatch, folder: Path, package: ModuleType, name: str, source: str
) -> None:
    """Writes `source` to a new folder below `folder`, as the module NAME of a package of kd_jax."""
    place = folder / package.__name__.rpartition(".")[2]
    place.mkdir()
    (place / f"{name}.py").write_text(source)
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(place)])
