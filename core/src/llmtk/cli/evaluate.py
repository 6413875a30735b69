"""`llmtk evaluate RUN`."""

from __future__ import annotations

import contextlib
import sys

import click

from llmtk.cli.tables import aligned, as_json


@click.command("evaluate")
@click.argument("run", metavar="RUN")
@click.option("--data", metavar="FILE", help="Rows to evaluate on. By default the run's own evaluation rows.")
@click.option("--tasks", metavar="TASK,...", help="Benchmarks instead, or files of them, by an installed harness.")
@click.option("--shots", type=click.IntRange(0), help="With --tasks: examples before a question. Default: the task's.")
@click.option("--limit", type=click.IntRange(1), help="With --tasks: questions of each, at most.")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def command(
    run: str, data: str | None, tasks: str | None, shots: int | None, limit: int | None, for_scripts: bool
) -> None:
    """Evaluate the model of the finished run in the folder RUN: loss, perplexity, token accuracy, the stage's metrics.

    Data that the stage itself has no use for is measured by perplexity and token accuracy alone. With --tasks, RUN may
    be any model; lm-evaluation-harness is one harness of benchmarks: pip install llmtk-lm-eval.
    """
    if tasks is None and (shots is not None or limit is not None):
        raise click.UsageError("--shots and --limit go with --tasks.")
    if tasks is not None and data is not None:
        raise click.UsageError("--tasks bring their own data; leave --data out.")
    # What is said meanwhile is not for scripts.
    with contextlib.redirect_stdout(sys.stderr) if for_scripts else contextlib.nullcontext():
        values = _values(run, data, tasks, shots, limit)
    if for_scripts:
        as_json(values)
    else:
        click.echo("\n".join(aligned([[name, f"{value:.6g}"] for name, value in values.items()])))


def _values(run: str, data: str | None, tasks: str | None, shots: int | None, limit: int | None) -> dict[str, float]:
    if tasks is not None:
        from llmtk.inference.benchmarks import evaluate_tasks

        return evaluate_tasks(run, [task for task in tasks.split(",") if task], shots=shots, limit=limit)
    from llmtk.run import evaluate_run

    return evaluate_run(run, data)
