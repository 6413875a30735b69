"""What scoring answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llmtk.batch import Batch

ALSO = ("entropy", "vocab_mean", "square_sum", "top1", "logsumexp", "values")
"""What can be asked for beside log-probs, from the same pass."""


def checked(also: Iterable[str]) -> frozenset[str]:
    """Return what is asked for as a set. ValueError for an unknown name."""
    wanted = frozenset(also)
    if unknown := wanted - set(ALSO):
        raise ValueError(f"score can give {', '.join(ALSO)} beside log-probs, not {sorted(unknown)[0]!r}")
    return wanted


@dataclass(frozen=True)
class Scores:
    """Log-probs of a batch's target tokens, in the batch's order; natural logarithms, float32.

    `logps` (targets,). On request, also (targets,): `entropy` of the predicted distribution in nats; `vocab_mean`, the
    mean log-prob over the vocabulary (label smoothing); `square_sum`, the sum of the squared probabilities, without
    gradient; `top1`, whether the target was the likeliest token; `logsumexp`, of the logits: what normalises them;
    `values`, those of a head of one value that stands beside the language model's own, as `run.values` gives them.
    """

    batch: Batch
    logps: Tensor
    entropy: Tensor | None = None
    vocab_mean: Tensor | None = None
    square_sum: Tensor | None = None
    top1: Tensor | None = None
    logsumexp: Tensor | None = None
    values: Tensor | None = None

    def sum(self) -> Tensor:
        """(sequences,): the log-prob of each sequence's targets together."""
        return self.batch.sum_by_sequence(self.logps)

    def mean(self) -> Tensor:
        """(sequences,): the mean log-prob of each sequence's targets; 0 for a sequence without any."""
        return self.sum() / self.batch.target_counts.clamp(min=1)

    @staticmethod
    def join(parts: Sequence[Scores], targets: Tensor, batch: Batch, also: Iterable[str] = ()) -> Scores:
        """Put the scores of micro-batches, perhaps none, together as those of the whole batch.

        `targets` (targets,) int64 says which of the batch's targets the parts have, one part after the other.
        """
        device = batch.tokens.device

        def joined(name: str) -> Tensor:
            whole = torch.zeros(len(targets), dtype=torch.bool if name == "top1" else torch.float32, device=device)
            if parts:
                whole[targets.to(device)] = torch.cat([getattr(part, name) for part in parts])
            return whole

        return Scores(batch, joined("logps"), **{name: joined(name) for name in also})
