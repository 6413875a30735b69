"""Early stopping: a run ends when its evaluations have not improved for a while.

With m the best value so far of a metric that is to fall, an evaluation improves on it if it is below m - threshold; the
run stops after `patience` evaluations in a row that do not. What it has counted is part of the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, Any, cast

from pydantic import Field

from llmtk import ConfigurationError, RunView, Section, TrainingError, hookimpl
from llmtk.contract import Data
from llmtk.training.events import StepReport, falls

if TYPE_CHECKING:
    from llmtk.run import Run


class EarlyStopping:
    """Stops a run whose evaluations no longer improve."""

    class Options(Section):
        """When to give up."""

        patience: int = Field(3, ge=1)
        """Evaluations in a row that may pass without an improvement; the run stops after as many."""
        threshold: float = Field(0.0, ge=0)
        """How much better than the best so far counts as an improvement."""
        metric: str | None = None
        """The evaluation's metric that decides. By default the reward of a stage that has rewards, whose loss says
        nothing of how good a policy is, else the loss."""
        greater_is_better: bool | None = None
        """By default false for a metric that is called a loss, nll, perplexity or kl, else true."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.best: float | None = None
        self.waited = 0

    @hookimpl(wrapper=True)
    def build_data(self, run: RunView) -> Generator[None, Data, Data]:
        if not (train := cast("Run", run).config.train).evaluates:
            none = "eval_strategy: no" if train.do_eval else "do_eval: false"
            raise ConfigurationError(
                f"plugins.early-stopping needs evaluations, and train.{none} makes none; change one"
            )
        data = yield
        if data.eval is None:
            raise ConfigurationError(
                "plugins.early-stopping needs evaluations: give data.eval, a share (0.1) or a file"
            )
        return data

    @hookimpl
    def should_stop(self, run: RunView, step: StepReport) -> bool:
        if step.evaluation is None:
            return False
        metric = self.options.metric or usual_metric(run)
        value = _value(step.evaluation.metrics, metric)
        if self._improves(value, metric):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.waited < self.options.patience:
            return False
        run.notify(f"{metric} has not improved on {self.best} for {self.waited} evaluations: the run stops")
        return True

    def _improves(self, value: float, metric: str) -> bool:
        asked = self.options.greater_is_better
        greater = not falls(metric) if asked is None else asked
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


def usual_metric(run: RunView) -> str:
    """Return the metric that decides where none is named."""
    return "reward" if "reward" in run.stage.needs else "loss"


def _value(metrics: Mapping[str, float], metric: str) -> float:
    name = "eval_" + metric.removeprefix("eval_")
    if name not in metrics:
        raise TrainingError(
            f"plugins.early-stopping.metric: {metric!r} is not among the evaluation's metrics: {', '.join(metrics)}"
        )
    return metrics[name]
