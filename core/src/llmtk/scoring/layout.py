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


@dataclass(frozen=True, eq=False)
class Behind:
    """Segments as rows of a grid, (segments, queries), their keys beside, (segments, keys): a prefix's, then their own.

    `cells` and `key_cells` say which token of the packed row stands where, any one where there is none; `at` (segments,
    queries) and `key_at` (segments, keys) their positions in the sequence, beyond any query's where there is none;
    `is_token` (segments, queries), where there is one.
    """

    cells: Tensor
    key_cells: Tensor
    at: Tensor
    key_at: Tensor
    is_token: Tensor
    biases: dict[int | None, Tensor] = field(init=False, default_factory=dict, repr=False)

    @classmethod
    def of(cls, starts: Tensor, lengths: Tensor, prefix_starts: Tensor, prefix_lengths: Tensor) -> Behind:
        """Lay segments (segments,) of a packed row out, each with its prefix, which may have no tokens."""
        start, length, before = starts[:, None], lengths[:, None], prefix_lengths[:, None]
        query = torch.arange(int(lengths.max()))[None]
        key = torch.arange(int((lengths + prefix_lengths).max()))[None]
        here, own = query < length, key - before
        inside = (own < length) & (own >= 0)
        key_cells = torch.where(own < 0, prefix_starts[:, None] + key, torch.where(inside, start + own, 0))
        return cls(
            cells=torch.where(here, start + query, 0),
            key_cells=key_cells,
            at=torch.where(here, before + query, 0),
            key_at=torch.where(own < length, key, FAR),
            is_token=here,
        )

    def bias(self, window: int | None, device: torch.device) -> Tensor:
        """Return (segments, 1, queries, keys): 0, or minus infinity for keys that a query must not see."""
        if window not in self.biases:
            with torch.inference_mode(False):  # a later backward pass may use it
                at, key_at = self.at[:, :, None], self.key_at[:, None]
                unseen = (key_at > at) if window is None else (key_at > at) | (key_at <= at - window)
                bias = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
                self.biases[window] = bias[:, None].to(device)
        return self.biases[window]


FAR = 2**40


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
    def grids(self) -> tuple[list[Behind], Tensor] | None:
        """Two grids, of segments that stand alone and of those behind a prefix, and each token's cell (T,) in both.

        None where a grid would be mostly padding, or nothing stands behind a prefix.
        """
        lengths, prefixes = torch.tensor(self.lengths), torch.tensor(self.prefixes)
        behind = (prefixes >= 0) & (lengths > 0)
        if int(behind.sum()) < 2:
            return None
        starts = lengths.cumsum(0) - lengths
        prefix_lengths = torch.where(behind, lengths[prefixes.clamp(min=0)], 0)
        prefix_starts = starts[prefixes.clamp(min=0)]
        grids, back, before = [], torch.zeros(int(lengths.sum()), dtype=torch.int64), 0
        for chosen in ((prefixes < 0) & (lengths > 0), behind):
            queries, keys = lengths[chosen], (lengths + prefix_lengths)[chosen]
            padding = len(queries) * queries.max() * keys.max() - (queries * keys).sum()
            if int(padding) > SPARE * len(queries):
                return None
            grid = Behind.of(starts[chosen], queries, prefix_starts[chosen], prefix_lengths[chosen])
            cells = torch.arange(before, before + grid.cells.numel()).view(grid.cells.shape)
            back[grid.cells[grid.is_token]] = cells[grid.is_token]
            before += grid.cells.numel()
            grids.append(grid)
        return grids, back

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
