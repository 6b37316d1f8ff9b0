"""The Python API: docs/python.md is run as it stands; what rows may be; what is refused."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "python.md"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The names that the page's code defines, run in an empty folder."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks[0].strip().splitlines()) <= 15 and len(blocks) == 4
    names, here = {}, tmp_path_factory.mktemp("python")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    return names | {"here": here}
