"""`llmtk plan`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict

import click

from llmtk.cli.run import asked_for
from llmtk.cli.tables import as_json

_EXAMPLES = """\b
Examples:
  llmtk plan sft config.yaml                               what `llmtk run sft config.yaml` would do
  llmtk plan sft config.yaml train.micro_batch_tokens=8192
"""


@click.command("plan", epilog=_EXAMPLES)
@click.argument("words", nargs=-1, metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def command(words: tuple[str, ...], for_scripts: bool) -> None:
    """Show what a run would do, and train nothing.

    Takes the words of `llmtk run`, and refuses what it would refuse. Data and model are loaded; nothing is written.
    """
    stage, layers = asked_for(words)
    from llmtk.reporting.summary import memory_line, plan_lines
    from llmtk.run import Run
    from llmtk.training.memory import estimate

    run = Run.from_layers(stage, *layers)
    # What is said of the data while it is read is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if for_scripts else contextlib.nullcontext():
        plan, memory = run.prepare(), estimate(run)
    if for_scripts:
        as_json({**asdict(plan), "memory": {**asdict(memory), "total": memory.total}})
        return
    click.echo("\n".join([*plan_lines(run), memory_line(run, memory)]))
    click.echo("Nothing was trained. To train: llmtk run with the same words")
