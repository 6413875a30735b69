"""`llmtk list-stages`."""

from __future__ import annotations

from dataclasses import replace

import click

from llmtk.cli.tables import as_json, described, offers_table
from llmtk.host import discovery

NONE = "No stage is installed. Install one, for example: pip install llmtk-stage-sft"


@click.command("list-stages")
@click.option("--check", is_flag=True, help="Import each stage, and say what is broken. Exits with 1 if one is.")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, check: bool, for_scripts: bool) -> None:
    """List installed training methods, without importing them."""
    stages = discovery.list_stages()
    if check:
        stages = [replace(stage, problem=stage.problem or discovery.check(stage)) for stage in stages]
    if for_scripts:
        as_json([described(stage) for stage in stages])
    else:
        click.echo("\n".join(offers_table(stages)) if stages else NONE)
    if check and any(stage.problem for stage in stages):
        ctx.exit(1)
