"""What the user sees while a run goes on: a live display on a terminal, plain lines in a pipe."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from typing import TYPE_CHECKING, Any

from llmtk.reporting.logs import LOGGER

if TYPE_CHECKING:
    from llmtk.training.events import Evaluation, StepReport


NAME = 11
"""Columns that the name takes in a line of a plan."""


class Console:
    """Talks to the user from the main process; the other ranks are silent."""

    def __init__(self) -> None:
        self.speaks = True
        self._progress: Any = None
        self._task: Any = None
        self._last = 0.0

    def say(self, message: str) -> None:
        """Print a line, above the live display if there is one, and log it."""
        self._say(message, message)

    def say_field(self, line: str) -> None:
        """Print a line of a plan, in several of the terminal's if it is too long for one, and log it."""
        self._say(line, wrapped(line))

    def _say(self, message: str, shown: str) -> None:
        if not self.speaks:
            return
        LOGGER.info(message)
        if self._progress is not None:
            self._progress.console.print(shown, markup=False, highlight=False, soft_wrap=True)
        else:
            print(shown, flush=True)

    def show(self, table: Any) -> None:
        """Print a table of rich's, above the live display if there is one."""
        if not self.speaks:
            return
        from rich.console import Console as Terminal

        (Terminal() if self._progress is None else self._progress.console).print(table)

    def begin(self, steps: int, done: int) -> None:
        """Open the live display, if the output is a terminal."""
        if not self.speaks or not sys.stdout.isatty():
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.table import Column

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}{task.fields[reward]}"),
            TextColumn("{task.fields[speed]}"),
            # In 80 columns it is the bar that gives way.
            TimeElapsedColumn(table_column=Column(min_width=7)),
            TextColumn("left"),
            TimeRemainingColumn(table_column=Column(min_width=7)),
        )
        self._task = self._progress.add_task("train", total=steps, completed=done, loss="-", reward="", speed="")
        self._progress.start()

    def step(self, report: StepReport, tokens_per_second: float) -> None:
        """Show a step; in a pipe nothing, since each line of the log is printed."""
        if self._progress is not None and (time.monotonic() - self._last > 0.1 or report.step == 1):
            self._last = time.monotonic()
            speed = f"{tokens_per_second:,.0f} tokens/s"
            self._progress.update(self._task, completed=report.step, loss=f"{decimal(report.loss)}", speed=speed)

    def log(self, line: dict[str, Any], steps: int, tokens_per_second: float) -> None:
        """Print a line of metrics; on a terminal the live display shows them."""
        if self._progress is not None and "reward" in line:
            self._progress.update(self._task, reward=f"  reward {line['reward']:.3g}")
        told = "".join(f"{name} {decimal(line[name])}  " for name in ("loss", "reward") if name in line)
        if told and self.speaks:
            say = self.say if self._progress is None else LOGGER.info
            say(
                f"step {line['step']}/{steps}  {told}grad_norm {decimal(line['grad_norm'], 3)}  "
                f"lr {line['learning_rate']:.2e}  epoch {line['epoch']:.2f}  {tokens_per_second:,.0f} tokens/s"
            )

    def evaluation(self, evaluation: Evaluation) -> None:
        """Print an evaluation."""
        values = "  ".join(f"{name} {decimal(value)}" for name, value in evaluation.metrics.items())
        self.say(f"step {evaluation.step}  {values}{'  (best so far)' if evaluation.is_best else ''}")

    def end(self, step: int) -> None:
        """Close the live display."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
            self._progress.stop()
            self._progress = None


def decimal(value: float, places: int = 4) -> str:
    """Return a number with these decimal places; one of a million and more by its first digits: 1.59e+13."""
    return f"{value:.{places}f}" if abs(value) < 1e6 else f"{value:.3g}"


def counted(count: int, what: str) -> str:
    """Return `1 row`, `1,000 rows`."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def wrapped(line: str) -> str:
    """Return a line of a plan as a terminal is to show it: one that is too long for it goes on below what it says."""
    if not sys.stdout.isatty():
        return line
    width = shutil.get_terminal_size().columns
    below = " " * NAME if line[NAME - 1 : NAME] == " " else ""
    return textwrap.fill(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False)
