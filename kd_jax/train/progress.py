"""Shows the progress of training: a bar on a terminal, lines in a log file."""

import datetime
import re
import sys
import textwrap
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0  # between lines where the output is no terminal
_BAR, _REST = 16, 12  # columns of the bar; of the time left and the gaps


def wrapped(text: str, width: int) -> str:
    """Wraps a text into lines of at most `width` columns; a number stays with the word before it,
    and a longer word, such as a path, is not broken."""
    kept = re.sub(r"(?<=\w) (?=-?\d)", "\xa0", text)
    lines = textwrap.wrap(
        kept, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\xa0", " ")


class ProgressBar:
    """A progress bar of a stage from step `start` to `steps`, with losses and tokens a second.

    When it ends, the bar leaves a line, as in a log file; everything that is printed or logged
    meanwhile (`cli.start_jax`) appears above it.
    """

    def __init__(
        self,
        stage: str,
        start: int,
        steps: int,
        console: Console | None = None,
        quiet: bool = False,
    ):
        self._console = console or Console(quiet=quiet)
        self._stage, self._steps = stage, steps
        # Step and time after the first, which compiles.
        self._first: tuple[int, float] | None = None
        self._last_line = time.monotonic()
        self._bar, self._line, self._compiled = None, "", False
        if self._console.is_terminal and not self._console.quiet:
            columns = [
                TextColumn("[bold]{task.description}"),
                BarColumn(_BAR),
                TextColumn("{task.completed}/{task.total} {task.fields[status]}"),
                TimeRemainingColumn(compact=True),
            ]
            self._bar = Progress(
                *columns,
                console=self._console,
                transient=True,
                redirect_stderr=sys.stderr.isatty(),  # what goes to a file stays there
            )
            self._task = self._bar.add_task(stage, total=steps, completed=start, status="")
            self._bar.start()

    def update(self, step: int, losses: dict[str, float], tokens_per_second: float) -> None:
        """Redraws the bar after `step` steps."""
        found = [f"{name} {value:.4g}" for name, value in losses.items()]
        if tokens_per_second:
            found.append(f"{tokens_per_second:,.0f} tokens/s")
        self._line = "  ".join([f"{self._stage} {step}/{self._steps}", *found])
        if self._bar is not None:
            room = self._console.width - len(f"{self._stage} {step}/{self._steps}") - _BAR - _REST
            while len(found) > 1 and len("  ".join(found)) > room:
                del found[-2 if len(found) > 2 else -1]  # the last of the terms
            self._bar.update(self._task, completed=step, status="  ".join(found))
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        if now - self._last_line >= _LINE_SECONDS or step == self._steps:
            self._last_line, line = now, self._line
            if self._first[0] < step < self._steps:
                seconds = (now - self._first[1]) / (step - self._first[0])
                left = datetime.timedelta(seconds=round(seconds * (self._steps - step)))
                line += f"  {str(left).removeprefix('0:')} left"
            self.say(line)

    def compiling(self, shape: tuple[int, int]) -> None:
        """Shows that the step is being compiled for batches of a shape (rows, tokens); the first
        time on a separate line."""
        text = f"compiling the step for {shape[0]} rows of {shape[1]} tokens ..."
        if self._bar is not None:
            self._bar.update(self._task, status=text)
        elif not self._compiled:
            self.say(f"{self._stage}: {text}")
        self._compiled = True

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._console.is_terminal:
            text = wrapped(text, self._console.width)
        self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            if self._line:
                self.say(self._line)
            self._bar = None
