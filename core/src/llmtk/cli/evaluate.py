"""`llmtk evaluate RUN`."""

from __future__ import annotations

import contextlib
import sys

import click

from llmtk.cli.tables import aligned, as_json


@click.command("evaluate")
@click.argument("run", metavar="RUN")
@click.option("--data", metavar="FILE", help="Rows to evaluate on. By default the run's own evaluation rows.")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def command(run: str, data: str | None, for_scripts: bool) -> None:
    """Evaluate the model of the finished run in the folder RUN: loss, perplexity, token accuracy, the stage's metrics.

    Data that the stage itself has no use for is measured by perplexity and token accuracy alone.
    """
    from llmtk.run import evaluate_run

    # What is said meanwhile is not for scripts.
    with contextlib.redirect_stdout(sys.stderr) if for_scripts else contextlib.nullcontext():
        values = evaluate_run(run, data)
    if for_scripts:
        as_json(values)
    else:
        click.echo("\n".join(aligned([[name, f"{value:.6g}"] for name, value in values.items()])))
