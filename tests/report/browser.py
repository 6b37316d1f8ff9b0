"""Opens pages in a Chromium without a window, offline."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt-get install chromium)"
)
_FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
  --disable-background-networking --disable-component-update --disable-sync --hide-scrollbars
  --enable-logging=stderr --dump-dom""".split()


def ask(page: Path, script: str, width: int) -> tuple[dict, list[str]]:
    """What an expression is worth in the loaded page, and the complaints on the console.

    A copy of the page stands in a frame, since a window is 500 pixels wide at least. The script
    in it tells its value, as JSON, through the title of the page around.
    """
    tell = f"parent.document.title = JSON.stringify({script})"
    run = f"<script>addEventListener('load', () => {{ {tell} }})</script></body>"
    inside = html.escape(page.read_text().replace("</body>", run))
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{inside}"></iframe>'
    around = page.with_name(f"{page.stem}_{width}.html")
    around.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>?</title><body>{frame}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        settings = [f"--user-data-dir={profile}", "--window-size=1400,1000"]
        done = subprocess.run(
            [CHROMIUM, *_FLAGS, *settings, around.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)[1]
    complaints = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(title)), complaints
