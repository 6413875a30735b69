"""An exponential moving average of the weights, which is what the run exports.

After the n-th update, with w the trained weights and a their average (Polyak averaging; arXiv 1806.05594, section 3):

    a <- a + (1 - d_n) (w - a),        d_n = min(decay, (1 + n) / (10 + n)),        a_0 = w_0

The smaller decay at the beginning forgets the start sooner. Training goes on with w, to the bit as without the plugin.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from llmtk import ConfigurationError, RunView, Section, hookimpl
from llmtk.training.events import Plan, StepReport
from llmtk.training.sharding import is_sharded

UPDATES = "updates"


class ExponentialMovingAverage:
    """Averages the trained weights, and exports the average."""

    class Options(Section):
        """How long it remembers."""

        decay: float = Field(0.999, gt=0, lt=1)
        """How much of the average an update leaves. 0.999 remembers about the last 1,000 updates."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        """(shape of the parameter) float32, by the parameter's name."""

    @hookimpl
    def extra_run_info(self, run: RunView) -> Mapping[str, Any]:
        """Tell what is exported. ConfigurationError for a sharded model, of which each rank would average its part."""
        if any(map(is_sharded, _trained(run).values())):
            raise ConfigurationError(
                "plugins.ema averages and exports whole weights, and fsdp, or stage 3 of deepspeed, gives each rank a "
                "part of them. Leave one out"
            )
        return {"exports": f"the average of the weights, decay {self.options.decay}"}

    @hookimpl
    def run_started(self, run: RunView, plan: Plan) -> None:
        if not self.average:
            self.average = {name: weight.detach().float().clone() for name, weight in _trained(run).items()}

    @hookimpl
    def after_update(self, run: RunView, step: StepReport) -> None:
        self.updates += 1
        decay = min(self.options.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for name, weight in _trained(run).items():
                self.average[name].lerp_(weight.detach().float(), 1 - decay)

    @hookimpl(wrapper=True)
    def export_model(self, run: RunView, path: Path) -> Generator[None, Any, Any]:
        with self._in_place(run):
            return (yield)

    @contextlib.contextmanager
    def _in_place(self, run: RunView) -> Iterator[None]:
        """Put the average in the weights' place for a while."""
        kept = {name: weight.detach().clone() for name, weight in _trained(run).items()}
        try:
            _put(run, self.average)
            yield
        finally:
            _put(run, kept)

    @hookimpl
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        return {UPDATES: self.updates, **self.average}

    @hookimpl
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        self.updates = state[UPDATES]
        self.average = {name: state[name].to(weight.device) for name, weight in _trained(run).items()}


def _trained(run: RunView) -> dict[str, Tensor]:
    return {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}


def _put(run: RunView, weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in _trained(run).items():
            weight.copy_(weights.get(name, weight))
