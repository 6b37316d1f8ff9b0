"""What a person sees while a stage trains: a bar on a terminal, lines in a log file."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 10.0  # between lines where the output is no terminal


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class ProgressBar:
    """Progress of one stage from step `start` to `steps`, with losses and tokens a second."""

    def __init__(self, stage: str, start: int, steps: int, console: Console | None = None):
        self._console = console or Console()
        self._stage, self._steps = stage, steps
        self._first: tuple[int, float] | None = (
            None  # step and time after the first, which compiles
        )
        self._last_line = time.monotonic()
        self._bar = None
        if self._console.is_terminal:
            columns = [
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} {task.fields[status]}"),
                TimeRemainingColumn(compact=True),
            ]
            self._bar = Progress(*columns, console=self._console, transient=False)
            self._task = self._bar.add_task(stage, total=steps, completed=start, status="")
            self._bar.start()

    def update(self, step: int, losses: dict[str, float], tokens_per_second: float) -> None:
        """`step` steps are done."""
        status = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if tokens_per_second:
            status += f"  {tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        if now - self._last_line >= _LINE_SECONDS or step == self._steps:
            self._last_line = now
            if step > self._first[0]:
                seconds = (now - self._first[1]) / (step - self._first[0])
                status += f"  {_duration(seconds * (self._steps - step))} left"
            self.say(f"{self._stage} {step}/{self._steps}  {status}")

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
