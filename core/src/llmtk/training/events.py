"""What the loop tells plugins: the plan, a step, an evaluation. Read-only."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What the run is going to do."""

    stage: str
    plugins: Sequence[tuple[str, str]]
    """What acts, by name, and the distribution and version that each is from: the stage first, then the plugins as they
    were named. Hooks are asked in this order; around a hook of the stage, the last is outermost."""
    max_steps: int
    steps_per_epoch: int
    train_rows: int
    eval_rows: int
    global_batch: int
    """Rows of an optimizer window, over all ranks."""
    micro_batches: int
    """Micro-batches of a step on this rank, at most, over the first steps."""
    warmup_steps: int
    trainable_parameters: int
    total_parameters: int
    precision: str
    device: str
    facts: Mapping[str, Any]
    """What plugins add, by plugin name."""


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, taken or refused."""

    step: int
    """Steps taken so far, with this one."""
    epoch: float
    """Epochs taken so far, as a fraction."""
    loss: float
    """The loss of the window, over all ranks."""
    grad_norm: float
    """The gradient's norm before it was clipped, over all ranks."""
    learning_rate: float
    """What this step was taken with, in the first parameter group."""
    skipped: str | None
    """Why no weight changed, if none did."""
    evaluation: Evaluation | None = None
    """The evaluation after this step, where there was one."""


@dataclass(frozen=True)
class Evaluation:
    """The exact global means over the evaluation rows, named `eval_...`."""

    step: int
    metrics: Mapping[str, float]
    is_best: bool = False


FALLING = {"loss", "nll", "perplexity", "kl"}


def falls(metric: str) -> bool:
    """Say whether a metric is the better the lower it is, by a word of its name: `eval_loss`, `loss/margin`, `nll`."""
    return not FALLING.isdisjoint(re.split(r"[/_]", metric))
