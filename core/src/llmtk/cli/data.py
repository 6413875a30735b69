"""`llmtk data show`, `llmtk data check` and `llmtk data stats`: a run's data, without a model."""

from __future__ import annotations

import contextlib
import sys
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any
from unicodedata import category

import click

from llmtk.cli.run import layers_of, sort_words
from llmtk.cli.tables import as_json
from llmtk.errors import ConfigurationError
from llmtk.reporting.console import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmtk.contract import Data, Dataset
    from llmtk.data import Splits
    from llmtk.run import Run

SPLITS = ("train", "eval", "test")
BAR = 40
"""Characters of a histogram's longest bar."""
_words = click.argument("words", nargs=-1, metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...")
_json = click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")


@click.group("data")
def command() -> None:
    """Look at a run's data, as `llmtk run` with the same words would read it. No model is loaded, nothing is written.

    \b
    llmtk data show sft model.name_or_path=MODEL data.train=FILE     the first rows, token by token
    llmtk data check sft data.train=FILE                             every bad row
    llmtk data stats config.yaml                                     lengths, share of targets, duplicates
    """


@command.command("show")
@_words
@click.option("--rows", default=3, show_default=True, type=click.IntRange(min=1), help="How many rows.")
@click.option("--split", default="train", show_default=True, type=click.Choice(SPLITS), help="Which split.")
@_json
def show(words: tuple[str, ...], rows: int, split: str, for_scripts: bool) -> None:
    """Show the first rows as the model will see them.

    Tokens are parted by a dot. What the loss is taken on stands behind a >, in green on a terminal.
    """
    run, data = _encoded(words, quiet=for_scripts)
    encoded = _split(data, split)
    shown = [encoded[index] for index in range(min(rows, len(encoded)))]
    if for_scripts:
        as_json([_described(run, row) for row in shown])
        return
    for number, row in enumerate(shown, start=1):
        click.echo("\n".join([f"row {number} of {len(encoded):,}: {row.get('place', '')}", *_lines(run, row), ""]))


@command.command("check")
@_words
@click.pass_context
def check(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Name every row that cannot be used, by file and line. Exits with 1 if there is one.

    Where a model or a tokenizer is named, rows are tokenised too: what would be cut or left out is said. Weights are
    never loaded.
    """
    from llmtk.data.reading import check_sources

    run = _run(words)
    reading = check_sources(run.config.data, run.stage.row_types)
    for problem in reading.bad:
        click.echo(": ".join(filter(None, problem)))
    if reading.bad:
        click.echo(f"{counted(len(reading.bad), 'problem')} in {counted(reading.total, 'row')}.")
        ctx.exit(1)
    model = run.config.model
    if (model.name_or_path or model.from_config) and not run.config.data.streaming:
        data = run.load_data()
        left = sum(len(rows) for name in SPLITS if (rows := getattr(data, name)) is not None)
        click.echo(f"No problem in {counted(reading.total, 'row')}; as the stage encodes them: {left:,}.")
    else:
        why = "they are streamed" if run.config.data.streaming else "no model is named"
        click.echo(f"No problem in {counted(reading.total, 'row')}. Nothing was tokenised: {why}.")


@command.command("stats")
@_words
@_json
def stats(words: tuple[str, ...], for_scripts: bool) -> None:
    """Count rows, tokens, targets and duplicates, and show how long the rows are."""
    run, data = _encoded(words, quiet=for_scripts)
    found = {name: _counted(run.splits, data, name) for name in SPLITS if getattr(data, name) is not None}
    if for_scripts:
        as_json(found)
    else:
        click.echo("\n".join(line for name, split in found.items() for line in _summary(name, split)))


def _run(words: Sequence[str]) -> Run:
    asked = sort_words(words)
    layers = layers_of(asked)
    from llmtk.run import Run

    return Run.from_layers(asked.stage, *layers)


def _encoded(words: Sequence[str], *, quiet: bool) -> tuple[Run, Data]:
    """Return the run and its data; what there is to say goes to stderr where stdout is for a script."""
    run = _run(words)
    if run.config.data.streaming:
        raise ConfigurationError(
            "data.streaming: all rows are read first here. Set data.streaming=false, and name as many rows as fit"
        )
    with contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
        return run, run.load_data()


def _split(data: Data, name: str) -> Dataset:
    rows: Dataset | None = getattr(data, name)
    if rows is None:
        raise click.UsageError(f"There is no split {name}: the configuration has no data.{name}.")
    return rows


def _described(run: Run, row: Any) -> dict[str, Any]:
    from llmtk.data.statistics import sequences

    parts = [
        {
            "name": name,
            "input_ids": [int(token) for token in ids],
            "tokens": list(map(str, run.tokenizer.convert_ids_to_tokens([int(token) for token in ids]))),
            "targets": targets.tolist(),
        }
        for name, ids, targets in sequences(row)
    ]
    return {"place": row.get("place", ""), "sequences": parts}


def _lines(run: Run, row: Any) -> Iterator[str]:
    """Yield an encoded row's parts as lines, each of targets alone or of no target."""
    from llmtk.data.statistics import sequences

    parts = list(sequences(row))
    for name, ids, targets in parts:
        heading = "" if len(parts) == 1 else f"{name}, "
        yield f"  {heading}{len(ids):,} tokens, {int(targets.sum()):,} of them targets"
        pairs = zip(ids, targets.tolist(), strict=True)
        for is_target, group in groupby(pairs, key=lambda pair: pair[1]):
            text = "·".join(_text(run, int(token)) for token, _ in group)
            yield f"  > {click.style(text, fg='green')}" if is_target else f"    {text}"


def _text(run: Run, token: int) -> str:
    """Return a token's text on one line; a part of a character, which has none, as the vocabulary spells it."""
    text = run.tokenizer.decode([token])
    if "\ufffd" in text:
        text = str(run.tokenizer.convert_ids_to_tokens(token))
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    return "".join("\ufffd" if category(character) == "Cc" else character for character in shown)


def _counted(splits: Splits, data: Data, name: str) -> dict[str, Any]:
    from llmtk.data.statistics import histogram, repeated, statistics

    rows, encoded = getattr(splits, name), statistics(getattr(data, name))
    lengths = sorted(encoded.lengths.tolist())
    return {
        "rows": len(rows),
        "encoded": len(lengths),
        "tokens": encoded.tokens,
        "targets": encoded.targets,
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "histogram": histogram(encoded.lengths),
        "duplicates": repeated(rows),
        "in_train": [] if name == "train" else repeated(rows, splits.train),
    }


def _summary(name: str, found: dict[str, Any]) -> Iterator[str]:
    encoded = "" if found["encoded"] == found["rows"] else f" (as the stage encodes them: {found['encoded']:,})"
    share = found["targets"] / max(found["tokens"], 1)
    yield f"{name}: {counted(found['rows'], 'row')}{encoded}"
    yield f"  {found['tokens']:,} tokens, {found['targets']:,} of them targets ({share:.1%})"
    yield f"  {found['shortest']:,} to {found['longest']:,} tokens a row, the median {found['median']:,}"
    most = max(rows for *_, rows in found["histogram"])
    steps = [(f"{start:,} to {stop:,}", rows) for start, stop, rows in found["histogram"]]
    width = max(len(label) for label, _ in steps)
    for label, rows in steps:
        yield f"    {label:>{width}}  {'█' * -(-BAR * rows // most)} {rows:,}".rstrip()
    for key, told in (
        ("duplicates", "rows that stand there a second time"),
        ("in_train", "rows that are in train too"),
    ):
        if places := found[key]:
            named = ", ".join(f"{place} as {first}" for place, first in islice(places, 3))
            yield f"  {told}: {len(places):,} ({named}{', ...' if len(places) > 3 else ''})"
