"""`llmtk new-stage`, and what `new-plugin` and `new-reward` share with it."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("new-stage")
@click.argument("name")
@click.option("--from", "start", metavar="STAGE", help="Begin with an installed stage's module.")
@click.option("--description", metavar="TEXT", help="What it does, in a line that lists show.")
@click.option("--output", metavar="FOLDER", help="Where to write it. By default llmtk-stage-NAME.")
def command(name: str, start: str | None, description: str | None, output: str | None) -> None:
    """Write a distribution with a stage of your own, ready to be installed, checked and published."""
    make("stage", name, output, start=start, description=description)


def make(kind: str, name: str, output: str | None, *, start: str | None = None, description: str | None = None) -> None:
    """Write a distribution, and say what to do with it."""
    from llmtk.scaffold import new, write

    made = new(kind, name, start=start, description=description)
    folder = Path(output or made.distribution)
    for file in write(made, folder):
        click.echo(f"  {file}")
    steps = {
        "stage": [f"llmtk run {made.name}", f"llmtk check {made.name}"],
        "plugin": [f"llmtk run sft plugins.{made.name}.factor=3"],
        "reward": [f"llmtk run grpo grpo.rewards={made.name}"],
    }
    click.echo("\nNext:\n  " + "\n  ".join([f"pip install -e {folder}", *steps[kind], f"pytest {folder}"]))
