"""Predictions of whole files: rows in, one JSON line a row out, and on with it where a former call stopped."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, DatasetError, LlmtkError

if TYPE_CHECKING:
    from llmtk.data.rows import Prompt
    from llmtk.generation import Completion, Sampling
    from llmtk.inference.model import TextModel

STDOUT = "-"
REFERENCES = ("reference", "answer")
"""Columns that hold what a row's completion should have been, the first that there is."""
CHUNKS = 4
"""Rows are written out after so many times what is generated side by side: what ends early makes room for the next."""

NO_METRICS = (
    "No metric of text is installed to measure them against {0!r}: "
    "pip install llmtk-plugin-text-metrics brings BLEU, ROUGE and others"
)

Line = dict[str, Any]


def predict(
    model: TextModel,
    rows: Sequence[Prompt],
    sampling: Sampling,
    output: Output,
    progress: Callable[[int], None] = lambda done: None,
    notices: list[str] | None = None,
) -> list[Line]:
    """Answer rows and write a line for each, in their order; return all lines, those of a former call too.

    A row's random numbers follow from `sampling.seed` and its place among the rows, so that a file comes out the same
    however often it was interrupted, and with any batch size. `progress` is told how many rows are done.
    """
    heads = [beginning_of(row) for row in rows]
    output.check(heads, sampling.n)
    prompts = model.tokens(rows, notices)
    start = len(output.lines)
    progress(start)
    size = max(1, CHUNKS * sampling.batch_size // sampling.n)
    for begin in range(start, len(rows), size):
        end = min(begin + size, len(rows))
        seeds = [(sampling.seed << 32) + number for number in range(begin, end)]
        answers = model.generate(prompts[begin:end], sampling, seeds)
        written = zip(heads[begin:end], answers, strict=True)
        output.write([head | _said(model, completions) for head, completions in written])
        progress(end)
    return output.lines


def beginning_of(row: Prompt) -> Line:
    """Return what a row's line in the output begins with: the row. Its own `completion` is the `reference`.

    DatasetError where a column has the name of something that the line holds besides.
    """
    columns = dict(row.columns)
    if "completion" in columns and "reference" not in columns:
        columns["reference"] = columns.pop("completion")
    taken = ("prompt", "tools", "completion", "completions", "stopped")
    if clash := [name for name in taken if name in columns]:
        raise DatasetError(f"{row.place}: the output has a column {clash[0]} of its own. Give the row's another name")
    return {"prompt": row.prompt, **({"tools": row.tools} if row.tools else {}), **columns}


def reference_column(lines: Sequence[Line], wanted: str | None = None, option: str = "--reference") -> str | None:
    """Return the column that predictions are measured against, or None. ConfigurationError if no row has it."""
    if wanted is None:
        return next((name for name in REFERENCES if any(name in line for line in lines)), None)
    if not any(wanted in line for line in lines):
        known = ", ".join(dict.fromkeys(name for line in lines for name in line))
        raise ConfigurationError(f"{option} {wanted}: no row has such a column; there are {known}")
    return wanted


def measured(lines: Sequence[Line], reference: str) -> tuple[list[str], list[str]]:
    """Return predictions and references of the lines that have one; of several completions, the first is measured."""
    chosen = [line for line in lines if line.get(reference) is not None]
    predictions = [line["completion"] if "completion" in line else line["completions"][0] for line in chosen]
    return predictions, [_as_text(line[reference]) for line in chosen]


def _as_text(value: Any) -> str:
    """Return a reference as text; of messages, the last one's."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _said(model: TextModel, completions: Sequence[Completion]) -> Line:
    texts, ends = [model.text(each) for each in completions], [each.stopped for each in completions]
    if len(completions) == 1:
        return {"completion": texts[0], "stopped": ends[0]}
    return {"completions": texts, "stopped": list(ends)}


@dataclass
class Output:
    """A file of lines that only grows, or standard output."""

    name: str
    stream: IO[str]
    lines: list[Line] = field(default_factory=list)
    """What it holds, lines of a former call first."""

    def check(self, heads: Sequence[Line], n: int) -> None:
        """Check that the lines of a former call answer these rows, as often. ConfigurationError where they do not."""
        if len(self.lines) > len(heads):
            raise ConfigurationError(
                f"{self.name} holds {len(self.lines)} rows, and the data has {len(heads)}: it is of other data. Give "
                "another --output"
            )
        for number, (line, head) in enumerate(zip(self.lines, heads, strict=False), start=1):
            answered = len(line["completions"]) if "completions" in line else 1
            if {name: line.get(name) for name in head} != head or answered != n:
                what = "answers another row" if answered == n else f"holds {answered} completions, not {n}"
                raise ConfigurationError(
                    f"{self.name}:{number} {what}: it was begun with other data or settings. Give another --output"
                )

    def write(self, lines: Sequence[Line]) -> None:
        """Append lines and make them durable. LlmtkError where they cannot be written."""
        try:
            self.stream.write("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
            self.stream.flush()
            if self.name != STDOUT:
                os.fsync(self.stream.fileno())
        except BrokenPipeError:
            raise
        except OSError as error:
            raise LlmtkError(
                f"{self.name} cannot be written: {error.strerror}. Its first {len(self.lines)} rows stand; go on with "
                "--resume once the cause is mended"
            ) from error
        self.lines += lines


@contextmanager
def open_output(name: str, *, resume: bool = False) -> Iterator[Output]:
    """Open a file of predictions, which nobody else writes to meanwhile; `-` is standard output.

    With `resume` it may hold rows already, and half a row at its end is cut off. ConfigurationError for a file that is
    there without it, or cannot be written; one that was not written to is not left behind.
    """
    if name == STDOUT:
        yield Output(name, sys.stdout)
        return
    path = Path(name).expanduser()
    was_there = path.exists()
    try:
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {name} cannot be written: {error.strerror}") from error
    try:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigurationError(f"--output {name} is being written to by another process") from None
        yield Output(name, stream, _former(path, resume))
    finally:
        with suppress(OSError):  # on a full disk the last rows fail a second time
            stream.close()
        if not was_there and not path.stat().st_size:
            path.unlink()


def _former(path: Path, resume: bool) -> list[Line]:
    """Return the lines of a former call, and cut off half a line behind them."""
    text = path.read_bytes()
    if text and not resume:
        rows = text.count(b"\n")
        raise ConfigurationError(
            f"--output {path} exists already, with {rows} rows. Go on with it: --resume, or give another file"
        )
    whole = text.rfind(b"\n") + 1
    lines = []
    for number, line in enumerate(text[:whole].split(b"\n")[:-1], start=1):
        try:
            lines.append(_line(json.loads(line)))
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{path}:{number} is no line of predictions. Give another --output") from None
    if whole < len(text):
        os.truncate(path, whole)
    return lines


def _line(value: Any) -> Line:
    """Return a line of predictions. KeyError or TypeError for anything else."""
    if "completions" in value:
        len(value["completions"])
    else:
        value["completion"]
    value["stopped"]
    return dict(value)
