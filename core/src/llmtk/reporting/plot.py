"""The run's curves as pictures."""

from __future__ import annotations

import io
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Curve = Sequence[tuple[int, float]]


def plot_losses(metrics: list[dict[str, Any]], title: str, file: Path) -> bool:
    """Draw training and evaluation loss over steps; return whether there was anything to draw."""
    curves = {
        label: [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        for label, key in (("training", "loss"), ("evaluation", "eval_loss"))
    }
    if not any(curves.values()):
        return False
    # Without pyplot: no window system is asked for, and no global state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, points), marker in zip(curves.items(), (None, "o"), strict=True):
        if points:
            steps, losses = zip(*points, strict=True)
            axes.plot(steps, losses, label=label, marker=marker or ("." if len(points) < 30 else None))
    axes.set(xlabel="optimizer step", ylabel="loss", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)
    return True


def curves_svg(panels: Mapping[str, Mapping[str, Curve]], columns: int = 3) -> str:
    """Draw small plots side by side, as one `<svg>` that can stand in a page and refers to nothing outside.

    `panels` are curves by their label, by the title of the plot that they share; each is (step, value).
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = -(-len(panels) // columns)
    buffer = io.StringIO()
    # Text stays text; and equal curves give equal bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmtk", "font.size": 8}):
        figure = Figure(figsize=(4 * columns, 2.4 * rows), layout="tight")
        for axes, panel in zip_longest(figure.subplots(rows, columns, squeeze=False).flat, panels.items()):
            if panel is None:
                axes.set_axis_off()
            else:
                _draw(axes, *panel)
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    drawn = buffer.getvalue()
    return drawn[drawn.index("<svg") :]


def _draw(axes: Any, title: str, curves: Mapping[str, Curve]) -> None:
    for label, curve in curves.items():
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, label=label, marker="." if len(curve) < 30 else None)
    axes.set_title(title, parse_math=False)
    axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
