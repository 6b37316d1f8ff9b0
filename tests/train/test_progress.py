import contextlib
import io
import re
import sys

import pytest
from rich.console import Console

from kd_jax.train.progress import ProgressBar, wrapped

LOSSES = {"loss": 3.0171, "ce": 6.0251, "kl": 0.00434, "hidden": 1.2345, "attention": 0.12345}


def terminal(width):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def seen(console):
    """The lines as they were drawn, one after the other, without what moves the cursor."""
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", console.file.getvalue())
    return [line.rstrip() for line in re.split("[\r\n]+", text)]


def test_a_line_breaks_between_words_and_keeps_numbers_with_their_names():
    line = "student 2/4  held out: loss 6.0706, perplexity 432.9251, agreement 0.7708, kl -0.0028"
    for width in range(24, 100):
        lines = wrapped(line, width).split("\n")
        assert max(map(len, lines)) <= width
        assert " ".join(part.strip() for part in lines).split() == line.split()
        for pair in ("student 2/4", "loss 6.0706,", "agreement 0.7708,", "kl -0.0028"):
            assert any(pair in part for part in lines)


def test_a_path_stays_whole():
    path = "/a/long-folder/with many/of-them" + "/more" * 20
    assert path.split()[-1] in wrapped(f"student: 42 parameters: {path}", 40).split()


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_bar_is_one_line_of_whole_figures(width):
    console = terminal(width)
    bar = ProgressBar("intermediate", 0, 20_000, console)
    bar.update(11_000, LOSSES, 123_456.0)
    bar._bar.refresh()
    drawn = [line for line in seen(console) if "11000/20000" in line]
    assert drawn and "…" not in "".join(drawn)
    assert all(len(line) <= width and "loss 3.017" in line for line in drawn)
    assert all(line.split()[-3:-1] == ["123,456", "tokens/s"] for line in drawn)
    assert ("hidden 1.234" in drawn[-1]) == (width == 120)
    bar.close()


def test_a_bar_leaves_a_line_behind_as_in_a_log_file():
    console = terminal(120)
    bar = ProgressBar("teacher", 0, 4, console)
    bar.update(4, {"loss": 6.138}, 10_429.0)
    bar.say("teacher 4/4  held out: loss [6.1458]")
    bar.close()
    lines = seen(console)
    assert "teacher 4/4  held out: loss [6.1458]" in lines
    assert [line for line in lines if line][-1] == "teacher 4/4  loss 6.138  10,429 tokens/s"


def test_what_is_printed_meanwhile_goes_above_the_bar():
    console = terminal(80)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        stderr.isatty = lambda: True
        bar = ProgressBar("teacher", 0, 4, console)
        print("a line", file=sys.stderr)
        bar.close()
    assert "a line" in seen(console) and stderr.getvalue() == ""


def test_an_error_log_in_a_file_keeps_its_lines():
    console = terminal(80)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        bar = ProgressBar("teacher", 0, 4, console)
        print("a line", file=sys.stderr)
        bar.close()
    assert "a line" not in seen(console) and stderr.getvalue() == "a line\n"


def test_a_file_gets_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    bar = ProgressBar("teacher", 0, 2, console)
    bar.update(1, LOSSES, 5.0)
    bar.update(2, LOSSES, 5.0)
    bar.say("teacher 2/2  held out: loss [6.1458], perplexity 481.43, agreement 0.7350")
    bar.close()
    assert console.file.getvalue().splitlines() == [
        "teacher 2/2  loss 3.017  ce 6.025  kl 0.00434  hidden 1.234  attention 0.1235  5 tokens/s",
        "teacher 2/2  held out: loss [6.1458], perplexity 481.43, agreement 0.7350",
    ]
