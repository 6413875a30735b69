"""`llmtk new-plugin`."""

from __future__ import annotations

import click

from llmtk.cli.new_stage import make


@click.command("new-plugin")
@click.argument("name")
@click.option("--description", metavar="TEXT", help="What it does, in a line that lists show.")
@click.option("--output", metavar="FOLDER", help="Where to write it. By default llmtk-plugin-NAME.")
def command(name: str, description: str | None, output: str | None) -> None:
    """Write a distribution with a plugin of your own, ready to be installed, tested and published."""
    make("plugin", name, output, description=description)
