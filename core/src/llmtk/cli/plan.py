"""`llmtk plan`."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import asdict

import click

from llmtk.cli.run import made, resume_option
from llmtk.cli.tables import as_json

_EXAMPLES = """\b
Examples:
  llmtk plan sft config.yaml                               what `llmtk run sft config.yaml` would do
  llmtk plan sft config.yaml train.micro_batch_tokens=8192
  llmtk plan sft output_dir=runs/a --resume                what going on with that run would do
"""


@click.command("plan", epilog=_EXAMPLES)
@click.argument("words", nargs=-1, metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...")
@resume_option
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def command(words: tuple[str, ...], resume: str | None, for_scripts: bool) -> None:
    """Show what a run would do, and train nothing.

    Takes the words of `llmtk run`, and refuses what it would refuse. Data and model are loaded; nothing is written.
    """
    run = made(words, resume)
    from llmtk.reporting.console import wrapped
    from llmtk.reporting.summary import memory_line, output_line, plan_lines
    from llmtk.training.memory import estimate

    # What is said of the data while it is read is no part of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if for_scripts else contextlib.nullcontext():
        plan, memory = run.prepare(), estimate(run)
        checkpoint = run.folder.checkpoint_to_resume(run.backend, click.echo)
    if for_scripts:
        as_json({**asdict(plan), "memory": {**asdict(memory), "total": memory.total}})
        return
    for line in [*plan_lines(run), memory_line(run, memory), output_line(run, checkpoint)]:
        click.echo(wrapped(line))
    click.echo("Nothing was trained. To train: llmtk run with the same words")
