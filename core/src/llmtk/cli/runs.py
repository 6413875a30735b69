"""`llmtk runs`: list, show, compare."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.tables import aligned, as_json
from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from llmtk.reporting.stored import StoredRun

WIDEST = 48
"""Characters of a value in a table, at most."""


@click.group("runs")
def command() -> None:
    """List finished and unfinished runs, show one, or compare several."""


@command.command("list")
@click.argument("folder", default="runs")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def list_runs(folder: str, for_scripts: bool) -> None:
    """List the runs in FOLDER (runs) and below, the newest last."""
    from llmtk.reporting.stored import find_runs

    found = [_listed(path) for path in find_runs(folder)]
    if for_scripts:
        as_json(found)
    elif found:
        click.echo("\n".join(_list_lines(found)))
    else:
        click.echo(f"There is no run in {folder}. Train one: llmtk run STAGE")


@command.command("show")
@click.argument("run", metavar="RUN")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def show(run: str, for_scripts: bool) -> None:
    """Show what the run in the folder RUN consists of, and what came of it."""
    from llmtk.reporting.comparison import curves_asked
    from llmtk.reporting.stored import StoredRun

    stored = StoredRun.read(run)
    about = _summary(stored)
    if for_scripts:
        as_json({**about, "facts": stored.facts, "config": stored.config, "results": stored.results})
        return
    results = dict(stored.results.get("metrics") or {})
    stopped_by = {"stopped by": stored.results.get("stopped_by")} if stored.results.get("stopped_by") else {}
    rows = {**about, **stopped_by, **results, **stored.facts}
    table = aligned([[name, _text(value)] for name, value in rows.items()])
    click.echo("\n\n".join(["\n".join(table), *_curves([stored], curves_asked([stored], ()))]))


@command.command("compare")
@click.argument("runs", nargs=-1, metavar="RUN RUN...")
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="A metric whose curves to show. Repeatable.")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def compare(runs: tuple[str, ...], metrics: tuple[str, ...], for_scripts: bool) -> None:
    """Compare runs: the settings in which they differ, what came of them, and their curves side by side."""
    from llmtk.reporting.comparison import curves_asked, differences, outcomes
    from llmtk.reporting.stored import StoredRun

    if len(runs) < 2:
        raise click.UsageError("Give two runs at least: llmtk runs compare RUN RUN...")
    stored = [StoredRun.read(run) for run in runs]
    asked = curves_asked(stored, metrics)
    parts = {
        "settings": differences([run.config for run in stored]),
        "facts": differences([run.facts for run in stored]),
        "results": outcomes(stored),
    }
    if for_scripts:
        curves = {name: [run.curve(name) for run in stored] for name in asked}
        as_json({"runs": list(runs), **parts, "curves": curves})
        return
    tables = [_differences(title, values, runs) for title, values in parts.items()]
    click.echo("\n\n".join([*tables, *_curves(stored, asked)]))


def _differences(title: str, values: Mapping[str, Sequence[Any]], runs: Sequence[str]) -> str:
    rows = [[key, *map(_text, found)] for key, found in values.items()] or [["no difference", *("" for _ in runs)]]
    return "\n".join(aligned([[title.upper(), *runs], *rows]))


def _summary(run: StoredRun) -> dict[str, Any]:
    return {
        "run": str(run.path),
        "stage": run.stage,
        "status": run.status,
        "steps": run.steps,
        "loss": run.last("loss"),
        "eval_loss": run.last("eval_loss"),
        "model": run.model,
    }


def _listed(path: Path) -> dict[str, Any]:
    """Return a run's line in the list; of one whose files are damaged, what is wrong."""
    from llmtk.reporting.stored import StoredRun

    try:
        return {**_summary(StoredRun.read(path)), "problem": ""}
    except ConfigurationError as error:
        unknown = dict.fromkeys(("stage", "steps", "loss", "eval_loss", "model"))
        return {"run": str(path), "status": "damaged", **unknown, "problem": str(error)}


def _list_lines(found: Sequence[dict[str, Any]]) -> list[str]:
    names = ("run", "stage", "status", "steps", "loss", "eval_loss", "model")
    head, *lines = aligned([[name.upper() for name in names], *([_text(run[n]) for n in names] for run in found)])
    table = [head]
    for run, line in zip(found, lines, strict=True):
        table += [line, *([f"    problem: {run['problem']}"] if run["problem"] else [])]
    return table


def _curves(runs: Sequence[StoredRun], metrics: Sequence[str]) -> list[str]:
    """Return for each metric a headline, and a line for each run: its curve, its ends and its extremes."""
    from llmtk.reporting.comparison import sparklines

    blocks = []
    for name in metrics:
        curves = [run.curve(name) for run in runs]
        drawn = zip(runs, sparklines(curves), curves, strict=True)
        lines = aligned([[str(run.path), line, *_points(curve)] for run, line, curve in drawn])
        blocks.append("\n".join([f"{name} {_range(curves)}", *lines]))
    return blocks


def _range(curves: Sequence[Sequence[tuple[int, float]]]) -> str:
    points = [point for curve in curves for point in curve]
    if not points:
        return "was never finite"
    steps, values = zip(*points, strict=True)
    return f"up to step {max(steps)}, between {_text(min(values))} and {_text(max(values))}"


def _points(curve: Sequence[tuple[int, float]]) -> list[str]:
    """Return in words how a curve goes, and its lowest and its highest point."""
    if not curve:
        return ["not measured", "", ""]
    low, high = min(curve, key=lambda point: point[1]), max(curve, key=lambda point: point[1])
    extremes = [f"{what} {_text(value)} (step {step})" for what, (step, value) in (("lowest", low), ("highest", high))]
    return [f"{_text(curve[0][1])} -> {_text(curve[-1][1])}", *extremes]


def _text(value: Any) -> str:
    """Return a value on one line of a table: a number to four digits, nothing as a dash."""
    if value is None:
        return "-"
    text = f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())
    shown = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return shown if len(shown) <= WIDEST else f"{shown[: WIDEST - 3]}..."
