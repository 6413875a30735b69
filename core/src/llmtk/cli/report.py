"""`llmtk report RUN`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("report")
@click.argument("run", metavar="RUN")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="By default report.html in RUN.")
def command(run: str, output: Path | None) -> None:
    """Write a page about the run in the folder RUN: results, curves, samples, configuration and versions.

    It is one HTML file, which needs neither network nor another file. A run that has not finished has one too.
    """
    from llmtk.reporting.report import write_report
    from llmtk.reporting.stored import StoredRun

    stored = StoredRun.read(run)
    file = output or stored.path / "report.html"
    write_report(stored, file)
    click.echo(f"The report on {run} is in {file}")
