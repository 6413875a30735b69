"""How a batch lies in one packed row: each segment behind the other, nothing padded, a shared prefix once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from llmtk.batch import Batch

SPARE = 10_000
"""Scores of padding a segment, at most, for which a grid is still faster than one segment after the other."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Segments that stand alone as rows of a grid, (segments, longest), for one attention over all of them.

    `cells` (segments x longest,) says which token of the packed row stands in each cell, any one in those behind a
    segment's end, which no token of it looks at; `back` (T,), where each token stands. Both are None where all segments
    have one length, and grid and row are the same.
    """

    segments: int
    longest: int
    cells: Tensor | None = None
    back: Tensor | None = None


class PackedRow(Protocol):
    """What goes through a patched model: `ids` and `positions` (1, T), `predictors` (n,), and how its tokens attend."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def predictors(self) -> Tensor: ...
    @property
    def copies(self) -> Tensor: ...
    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class Layout:
    """A packed row of T tokens.

    `ids`, `positions` (1, T); `lengths` of the segments in their order, which add up to T; `prefixes`, for each segment
    the one that it continues, or -1; `predictors` (targets,), the index in the row whose hidden state predicts each
    target; `copies` (T,) int64, how many sequences read each token: several that of a prefix.
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    prefixes: list[int]
    predictors: Tensor
    copies: Tensor
    masks: dict[tuple[int | None, torch.device], Any] = field(init=False, default_factory=dict, repr=False)
    """Masks of this row by window and device, which its layers share. See `llmtk.scoring.flex`."""

    @classmethod
    def of(cls, batch: Batch) -> Layout:
        """Pack a batch. A sequence's last token predicts nothing, so it is not fed; all of a prefix is.

        A single token that stands alone is, since models take no row without any.
        """
        device, host = batch.tokens.device, batch.host
        is_sequence = host.is_sequence
        prefix, own = host.segment_prefix, host.segment_lengths
        fed = torch.maximum(own - is_sequence.long(), (prefix == -1).long())
        starts = fed.cumsum(0) - fed
        continues = prefix >= 0
        behind = torch.where(continues, own[prefix.clamp(min=0)], 0)

        within = torch.arange(len(host.tokens)) - host.segment_starts.repeat_interleave(own)
        segment = torch.arange(len(fed)).repeat_interleave(own)
        kept = (within < fed[segment]).nonzero().flatten()

        target_segment, target_within = segment[host.targets], within[host.targets]
        before = starts[target_segment] + target_within - 1
        last_of_prefix = (starts + fed - 1)[prefix[target_segment].clamp(min=0)]
        readers = is_sequence.long().scatter_add(0, prefix.clamp(min=0), continues.long())
        return cls(
            ids=batch.tokens[kept.to(device)][None],
            positions=(within + behind[segment])[kept][None].to(device),
            lengths=fed.tolist(),
            prefixes=torch.where(continues, prefix, -1).tolist(),
            predictors=torch.where(target_within == 0, last_of_prefix, before).to(device),
            copies=readers[segment][kept].to(device),
        )

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        """Attend in a layer of the model that this row goes through. See `packed_attention`."""
        from llmtk.scoring.attention import packed_attention

        return packed_attention(module, query, key, value, self, **settings)

    @cached_property
    def grid(self) -> Grid | None:
        """The grid of a row of short segments without prefixes; None where it would be mostly padding."""
        segments, longest = len(self.lengths), max(self.lengths, default=0)
        padding = segments * longest**2 - sum(length**2 for length in self.lengths)
        if segments < 2 or padding > SPARE * segments or any(prefix >= 0 for prefix in self.prefixes):
            return None
        if padding == 0:
            return Grid(segments, longest)
        device = self.ids.device
        lengths = torch.tensor(self.lengths, device=device)
        row = torch.arange(segments, device=device).repeat_interleave(lengths)
        within = torch.arange(self.ids.shape[1], device=device) - (lengths.cumsum(0) - lengths)[row]
        back = row * longest + within
        cells = torch.zeros(segments * longest, dtype=torch.int64, device=device)
        cells[back] = torch.arange(self.ids.shape[1], device=device)
        return Grid(segments, longest, cells, back)
