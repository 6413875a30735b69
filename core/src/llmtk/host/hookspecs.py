"""Every hook, in one place. Signatures are frozen: `(run)` or `(run, one object)`.

Stage hooks have exactly one implementation, the stage's. The others may be answered by the stage and by every plugin.
"""

# mypy: disable-error-code="empty-body"
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch

    from llmtk.batch import Batch, LossOutput, Mean, Round
    from llmtk.contract import Data, Models, Row, RunView
    from llmtk.training.events import Evaluation, Plan, StepReport

PROJECT = "llmtk"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's method as an answer to the hook of its name; `hookimpl(wrapper=True)` as one around others'."""


class StageHooks:
    """Answered by the stage alone. A plugin may wrap one (`@hookimpl(wrapper=True)`), never answer it."""

    @hookspec(firstresult=True)
    def build_models(self, run: RunView) -> Models:
        """Return the one trainable root module and the frozen ones by name."""

    @hookspec(firstresult=True)
    def build_data(self, run: RunView) -> Data:
        """Return training and evaluation rows."""

    @hookspec(firstresult=True)
    def parameter_groups(self, run: RunView) -> list[dict[str, Any]]:
        """Return the parameter groups, with learning rate and decay."""

    @hookspec(firstresult=True)
    def build_optimizer(self, run: RunView) -> torch.optim.Optimizer:
        """Return the run's one optimizer."""

    @hookspec(firstresult=True)
    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        """Turn this rank's rows of a global batch into a round: everything that needs no gradient."""

    @hookspec(firstresult=True)
    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        """Return the terms and metrics of one micro-batch."""

    @hookspec(firstresult=True)
    def evaluate_batch(self, run: RunView, batch: Batch) -> LossOutput:
        """Return the terms and metrics of one evaluation batch."""

    @hookspec(firstresult=True)
    def export_model(self, run: RunView, path: Path) -> None:
        """Write the trained model, tokenizer and whatever loads with them."""


class AroundHooks:
    """Composed by the core, the last-named plugin outermost. They may change what goes in, or call `inner` twice."""

    @hookspec
    def around_prepare_batch(self, run: RunView, rows: list[Row], inner: Callable[[list[Row]], Round]) -> Round:
        """Answer in place of prepare_batch, usually with what `inner(rows)` gives."""

    @hookspec
    def around_compute_loss(self, run: RunView, batch: Batch, inner: Callable[[Batch], LossOutput]) -> LossOutput:
        """Answer in place of compute_loss, usually with what `inner(batch)` gives and a term more."""


class CollectedHooks:
    """Asked of everybody; each answer is kept under its plugin's name."""

    @hookspec
    def extra_metrics(self, run: RunView, window: Batch) -> Mapping[str, Mean]:
        """Return metrics of the window that has just been trained on; the core reduces them over ranks and steps."""

    @hookspec
    def extra_timings(self, run: RunView, step: StepReport) -> Mapping[str, float]:
        """Return figures that no second run would give again (speed, memory) when a line of timings is due.

        All ranks are asked, and may gather; what the main one answers is written to timings.jsonl, as PLUGIN/NAME.
        """

    @hookspec
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        """Return state to save: tensors and JSON values by name."""

    @hookspec
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        """Take back what extra_checkpoint_state gave.

        Called before the first step of a resumed run, and, with train.load_best_model_at_end, after the last step where
        an earlier one was best: what is exported is as it was then.
        """

    @hookspec
    def extra_run_info(self, run: RunView) -> Mapping[str, Any]:
        """Return JSON for run.json and the plan."""

    @hookspec
    def should_stop(self, run: RunView, step: StepReport) -> bool:
        """Say whether to stop after this step. Any plugin's yes on any rank stops all ranks."""


class EventHooks:
    """Read-only. Each fires for every plugin, whatever the others raise; then the errors are raised together."""

    @hookspec
    def run_started(self, run: RunView, plan: Plan) -> None:
        """All is loaded, nothing is trained yet."""

    @hookspec
    def step_finished(self, run: RunView, step: StepReport) -> None:
        """An optimizer step was taken, or refused."""

    @hookspec
    def after_update(self, run: RunView, step: StepReport) -> None:
        """The weights have just changed: the place for an average of them, or a constraint on them."""

    @hookspec
    def epoch_finished(self, run: RunView, epoch: int) -> None:
        """The last row of an epoch was trained on."""

    @hookspec
    def evaluation_finished(self, run: RunView, evaluation: Evaluation) -> None:
        """An evaluation was made."""

    @hookspec
    def checkpoint_saved(self, run: RunView, path: Path) -> None:
        """A checkpoint is complete and durable."""

    @hookspec
    def run_finished(self, run: RunView, error: BaseException | None) -> None:
        """The run ended, well (None) or not."""


class SingleHooks:
    """Answered by at most one plugin."""

    @hookspec(firstresult=True)
    def order_examples(self, run: RunView, epoch: int) -> Sequence[int]:
        """Return the order of the epoch's rows, as indices. Every rank must return the same."""


SPECS: tuple[type, ...] = (StageHooks, AroundHooks, CollectedHooks, EventHooks, SingleHooks)


def names(spec: type) -> tuple[str, ...]:
    """Return the hooks that a class of specifications declares."""
    return tuple(name for name in vars(spec) if not name.startswith("_"))


STAGE_HOOKS = names(StageHooks)
HOOKS = tuple(name for spec in SPECS for name in names(spec))
MUST_ANSWER = frozenset(STAGE_HOOKS) - {"export_model"} | frozenset(names(AroundHooks)) | {"order_examples"}
"""Hooks whose answer may not be None: an implementation that forgets `return` is named."""
