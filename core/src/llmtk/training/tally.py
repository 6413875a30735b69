"""Exact means: sums and counts of a window, over all its micro-batches and ranks, that add up over steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtk.batch import Mean, Term
from llmtk.errors import TrainingError

if TYPE_CHECKING:
    from llmtk.batch import LossOutput
    from llmtk.training.backend import Backend
    from llmtk.training.micro_batches import MicroBatch


@dataclass
class Tally:
    """Sums that make means at last. JSON in and out, so that a checkpoint may fall between two lines of a log."""

    terms: dict[str, list[float]] = field(default_factory=dict)
    """By term: its sum, its sum times its coefficient, and the total of the weight that divides both."""
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    """By metric: its sum, its count, and what is applied to their quotient."""

    def add(self, other: Tally) -> None:
        """Add another tally to this one."""
        for mine, theirs in ((self.terms, other.terms), (self.metrics, other.metrics)):
            for name, entry in theirs.items():
                mine[name] = _joined(mine[name], entry) if name in mine else entry

    def add_means(self, means: Mapping[str, Mean]) -> None:
        """Add metrics given as sums and counts, already over all ranks."""
        self.add(Tally(metrics={name: [float(m.sum), float(m.count), m.then] for name, m in means.items()}))

    @property
    def loss(self) -> float:
        """The coefficient-weighted sum of the terms' means."""
        return sum(weighted / total for _, weighted, total in self.terms.values() if total)

    def values(self) -> dict[str, float]:
        """Return the loss, each term where there are several, and every metric; no loss where no step counted."""
        values = {"loss": self.loss} if self.terms else {}
        if len(self.terms) > 1:
            values |= {f"loss/{name}": total and summed / total for name, (summed, _, total) in self.terms.items()}
        for name, (summed, count, then) in self.metrics.items():
            if count:
                values[name] = _exp(summed / count) if then == "exp" else summed / count
        return values


@dataclass
class WindowTally:
    """Collects the outputs of a window's micro-batches without waiting for the device."""

    totals: Mapping[str, float]
    parts: list[tuple[MicroBatch, dict[str, Term], dict[str, Mean]]] = field(default_factory=list)

    def add(self, micro_batch: MicroBatch, output: LossOutput) -> None:
        """Keep what a micro-batch gave. One that only keeps step adds nothing. TrainingError for what is no metric."""
        for name, metric in output.metrics.items():
            if not isinstance(metric, Mean):
                raise TrainingError(f"the metric {name!r} is no Mean but {metric!r:.60}. Write Mean(sum, count)")
        if micro_batch.counts:
            self.parts.append((micro_batch, output.terms, output.metrics))

    def finish(self, backend: Backend) -> tuple[Tally, list[str]]:
        """Add everything up over all ranks: the tally, and the places of rows whose loss is not finite."""
        numbers = iter(_to_floats(self._tensors()))
        tally, bad = Tally(), []
        for micro_batch, terms, metrics in self.parts:
            part = Tally()
            for name, term in terms.items():
                summed = next(numbers)
                if not self.totals[term.per]:  # dropped from the loss, whatever its sum
                    summed = 0.0
                part.terms[name] = [summed, summed * term.coefficient, 0.0]
                if not math.isfinite(summed):
                    bad += micro_batch.batch.places
            for name, mean in metrics.items():
                part.metrics[name] = [next(numbers), next(numbers), mean.then]
            tally.add(part)
        per = {name: term.per for _, terms, _ in self.parts for name, term in terms.items()}
        everyone = backend.gather((tally.terms, tally.metrics, per, bad))
        whole = Tally()
        for rank_terms, rank_metrics, _, _ in everyone:
            whole.add(Tally(rank_terms, rank_metrics))
        for rank in everyone:
            for name, weight in rank[2].items():
                whole.terms[name][2] = self.totals[weight]
        return whole, [place for rank in everyone for place in rank[3]]

    def _tensors(self) -> list[Tensor | float]:
        return [
            value
            for _, terms, metrics in self.parts
            for value in (
                *(term.sum for term in terms.values()),
                *(value for mean in metrics.values() for value in (mean.sum, mean.count)),
            )
        ]


def objective(terms: Mapping[str, Term], totals: Mapping[str, float], world_size: int) -> Tensor:
    """Return a micro-batch's share of the window's loss.

    Data parallelism averages gradients over ranks, so each share is multiplied by their number. A weight that totals
    zero over the window drops its term. TrainingError for a term without a declared weight, and for what is no term.
    """
    shares = []
    for name, term in terms.items():
        if not (isinstance(term, Term) and isinstance(term.sum, Tensor)):
            raise TrainingError(
                f"the loss term {name!r} is no Term of a tensor but {term!r:.60}. Write Term(sum, per=WEIGHT), where "
                "sum is a tensor of one value and WEIGHT is declared in Group(weights=...)"
            )
        if term.per not in totals:
            raise TrainingError(
                f"the loss term {name!r} is divided by the weight {term.per!r}, which the batch does not declare. "
                f"Declared: {', '.join(sorted(totals)) or 'none'}. Put it into Group(weights=...) in prepare_batch"
            )
        if term.sum.ndim:
            raise TrainingError(f"the loss term {name!r} has shape {tuple(term.sum.shape)}; a term is one SUM")
        if totals[term.per]:
            shares.append(term.sum * (term.coefficient * world_size / totals[term.per]))
    return torch.stack(shares).sum() if shares else sum((term.sum for term in terms.values()), torch.zeros(())) * 0


def _joined(a: list[Any], b: list[Any]) -> list[Any]:
    if a[2] == "max":
        return max(a, b)
    return [x if isinstance(x, str) else x + y for x, y in zip(a, b, strict=True)]


def _exp(value: float) -> float:
    return math.exp(value) if value < 709 else math.inf


def _to_floats(values: list[Tensor | float]) -> list[float]:
    """Read all numbers from the device at once."""
    if not values:
        return []
    device = next((value.device for value in values if isinstance(value, Tensor)), None)
    as_tensors = [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in values]
    return torch.stack(as_tensors).tolist()
