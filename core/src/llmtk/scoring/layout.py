"""How a batch lies in one packed row: each segment behind the other, nothing padded, a shared prefix once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llmtk.batch import Batch


@dataclass(frozen=True, eq=False)
class Layout:
    """A packed row of T tokens.

    `ids`, `positions` (1, T); `lengths` of the segments in their order, which add up to T; `prefixes`, for each segment
    the one that it continues, or -1; `predictors` (targets,), the index in the row whose hidden state predicts each
    target.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    prefixes: list[int]
    predictors: Tensor

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Pack a batch. A sequence's last token predicts nothing, so it is not fed; all of a prefix is.

        A single token that stands alone is, since models take no row without any.
        """
        device = batch.tokens.device
        is_sequence = batch.is_sequence
        prefix = batch.segment_prefix
        fed = torch.maximum(batch.segment_lengths - is_sequence.long(), (prefix == -1).long())
        starts = fed.cumsum(0) - fed
        continues = prefix >= 0
        behind = torch.where(continues, batch.segment_lengths[prefix.clamp(min=0)], 0)

        within = torch.arange(len(batch.tokens), device=device) - batch.segment_starts.repeat_interleave(
            batch.segment_lengths
        )
        segment = torch.arange(len(fed), device=device).repeat_interleave(batch.segment_lengths)
        kept = within < fed[segment]

        target_segment, target_within = segment[batch.targets], within[batch.targets]
        before = starts[target_segment] + target_within - 1
        last_of_prefix = (starts + fed - 1)[prefix[target_segment].clamp(min=0)]
        return cls(
            ids=batch.tokens[kept][None],
            positions=(within + behind[segment])[kept][None],
            lengths=fed.tolist(),
            prefixes=torch.where(continues, prefix, -1).tolist(),
            predictors=torch.where(target_within == 0, last_of_prefix, before),
        )
