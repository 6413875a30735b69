"""`llmtk predict`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.asking import as_options, check_settings, sampling_of, sampling_options, template_option
from llmtk.cli.tables import aligned, as_json
from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from llmtk.inference.predictions import Line

SECONDS = 30
"""Between two lines of progress, where there is no terminal."""


@click.command("predict")
@click.argument("model", metavar="RUN|MODEL")
@click.option("--data", required=True, metavar="FILE|-", help="Rows to answer; - is standard input.")
@click.option("--output", default="-", metavar="FILE", help="One JSON line a row. By default to stdout.")
@click.option("--resume", is_flag=True, help="Go on with an output file: its rows are not answered again.")
@click.option("--reference", metavar="COLUMN", help="What is measured against. By default `reference` or `answer`.")
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME[.OPTION=VALUE]",
    help="An installed metric, or an option of one. May be repeated. By default all that need none.",
)
@template_option
@click.option("-n", "--n", type=int, default=1, show_default=True, help="Completions of each row.")
@sampling_options(max_new_tokens=64)
@click.option(
    "--batch-size", type=int, default=64, show_default=True, help="Completions written side by side, at most."
)
@click.option("--json", "for_scripts", is_flag=True, help="Print the metrics as JSON.")
def command(
    model: str,
    data: str,
    output: str,
    resume: bool,
    reference: str | None,
    metrics: tuple[str, ...],
    template: str | None,
    for_scripts: bool,
    **settings: Any,
) -> None:
    """Answer every row of a file with the model in a folder: a finished run's, or any that transformers loads.

    A row is a prompt, a question, or a dialogue, which is answered in place of its last turn; a .txt file has a
    question a line. The output has the row, its `completion`, and why it `stopped`, in the order of the data; with -n
    over 1 the `completions` in a list. Where rows have a column `reference` or `answer`, installed metrics of text are
    printed.
    """
    check_settings(settings)
    if output == "-" and (resume or for_scripts):
        raise click.UsageError(f"--{'resume' if resume else 'json'} needs --output, a file.")
    from llmtk.inference.predictions import beginning_of, open_output, predict, reference_column
    from llmtk.inference.prompts import read_prompts

    rows, are_questions = read_prompts(data)
    column = reference_column([beginning_of(row) for row in rows], reference)
    wanted = _metrics(metrics, column)
    with open_output(output, resume=resume) as opened, as_options():
        from llmtk.inference.model import LanguageModel

        asked = LanguageModel(model, template=template)
        if are_questions:
            rows = [asked.row(str(row.prompt), row.place) for row in rows]
        notices: list[str] = []
        sampling = sampling_of(asked, settings)
        try:
            with _progress(len(rows)) as done:
                lines = predict(asked, rows, sampling, opened, done, notices)
        except KeyboardInterrupt:
            if output != "-":
                click.echo(f"{output} holds {len(opened.lines)} of {len(rows)} rows; go on with --resume", err=True)
            raise
    for notice in notices:
        click.echo(notice, err=True)
    _say(lines, column, wanted, for_scripts=for_scripts, err=output == "-")


def _metrics(words: Sequence[str], column: str | None) -> dict[str, dict[str, Any]]:
    """Return the metrics to compute, with their options. Raises before anything runs where one cannot be."""
    from llmtk.config.reading import merge, parse_overrides
    from llmtk.metrics import resolve

    if words and column is None:
        raise ConfigurationError(
            f"--metric {words[0]}: no row has a column `reference` or `answer`; name one: --reference"
        )
    given = parse_overrides([word for word in words if "=" in word])
    if wrong := [name for name, options in given.items() if not isinstance(options, dict)]:
        raise ConfigurationError(f"--metric {wrong[0]}: an option is written NAME.OPTION=VALUE, as bleu.tokenize=char")
    named = merge({word: {} for word in words if "=" not in word}, given)
    found = resolve(named or None) if column is not None else {}
    return {name: dict(options) for name, (_, options) in found.items()}


def _say(
    lines: list[Line], column: str | None, metrics: dict[str, dict[str, Any]], *, for_scripts: bool, err: bool
) -> None:
    """Print what the predictions are worth, if that can be told."""
    from llmtk.inference.predictions import NO_METRICS, measured
    from llmtk.metrics import compute_metrics

    values: dict[str, float] = {}
    predictions, references = measured(lines, column) if column is not None else ([], [])
    if predictions and metrics:
        values = compute_metrics(predictions, references, metrics)
    elif predictions:
        click.echo(NO_METRICS.format(column), err=True)
    if for_scripts:
        as_json({"rows": len(lines), "reference": column, "measured": len(predictions), "metrics": values})
    elif values:
        click.echo(f"{len(predictions)} of {len(lines)} rows beside {column!r}", err=err)
        click.echo("\n".join(aligned([[name, f"{value:.4f}"] for name, value in values.items()])), err=err)


@contextmanager
def _progress(rows: int) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many rows are done: a live bar on a terminal, else a line now and then and at the end."""
    if sys.stderr.isatty():
        with _bar(rows) as update:
            yield update
        return
    begun = said = time.monotonic()

    def tell(done: int) -> None:
        nonlocal said
        if done == rows or time.monotonic() - said > SECONDS:
            said = time.monotonic()
            click.echo(f"{done}/{rows} rows, {said - begun:.1f} s", err=True)

    yield tell


@contextmanager
def _bar(rows: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left")
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task("predict", total=rows)
        yield lambda done: progress.update(task, completed=done)
