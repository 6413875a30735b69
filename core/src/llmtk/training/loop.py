"""The one training loop, for every stage: rounds of windows of micro-batches."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from llmtk.errors import LlmtkError, TrainingError
from llmtk.training import snapshot
from llmtk.training.evaluation import evaluate
from llmtk.training.events import Evaluation, StepReport, falls
from llmtk.training.micro_batches import cut_window
from llmtk.training.state import Best
from llmtk.training.tally import Tally, WindowTally, objective

if TYPE_CHECKING:
    from llmtk.batch import Batch
    from llmtk.run import Run


class Interrupted(LlmtkError):
    """A signal stopped the run; its checkpoint is written."""


def train(run: Run) -> None:
    """Train to the last step, or until a plugin or a signal says stop."""
    state = run.state
    while state.pending is not None or (state.step < run.plan.max_steps and state.stopped_by is None):
        if state.pending is None:
            began = time.perf_counter()
            if state.round is None:
                _open_round(run)
            state.pending = _step(run, state.current_window, began)
            state.close_window(run.order.cursor.epoch)
            _log(run, state.pending)
        _finish_step(run, state.pending)


def _finish_step(run: Run, report: StepReport) -> None:
    """Evaluate, tell, stop and save where due. A signal during the evaluation leaves the step pending."""
    state = run.state
    evaluated = True
    if _evaluation_is_due(run):
        evaluation = _evaluate(run)
        evaluated, report = evaluation is not None, replace(report, evaluation=evaluation)
    if evaluated:
        state.pending = None
        run.hooks.step_finished(report)
        if state.at_epoch_end:
            run.hooks.epoch_finished(state.epochs)
        if run.hooks.answered("should_stop"):
            state.stopped_by = run.first_of_ranks(run.hooks.should_stop(report))
    interrupted = run.interrupted()
    if interrupted or _save_is_due(run):
        save_checkpoint(run)
    if interrupted and (state.pending is not None or state.step < run.plan.max_steps):
        raise Interrupted(
            f"{run.signal_name()} stopped the run after step {state.step}; its checkpoint is written. "
            f"Go on with: llmtk run {run.stage_name} output_dir={run.output_dir} --resume auto"
        )


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint, and tell the plugins."""
    run.hooks.checkpoint_saved(snapshot.save(run))
    run.saved_step = run.state.step


def _open_round(run: Run) -> None:
    """Take a global batch and prepare it: a round of as many windows on every rank."""
    state = run.state
    round = run.hooks.prepare_batch(run.next_rows())
    windows = run.gather(len(round.windows))
    if set(windows) != {run.stage.windows_per_round}:
        raise TrainingError(
            f"stage {run.stage_name} declares {run.stage.windows_per_round} windows in a round; prepare_batch gave "
            f"{windows} (by rank). Every round has as many as `windows_per_round` says, on every rank"
        )
    state.tally.add_means(run.reduce_means(round.metrics))
    state.round, state.window = round, 0


def _step(run: Run, window: Batch, began: float) -> StepReport:
    """Run one window forward and backward, and take the optimizer step."""
    state, config, backend = run.state, run.config.train, run.backend
    cut = cut_window(window, backend, rows=config.per_device_train_batch_size, tokens=config.micro_batch_tokens)
    totals = run.forward.router.totals(cut)
    parts = cut.parts if any(cut.totals.values()) else []
    window_tally = WindowTally(totals)
    for index, part in enumerate(parts):
        with backend.micro_batch(last=index == len(parts) - 1):
            output = run.forward.router.around(run.hooks.compute_loss, part.batch)
            loss = objective(output.terms, totals, backend.world_size)
            backend.backward(loss if part.counts else loss * 0)
        window_tally.add(part, output)
    tally, bad_rows = window_tally.finish(backend)

    learning_rate = float(run.optimizer.param_groups[0]["lr"])
    refused = "no row has a target" if not parts else "the loss is not finite" if bad_rows else None
    result = backend.step(config.max_grad_norm, refused)
    run.schedule_step(refused=result.skipped is not None)
    state.step += 1
    state.tokens += cut.tokens
    state.rows += cut.groups
    if result.skipped is None:
        if run.hooks.answered("extra_metrics"):
            tally.add_means(run.reduce_means(run.hooks.extra_metrics(window)))
        state.tally.add(tally)
    tokens_per_second = run.count_speed(time.perf_counter() - began, cut.tokens, cut.groups)
    report = StepReport(state.step, run.order.epochs, tally.loss, result.grad_norm, learning_rate, result.skipped)
    run.console.step(report, tokens_per_second)
    _account_for_skips(run, report, bad_rows or window.places)
    if result.skipped is None:
        run.hooks.after_update(report)
    return report


def _account_for_skips(run: Run, report: StepReport, rows: list[str]) -> None:
    """Say that a step was refused, and stop the run after too many in a row."""
    state = run.state
    if report.skipped is None:
        state.nonfinite = 0
        return
    state.skipped += 1
    if report.skipped == "fp16 overflow":
        return
    named = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    run.notify(f"Step {report.step} was left out, no weight changed: {report.skipped}. Rows: {named or 'none'}")
    if "finite" not in report.skipped:
        return
    state.nonfinite += 1
    if state.nonfinite >= run.config.train.max_nonfinite_steps:
        raise TrainingError(
            f"{state.nonfinite} steps in a row were refused, the last one step {report.step}: {report.skipped}. "
            f"Rows: {named}. No weight was changed by them. Look at these rows, or lower train.learning_rate; "
            f"train.max_nonfinite_steps sets how many are allowed"
        )


def _log(run: Run, report: StepReport) -> None:
    """Write a line of metrics where one is due."""
    state, config = run.state, run.config.train
    if state.step % config.logging_steps and state.step < run.plan.max_steps:
        return
    values = state.tally.values()
    state.last_loss = values.get("loss", state.last_loss)
    values |= {"grad_norm": report.grad_norm, "learning_rate": report.learning_rate, "tokens": state.tokens}
    if state.skipped:
        values["skipped_steps"] = state.skipped
    state.tally = Tally()
    run.record(values)
    run.record_timings(values, run.hooks.extra_timings(report))


def _evaluation_is_due(run: Run) -> bool:
    config, state = run.config.train, run.state
    if run.eval_rows is None or not config.evaluates:
        return False
    if state.step == run.plan.max_steps:
        return True
    every = config.eval_steps or config.logging_steps
    return state.step % every == 0 if config.eval_strategy == "steps" else state.at_epoch_end


def _evaluate(run: Run) -> Evaluation | None:
    """Evaluate, log, and keep the best. None where a signal came in between."""
    state = run.state
    assert run.eval_rows is not None
    values = evaluate(run, run.eval_rows)
    if values is None:
        return None
    metrics = {f"eval_{name}": value for name, value in values.items()}
    state.last_evaluation = metrics
    run.record(metrics)
    run.write_samples()
    run.schedule_evaluated(metrics)
    is_best = _is_best(run, metrics)
    evaluation = Evaluation(state.step, metrics, is_best)
    run.console.evaluation(evaluation)
    run.hooks.evaluation_finished(evaluation)
    return evaluation


def _is_best(run: Run, metrics: dict[str, float]) -> bool:
    config, best = run.config.train, run.state.best
    name = "eval_" + config.metric_for_best_model.removeprefix("eval_")
    if name not in metrics:
        raise TrainingError(
            f"train.metric_for_best_model: {config.metric_for_best_model!r} is not among the evaluation's metrics: "
            f"{', '.join(metrics)}"
        )
    value = metrics[name]
    greater = not falls(name) if config.greater_is_better is None else config.greater_is_better
    is_best = math.isfinite(value) and (best is None or (value > best.value if greater else value < best.value))
    if is_best:
        run.state.best = Best(run.state.step, value)
    return is_best


def _save_is_due(run: Run) -> bool:
    """Say whether to save. The best evaluation so far is always saved, so that it can be kept."""
    config, state = run.config.train, run.state
    if config.save_strategy == "no" and not config.load_best_model_at_end:
        return False
    if state.best is not None and state.best.step == state.step:
        return True
    if config.save_strategy == "steps":
        return state.step % config.save_steps == 0
    return config.save_strategy == "epoch" and state.at_epoch_end
