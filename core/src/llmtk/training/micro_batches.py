"""How a window becomes micro-batches: as many on every rank, whatever each rank holds.

Every forward is collective, so the ranks agree on a number before they cut: that of the rank that needs most. One with
fewer groups than that runs one of its micro-batches again, its loss counting nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from llmtk.batch import Batch
from llmtk.training.backend import add_up
from llmtk.training.balance import even_out, pack

if TYPE_CHECKING:
    from llmtk.training.backend import Backend


@dataclass(frozen=True)
class MicroBatch:
    """A part of a window. One that does not count is there only to keep this rank in step with the others."""

    batch: Batch
    groups: Sequence[int]
    """The groups of the window that it holds."""
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
    """Cut a window, in order by a number of groups, or by a token budget. All ranks must call it together.

    With a budget, micro-batches are few on the rank that needs most, of about equal size on each rank, and the largest
    comes first, so that what does not fit into memory shows at once. A group over the budget stands alone.
    """
    sizes = window.group_tokens.tolist()
    packed = pack(sizes, tokens) if tokens else []
    mine = {
        "weights": {name: float(column.sum()) for name, column in window.weights.items()},
        "parts": len(packed) if tokens else -(-len(window) // rows),
        "groups": len(window),
        "tokens": len(window.tokens),
    }
    everyone = backend.gather(mine)
    wanted = max(rank["parts"] for rank in everyone)
    chosen = even_out(packed, sizes, wanted) if tokens else _in_order(len(window), rows, wanted)
    parts = [MicroBatch(_of(window, groups), groups) for groups in chosen]
    spare = _spare(parts, everyone, backend) if wanted else None
    if spare is not None:
        parts += [replace(spare, counts=False)] * (wanted - len(parts))
    return Cut(
        parts=[replace(part, batch=backend.to_device(part.batch)) for part in parts],
        totals=add_up(rank["weights"] for rank in everyone),
        groups=sum(rank["groups"] for rank in everyone),
        tokens=sum(rank["tokens"] for rank in everyone),
    )


def cut_sizes(sizes: Sequence[int], rows: int, tokens: int | None) -> list[list[int]]:
    """Cut groups of these sizes as `cut_window` would on one rank; return the sizes, part by part."""
    if tokens:
        packed = pack(sizes, tokens)
        return [[sizes[group] for group in part] for part in even_out(packed, sizes, len(packed))]
    return [list(sizes[start : start + rows]) for start in range(0, len(sizes), rows)]


def _in_order(groups: int, rows: int, wanted: int) -> list[range]:
    """Cut by `rows`; where that gives fewer than `wanted` parts, into as many of about equally many groups."""
    if -(-groups // rows) == wanted:
        return [range(start, min(start + rows, groups)) for start in range(0, groups, rows)]
    wanted = min(wanted, groups)
    return [range(groups * part // wanted, groups * (part + 1) // wanted) for part in range(wanted)]


def _of(window: Batch, groups: Sequence[int]) -> Batch:
    return window if len(groups) == len(window) else window.select(groups)


def _spare(parts: list[MicroBatch], everyone: list[dict[str, int]], backend: Backend) -> MicroBatch | None:
    """Return a real micro-batch for keeping step: this rank's smallest, or another's where this rank has none.

    A real one, because a stage should never meet a batch without rows.
    """
    mine = min(parts, key=lambda part: len(part.batch.tokens)) if parts else None
    if all(rank["groups"] for rank in everyone):
        return mine
    source = next(index for index, rank in enumerate(everyone) if rank["groups"])
    borrowed: MicroBatch = backend.broadcast(mine if backend.rank == source else None, source)
    return mine if mine is not None else borrowed
