"""What a run says before it trains, and after."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from llmtk.reporting.console import counted, decimal

if TYPE_CHECKING:
    from pathlib import Path

    from llmtk.run import Result, Run
    from llmtk.training.memory import Memory


def say_plan(run: Run, checkpoint: Path | None) -> None:
    """Print what the run is going to do."""
    for line in [*plan_lines(run), output_line(run, checkpoint)]:
        run.console.say_field(line)


def output_line(run: Run, checkpoint: Path | None) -> str:
    """Return where the run is written, and from where it goes on."""
    return f"output     {run.output_dir}" + (f", going on from {checkpoint.name}" if checkpoint else "")


def plan_lines(run: Run) -> list[str]:
    """Return what a run that is set up would do, in words."""
    plan, scorer = run.plan, run.forward.scorers[None]
    (_, origin), *others = plan.plugins
    plugins = ", ".join(f"{name} ({source})" for name, source in others)
    share = f"{plan.trainable_parameters:,} ({plan.trainable_parameters / plan.total_parameters:.1%}) of them trained"
    rows = counted(plan.train_rows, "row") if plan.train_rows else "a stream of rows"
    test = "" if run.test_rows is None else f", {len(run.test_rows):,} to test"
    demo = ["No model and no data given: this is a demo on the built-in model and the stage's own data."]
    return [
        *(demo if run.demo else []),
        f"stage      {plan.stage} ({origin}): {run.stage.summary}",
        f"model      {model_name(run)}, {plan.total_parameters:,} parameters, {share}",
        f"data       {rows} to train on, {plan.eval_rows:,} to evaluate{test}",
        *_steps(run),
        *([f"predict    {counted(len(run.questions), 'row')}, with the finished model"] if run.questions else []),
        f"compute    {plan.precision} on {plan.device}",
        "scoring    packed, proven on this model" if scorer.packed else f"scoring    padded: {scorer.why_padded}",
        *(["compiled   the layers, proven on this model"] if run.forward.compiled else []),
        *([f"plugins    {plugins}; after the stage, in this order; the last is outermost"] if plugins else []),
    ]


def _steps(run: Run) -> list[str]:
    plan, config = run.plan, run.config.train
    if not config.do_train:
        return ["steps      none (train.do_train: false): the model is evaluated as it is"]
    cut = f"{plan.micro_batches} micro-batch{'es' * (plan.micro_batches > 1)} on each rank"
    if config.micro_batch_tokens:
        cut = f"about {cut}, of at most {config.micro_batch_tokens:,} tokens"
    warmup = f", after {counted(plan.warmup_steps, 'step')} of warm-up" if plan.warmup_steps else ""
    epoch = f"; {plan.steps_per_epoch:,} make an epoch" if plan.steps_per_epoch else ""
    return [
        f"steps      {plan.max_steps:,}, each of {counted(plan.global_batch, 'row')} in {cut}{epoch}",
        f"schedule   {config.optim}, {config.lr_scheduler_type} from {config.learning_rate:g}{warmup}",
    ]


def memory_line(run: Run, memory: Memory) -> str:
    """Return an estimate of the run's memory in words."""
    from llmtk.training.memory import in_words

    parts = ", ".join(f"{name} {in_words(size)}" for name, size in asdict(memory).items() if size)
    written = " (completions not counted)" if "generation" in run.stage.needs else ""
    return f"memory     about {in_words(memory.total)} on each rank: {parts}{written}"


def say_result(run: Run, result: Result) -> None:
    """Print what came of the run."""
    say = run.console.say
    if run.demo:
        figures = {"figure": run.demo.figure} | {name: name for name in run.demo.also}
        for key, name in figures.items():
            after, before = result.metrics[f"{key}_after"], result.metrics.get(f"{key}_before")
            was = "" if before is None else f"{before:.3g} before, "
            say(f"{name} on held-out rows: {was}{after:.3g} after {counted(result.steps, 'step')}")
    if tested := [f"{name} {decimal(value)}" for name, value in result.metrics.items() if name.startswith("test_")]:
        say(f"test  {'  '.join(tested)}")
    if result.steps and run.state.skipped == result.steps:
        say(f"WARNING: all {result.steps} steps were left out (see above), and the model is as it was")
    loss = "not logged" if result.final_loss is None else decimal(result.final_loss)
    steps, stopped_by = counted(result.steps, "step"), run.state.stopped_by
    if stopped_by:
        steps = f"{result.steps:,} of {counted(run.plan.max_steps, 'step')} ({stopped_by} stopped the run)"
    # A run that is resumed at its last step: what comes after it is made again, or, if it was cut short, to the end.
    done = "Done"
    if run.resumed_at == result.steps:
        done = "Nothing left to train" if stopped_by else "Nothing left to train, the run has taken all of its steps"
    say(f"{done}: {steps}, loss {loss}. Model, metrics and plot are in {result.output_dir}")
    if run.demo:
        own = "".join(f" {run.stage_name}.{option}={option.upper()}" for option in _without_default(run))
        say(f"Your own: llmtk run {run.stage_name} model.name_or_path=MODEL data.train=ROWS.jsonl data.eval=0.1{own}")


def _without_default(run: Run) -> list[str]:
    """Return the stage's options that its demo had to give, since by themselves they are empty lists or the like."""
    given = (run.demo.config.get(run.stage_name) if run.demo else None) or {}
    fields = {field.alias or name: field for name, field in type(run.stage.options).model_fields.items()}
    return [key for key in given if fields[key].get_default(call_default_factory=True) in ([], {}, ())]


def model_name(run: Run) -> str:
    """Return what the model is called."""
    model = run.config.model
    name = model.name_or_path or f"{(model.from_config or {}).get('model_type')} from scratch"
    return f"{name} ({model.quantization})" if model.quantization else name
