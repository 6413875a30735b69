"""Runs side by side: in which settings they differ, what came of them, and their curves in characters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, suggest
from llmtk.folder import flat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmtk.reporting.stored import StoredRun

CURVES = ("loss", "reward", "eval_loss", "eval_reward")
"""The metrics whose curves are shown where nobody asks for others."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_NOT_COMPARED = frozenset({"output_dir"})


def differences(mappings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return, by dotted key, each mapping's value where they are not all equal; None where one lacks the key."""
    flats = [flat(mapping) for mapping in mappings]
    keys = dict.fromkeys(key for found in flats for key in found)
    values = {key: [found.get(key) for found in flats] for key in keys if key not in _NOT_COMPARED}
    return {key: found for key, found in values.items() if any(value != found[0] for value in found[1:])}


def outcomes(runs: Sequence[StoredRun]) -> dict[str, list[Any]]:
    """Return what each run came to: status, steps, and the last value of each metric that its results hold."""
    names = dict.fromkeys(name for run in runs for name in run.results.get("metrics") or {})
    return {
        "status": [run.status for run in runs],
        "steps": [run.steps for run in runs],
        "final_loss": [run.last("loss") for run in runs],
        "best_metric": [run.results.get("best_metric") for run in runs],
        **{name: [(run.results.get("metrics") or {}).get(name) for run in runs] for name in names},
    }


def curves_asked(runs: Sequence[StoredRun], asked: Sequence[str]) -> list[str]:
    """Return which metrics' curves to show. ConfigurationError for one that no run has measured."""
    known = list(dict.fromkeys(name for run in runs for name in run.metric_names))
    for name in asked:
        if name not in known:
            there_are = f"they have {', '.join(known)}" if known else "they have logged nothing yet"
            raise ConfigurationError(f"--metric {name}: none of the runs has it; {there_are}.{suggest(name, known)}")
    return list(asked) or [name for name in CURVES if name in known]


def sparklines(curves: Sequence[Sequence[tuple[int, float]]], width: int = 40) -> list[str]:
    """Draw curves, each in a line of `width` characters, all on one scale of steps and of values."""
    values = [value for curve in curves for _, value in curve]
    if not values:
        return [" " * width for _ in curves]
    low, high = min(values), max(values)
    last = max(1, *(step for curve in curves for step, _ in curve))
    return ["".join(_block(value, low, high) for value in _columns(curve, last, width)) for curve in curves]


def _columns(curve: Sequence[tuple[int, float]], last: int, width: int) -> list[float | None]:
    """Return the mean of the points in each column; between points the former's, and outside of the curve None."""
    columns: list[float | None] = []
    until = max((step for step, _ in curve), default=-1)
    for column in range(width):
        start, end = last * column / width, last * (column + 1) / width
        inside = [value for step, value in curve if start < max(step, 1) <= end]
        held = columns[-1] if columns and start < until else None
        columns.append(sum(inside) / len(inside) if inside else held)
    return columns


def _block(value: float | None, low: float, high: float) -> str:
    if value is None:
        return " "
    share = (value - low) / (high - low) if high > low else 0.5
    return _BLOCKS[min(int(share * len(_BLOCKS)), len(_BLOCKS) - 1)]
