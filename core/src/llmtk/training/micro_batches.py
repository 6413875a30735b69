"""How a window becomes micro-batches: as many on every rank, whatever each rank holds.

Every forward is collective, so ranks with fewer micro-batches split theirs further, and where there is nothing left to
split they run one more whose loss counts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmtk.batch import Batch
from llmtk.training.backend import add_up

if TYPE_CHECKING:
    from llmtk.training.backend import Backend


@dataclass(frozen=True)
class MicroBatch:
    """A part of a window. One that does not count is there only to keep this rank in step with the others."""

    batch: Batch
    counts: bool = True


@dataclass(frozen=True)
class Cut:
    """This rank's micro-batches of a window, on its device, and the weights of the window over all ranks."""

    parts: list[MicroBatch]
    totals: Mapping[str, float]
    groups: int
    """Groups of the window over all ranks."""
    tokens: int
    """Tokens of the window over all ranks, shared prefixes once."""


def cut_window(window: Batch, backend: Backend, *, rows: int, tokens: int | None = None) -> Cut:
    """Cut a window by a number of groups, or by a token budget. All ranks must call it together."""
    parts = _by_tokens(window, tokens) if tokens else _by_rows(window, rows)
    mine = {
        "weights": {name: float(column.sum()) for name, column in window.weights.items()},
        "parts": len(parts),
        "groups": len(window),
        "tokens": len(window.tokens),
    }
    everyone = backend.gather(mine)
    wanted = max(rank["parts"] for rank in everyone)
    spare = _spare(parts, everyone, backend) if wanted else None
    micro_batches = [MicroBatch(part) for part in _split(parts, wanted)]
    while spare is not None and len(micro_batches) < wanted:
        micro_batches.append(MicroBatch(spare, counts=False))
    return Cut(
        parts=[MicroBatch(part.batch.to(backend.device), part.counts) for part in micro_batches],
        totals=add_up(rank["weights"] for rank in everyone),
        groups=sum(rank["groups"] for rank in everyone),
        tokens=sum(rank["tokens"] for rank in everyone),
    )


def _by_rows(window: Batch, rows: int) -> list[Batch]:
    if len(window) <= rows:
        return [window] if len(window) else []
    return [window.select(range(start, min(start + rows, len(window)))) for start in range(0, len(window), rows)]


def _by_tokens(window: Batch, budget: int) -> list[Batch]:
    """Fill micro-batches in order, up to the budget; a group over it stands alone."""
    chunks: list[list[int]] = []
    filled = budget + 1
    for group, tokens in enumerate(window.group_tokens.tolist()):
        if filled + tokens > budget:
            chunks.append([])
            filled = 0
        chunks[-1].append(group)
        filled += tokens
    return [window.select(chunk) for chunk in chunks]


def _split(parts: list[Batch], wanted: int) -> list[Batch]:
    """Halve the largest micro-batches until there are as many as wanted, or none can be split."""
    parts = list(parts)
    while parts and len(parts) < wanted:
        largest = max(range(len(parts)), key=lambda index: len(parts[index]))
        whole = parts[largest]
        if len(whole) < 2:
            break
        half = len(whole) // 2
        parts[largest : largest + 1] = [whole.select(range(half)), whole.select(range(half, len(whole)))]
    return parts


def _spare(parts: list[Batch], everyone: list[dict[str, int]], backend: Backend) -> Batch | None:
    """Return a real micro-batch for keeping step: this rank's smallest, or another's where this rank has none.

    A real one, because a stage should never meet a batch without rows.
    """
    mine = min(parts, key=lambda part: len(part.tokens)) if parts else None
    if all(rank["parts"] for rank in everyone):
        return mine
    source = next(index for index, rank in enumerate(everyone) if rank["parts"])
    borrowed: Batch = backend.broadcast(mine if backend.rank == source else None, source)
    return mine if mine is not None else borrowed
