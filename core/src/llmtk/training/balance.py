"""Who takes which rows: shares and micro-batches of about equal size. Pure functions of sizes, the same on every rank.

Sizes are tokens. Attention grows with the square of a row's length, but until rows are several times longer than the
model is wide, most of the work is matrix products, which are linear in tokens; and so is the memory that a token
budget bounds. Ties go by position, so that nothing depends on anything but the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Deal rows to hands of about equal size that hold equally many, but for one more in the first ones.

    The largest row that is left goes to the lightest hand with room (Graham 1969: longest processing time first).
    Returns for each hand its rows, as indices of `sizes`, in their order.
    """
    count, more = divmod(len(sizes), hands)
    room = [count + (hand < more) for hand in range(hands)]
    dealt: list[list[int]] = [[] for _ in range(hands)]
    lightest = [(0, hand) for hand in range(hands) if room[hand]]
    for row in _largest_first(sizes):
        size, hand = heappop(lightest)
        dealt[hand].append(row)
        if len(dealt[hand]) < room[hand]:
            heappush(lightest, (size + sizes[row], hand))
    return [sorted(hand) for hand in dealt]


def pack(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Pack groups into few parts of at most `budget` each; a group over it stands alone.

    The largest group that is left goes to the first part with room (first-fit decreasing, which takes at most 11/9 of
    the fewest parts possible plus 2/3: Dósa 2007). Returns for each part its groups, as indices of `sizes`.
    """
    parts: list[list[int]] = []
    filled: list[int] = []
    for group in _largest_first(sizes):
        size = sizes[group]
        part = next((part for part, inside in enumerate(filled) if inside + size <= budget), len(parts))
        if part == len(parts):
            parts.append([])
            filled.append(0)
        parts[part].append(group)
        filled[part] += size
    return parts


def even_out(parts: Sequence[Sequence[int]], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Make `count` parts of about equal size of no more parts than that, the largest first.

    Groups move from fuller parts to the emptiest until each part exceeds it by no more than the smallest of its own
    groups: then a move would only change their places. No part becomes larger than the largest was. There are fewer
    than `count` only where groups are. Groups stand in each part in their order.
    """
    evened = [list(part) for part in parts] + [[] for _ in range(count - len(parts))]
    filled = [sum(sizes[group] for group in part) for part in evened]
    while move := _next_move(evened, filled, sizes):
        group, source, target = move
        evened[source].remove(group)
        evened[target].append(group)
        filled[source] -= sizes[group]
        filled[target] += sizes[group]
    order = sorted(range(len(evened)), key=lambda part: -filled[part])
    return [sorted(evened[part]) for part in order if evened[part]]


def _next_move(
    parts: Sequence[Sequence[int]], filled: Sequence[int], sizes: Sequence[int]
) -> tuple[int, int, int] | None:
    """Return (group, source, target): the move that brings the fullest part it can and the emptiest closest."""
    target = min(range(len(parts)), key=lambda part: filled[part], default=0)
    for source in sorted(range(len(parts)), key=lambda part: -filled[part]):
        gap = filled[source] - filled[target]
        if movable := [group for group in parts[source] if 0 < sizes[group] < gap]:
            return min(movable, key=lambda group: abs(2 * sizes[group] - gap)), source, target
    return None


def _largest_first(sizes: Sequence[int]) -> list[int]:
    return sorted(range(len(sizes)), key=lambda row: -sizes[row])
