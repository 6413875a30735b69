"""`llmtk new-reward`."""

from __future__ import annotations

import click

from llmtk.cli.new_stage import make


@click.command("new-reward")
@click.argument("name")
@click.option("--description", metavar="TEXT", help="What it does, in a line that lists show.")
@click.option("--output", metavar="FOLDER", help="Where to write it. By default llmtk-reward-NAME.")
def command(name: str, description: str | None, output: str | None) -> None:
    """Write a distribution with a reward of your own, ready to be installed, tested and published."""
    make("reward", name, output, description=description)
