"""Where a run is: everything that the loop counts, so that a checkpoint can hold it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmtk.batch import Batch, Mean, Round
from llmtk.training.events import StepReport
from llmtk.training.tally import Tally

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


@dataclass
class Best:
    """The best evaluation so far, and its step."""

    step: int
    value: float


@dataclass
class TrainState:
    """The loop's counters. All but the open round are equal on all ranks."""

    step: int = 0
    tokens: int = 0
    """Tokens trained on, over all ranks."""
    rows: int = 0
    """Rows trained on, over all ranks."""
    nonfinite: int = 0
    """Refused steps in a row."""
    skipped: int = 0
    """Steps that changed no weight, in all."""
    tally: Tally = field(default_factory=Tally)
    """Sums since the last line of the log."""
    last_loss: float | None = None
    last_evaluation: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    """A demo's figures before the first step."""
    best: Best | None = None
    pending: StepReport | None = None
    """The step whose evaluation a signal cut short; the resumed run begins with it."""
    epochs: int = 0
    """Epochs whose rows have all been trained on."""
    at_epoch_end: bool = False
    """Whether the last step was the last of an epoch."""
    stopped_by: str | None = None
    """The plugin that ended the run early."""
    round: Round | None = None
    window: int = 0
    """Windows of the round that are done."""

    @property
    def current_window(self) -> Batch:
        """The next window of the open round."""
        assert self.round is not None
        return self.round.windows[self.window]

    def close_window(self, epoch: int) -> None:
        """Count a window of the round as done; the round closes with its last. `epoch` is that of the next rows."""
        assert self.round is not None
        self.window += 1
        if self.window == len(self.round.windows):
            self.round, self.window = None, 0
        self.at_epoch_end = self.round is None and epoch > self.epochs
        self.epochs = epoch if self.round is None else self.epochs

    def to_json(self) -> dict[str, Any]:
        """Return all but the open round."""
        return asdict(replace(self, round=None))

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TrainState:
        """Make the state again from what `to_json` gave."""
        best = saved["best"] and Best(**saved["best"])
        pending = saved["pending"] and StepReport(**saved["pending"])
        return cls(**{**saved, "tally": Tally(**saved["tally"]), "best": best, "pending": pending})


def round_to_state(round: Round) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, JSON) of a round."""
    tensors: dict[str, Tensor] = {}
    windows = []
    for index, window in enumerate(round.windows):
        part, rest = window.to_state(f"round/{index}/")
        tensors |= part
        windows.append(rest)
    metrics = {name: [float(mean.sum), float(mean.count), mean.then] for name, mean in round.metrics.items()}
    return tensors, {"windows": windows, "metrics": metrics}


def round_from_state(tensors: Mapping[str, Tensor], saved: Mapping[str, Any]) -> Round:
    """Make a round again from what `round_to_state` gave."""
    windows = [Batch.from_state(f"round/{i}/", tensors, rest) for i, rest in enumerate(saved["windows"])]
    return Round(windows, {name: Mean(*values) for name, values in saved["metrics"].items()})
