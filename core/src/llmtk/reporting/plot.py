"""The run's loss curves as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


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
