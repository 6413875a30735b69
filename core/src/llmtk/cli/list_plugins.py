"""`llmtk list-plugins`."""

from __future__ import annotations

import click

from llmtk.cli.tables import as_json, described, offers_table
from llmtk.host import discovery

NONE = "No plugin is installed. Distributions of plugins are usually called llmtk-plugin-NAME."


@click.command("list-plugins")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def command(for_scripts: bool) -> None:
    """List what is installed beside the stages: plugins, rewards, metrics, generators and commands.

    A plugin is used by the runs whose configuration names it under `plugins`.
    """
    groups = [group for group in discovery.GROUPS if group != discovery.STAGES]
    found = [offer for group in groups for offer in discovery.offers(group)]
    if for_scripts:
        as_json([described(offer) for offer in found])
    else:
        click.echo("\n".join(offers_table(found, with_kind=True)) if found else NONE)
