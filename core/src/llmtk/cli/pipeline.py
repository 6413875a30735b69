"""`llmtk pipeline`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.tables import aligned
from llmtk.errors import TrainingError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmtk.pipeline import Pipeline
    from llmtk.pipeline.deciding import Decision

_EXAMPLES = """\b
Examples:
  llmtk pipeline story.yaml                                again after a stop: it goes on where it was
  llmtk pipeline story.yaml --dry-run                      what would be done, and why
  llmtk pipeline story.yaml steps.sft.train.max_steps=10   a setting of one step
  llmtk pipeline story.yaml train.seed=1                   of all steps
"""


@click.command("pipeline", epilog=_EXAMPLES)
@click.argument("file", metavar="FILE")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--dry-run", is_flag=True, help="Check all steps, show what would be done, and run nothing.")
@click.option("--only", multiple=True, metavar="STEP", help="Leave the other steps as they are. May be repeated.")
@click.option("--rerun", multiple=True, metavar="STEP", help="Run it again, changed or not. May be repeated.")
@click.option(
    "-n", "--processes", type=click.IntRange(1), help="Run each step in so many processes, as `llmtk launch` does."
)
def command(
    file: str,
    overrides: tuple[str, ...],
    dry_run: bool,
    only: tuple[str, ...],
    rerun: tuple[str, ...],
    processes: int | None,
) -> None:
    """Run the steps of FILE one after the other, each taking what a former one made.

    A step whose inputs have not changed is not run again; one that was interrupted goes on from its checkpoint; one
    whose inputs have changed is run again, and the old run is kept in output_dir/old.
    """
    from llmtk.pipeline import Pipeline

    pipeline = Pipeline.read(file, overrides)
    if processes:
        _check_processes(processes)
    if dry_run:
        _show_plan(pipeline.plan(only, rerun))
        click.echo("Nothing was run")
        return
    started: dict[str, Any] = {} if processes is None else {"command": lambda: _launched(processes)}
    from llmtk.run import Interrupted

    try:
        pipeline.run(only, rerun, say=click.echo, show=_show_plan, **started)
    except (TrainingError, Interrupted):
        _show_outcomes(pipeline)
        raise
    _show_outcomes(pipeline)


def _show_plan(decisions: Sequence[Decision]) -> None:
    rows = [
        [one.step.name, one.step.stage, ", ".join(dict.fromkeys(one.step.takes.values())) or "-", one.action, one.why]
        for one in decisions
    ]
    click.echo("\n".join(aligned([["STEP", "STAGE", "TAKES FROM", "TO DO", "WHY"], *rows])) + "\n")


def _show_outcomes(pipeline: Pipeline) -> None:
    rows = [
        [
            one["step"],
            one["stage"],
            one["status"],
            _text(one["steps"]),
            _text(one["seconds"], "{:.0f}"),
            _text(one["loss"], "{:.4f}"),
            _text(one["value"], f"{one['metric']} {{:.4f}}"),
        ]
        for one in pipeline.outcomes()
    ]
    head = ["STEP", "STAGE", "STATUS", "STEPS", "SECONDS", "LOSS", "METRIC"]
    click.echo("\n" + "\n".join(aligned([head, *rows])))
    click.echo(f"All is in {pipeline.folder}")


def _text(value: float | None, form: str = "{}") -> str:
    return "-" if value is None else form.format(value)


def _check_processes(processes: int) -> None:
    from llmtk.cli.launch import check_gpus

    check_gpus(processes)


def _launched(processes: int) -> list[str]:
    from llmtk.cli.launch import launcher
    from llmtk.ports import LOCAL, free_port

    return launcher(processes, 1, 0, LOCAL, free_port())
