"""What a run says before it trains, and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from llmtk.run import Result, Run


def say_plan(run: Run, checkpoint: Path | None) -> None:
    """Print what the run is going to do."""
    plan, say = run.plan, run.console.say
    if run.demo:
        say("No model and no data given: this is a demo on the built-in model and the stage's own data.")
    share = f"{plan.trainable_parameters / plan.total_parameters:.1%} of them trained"
    say(f"stage      {plan.stage}: {run.stage.summary}")
    say(f"model      {model_name(run)}, {plan.total_parameters:,} parameters, {share}")
    rows = f"{plan.train_rows:,} rows" if plan.train_rows else "a stream of rows"
    say(f"data       {rows} to train on, {plan.eval_rows:,} to evaluate")
    if run.config.train.do_train:
        epoch = f"; {plan.steps_per_epoch:,} make an epoch" if plan.steps_per_epoch else ""
        say(f"steps      {plan.max_steps:,}, each of {plan.global_batch} rows{epoch}")
    else:
        say("steps      none (train.do_train: false): the model is evaluated as it is")
    say(f"compute    {plan.precision} on {plan.device}")
    scorer = run.scorers[None]
    say("scoring    packed, proven on this model" if scorer.packed else f"scoring    padded: {scorer.why_padded}")
    if names := [name for name, _ in run.manager.list_name_plugin()][1:]:
        say(f"plugins    {', '.join(names)} (the last is outermost)")
    say(f"output     {run.output_dir}" + (f", going on from {checkpoint.name}" if checkpoint else ""))


def say_result(run: Run, result: Result) -> None:
    """Print what came of the run."""
    say = run.console.say
    if run.demo:
        figures = {"figure": run.demo.figure} | {name: name for name in run.demo.also}
        for key, name in figures.items():
            after, before = result.metrics[f"{key}_after"], result.metrics.get(f"{key}_before")
            was = "" if before is None else f"{before:.3g} before, "
            say(f"{name} on held-out rows: {was}{after:.3g} after {result.steps} steps")
    loss = "not logged" if result.final_loss is None else f"{result.final_loss:.4f}"
    why = f" ({run.state.stopped_by} stopped the run)" if run.state.stopped_by else ""
    say(f"Done: {result.steps} steps{why}, loss {loss}. Model, metrics and plot are in {result.output_dir}")
    if run.demo:
        say(f"Your own: llmtk run {run.stage_name} model.name_or_path=MODEL data.train=ROWS.jsonl data.eval=0.1")


def model_name(run: Run) -> str:
    """Return what the model is called."""
    model = run.config.model
    name = model.name_or_path or f"{(model.from_config or {}).get('model_type')} from scratch"
    return f"{name} ({model.quantization})" if model.quantization else name
