"""Early stopping: a run ends when its evaluations have not improved for a while.

With m the best value so far of a metric that is to fall, an evaluation improves on it if it is below m - threshold; the
run stops after `patience` evaluations in a row that do not. What it has counted is part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from llmtk import ConfigurationError, RunView, Section, TrainingError, hookimpl
from llmtk.training.events import Plan, StepReport, falls


class EarlyStopping:
    """Stops a run whose evaluations no longer improve."""

    class Options(Section):
        """When to give up."""

        patience: int = Field(3, ge=1)
        """Evaluations in a row that may pass without an improvement; the run stops after as many."""
        threshold: float = Field(0.0, ge=0)
        """How much better than the best so far counts as an improvement."""
        metric: str = "loss"
        """The evaluation's metric that decides."""
        greater_is_better: bool | None = None
        """By default false for a metric that is called a loss, nll, perplexity or kl, else true."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.best: float | None = None
        self.waited = 0

    @hookimpl
    def run_started(self, run: RunView, plan: Plan) -> None:
        if run.eval_rows is None:
            raise ConfigurationError("early-stopping needs evaluations: give data.eval, a share (0.1) or a file")

    @hookimpl
    def should_stop(self, run: RunView, step: StepReport) -> bool:
        if step.evaluation is None:
            return False
        value = self._value(step.evaluation.metrics)
        if self._improves(value):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited < self.options.patience:
            return False
        run.notify(
            f"{self.options.metric} has not improved on {self.best} for {self.waited} evaluations: the run stops"
        )
        return True

    def _value(self, metrics: Mapping[str, float]) -> float:
        name = "eval_" + self.options.metric.removeprefix("eval_")
        if name not in metrics:
            raise TrainingError(
                f"plugins.early-stopping.metric: {self.options.metric!r} is not among the evaluation's metrics: "
                f"{', '.join(metrics)}"
            )
        return metrics[name]

    def _improves(self, value: float) -> bool:
        asked = self.options.greater_is_better
        greater = not falls(self.options.metric) if asked is None else asked
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        gained = value - self.best if greater else self.best - value
        return gained > self.options.threshold

    @hookimpl
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        return {"best": self.best, "waited": self.waited}

    @hookimpl
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        self.best, self.waited = state["best"], state["waited"]
