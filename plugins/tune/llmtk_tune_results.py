"""What came of a sweep: a table, a file of results, a picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from llmtk.cli.tables import aligned

if TYPE_CHECKING:
    from llmtk_tune import Sweep
    from optuna import Study
    from optuna.trial import FrozenTrial

_STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "unfinished",
}


def table(sweep: Sweep, study: Study) -> list[str]:
    """Return the trials as lines, the best first."""
    trials = sorted(_drawn(study), key=lambda trial: _rank(sweep, trial))
    head = ["TRIAL", *sweep.space, sweep.metric, "STATE", "SECONDS"]
    rows = [
        [
            f"{trial.number + 1}" + (" *" if trial.number == study.best_trial.number else ""),
            *(_short(value) for value in sweep.settings(trial).values()),
            "" if trial.value is None else f"{trial.value:.6g}",
            _STATES[trial.state],
            "" if trial.duration is None else f"{trial.duration.total_seconds():.0f}",
        ]
        for trial in trials
    ]
    return aligned([head, *rows])


def write(sweep: Sweep, study: Study) -> None:
    """Write results.json: each trial's settings, value, state and folder, and which did best."""
    trials = [
        {
            "trial": trial.number + 1,
            "settings": sweep.settings(trial),
            "value": trial.value,
            "state": _STATES[trial.state],
            "folder": str(sweep.run_folder(trial.number)),
        }
        for trial in _drawn(study)
    ]
    best = study.best_trial.number + 1
    facts = {"metric": sweep.metric, "maximize": sweep.maximize, "best": best, "trials": trials}
    (sweep.folder / "results.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def plot(sweep: Sweep, study: Study) -> None:
    """Draw the metric over the trials, with the best so far, and over each setting."""
    from matplotlib.figure import Figure

    finished = study.get_trials(states=[TrialState.COMPLETE])
    values = [trial.values[0] for trial in finished]
    best_so_far = [(max if sweep.maximize else min)(values[: index + 1]) for index in range(len(values))]
    count = 1 + len(sweep.space)
    figure = Figure(figsize=(3.6 * count, 3.4), layout="constrained")
    first, *others = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    numbers = [trial.number + 1 for trial in finished]
    first.plot(numbers, values, "o")
    first.step(numbers, best_so_far, where="post", color="C1", label="best so far")
    first.set(xlabel="trial", ylabel=sweep.metric)
    first.locator_params(axis="x", integer=True, min_n_ticks=1)
    first.legend()
    for axes, (key, space) in zip(others, sweep.space.items(), strict=True):
        points = [sweep.settings(trial)[key] for trial in finished]
        numeric = all(isinstance(point, int | float) and not isinstance(point, bool) for point in points)
        axes.plot(points if numeric else [_short(point) for point in points], values, "o")
        if getattr(space, "log", False):
            axes.set_xscale("log")
            # Within a decade every tick has a label, 2×10⁻⁵, 3×10⁻⁵, ...: level ones would lie upon each other.
            axes.tick_params(axis="x", which="both", labelrotation=45)
        axes.set_xlabel(key)
    for axes in (first, *others):
        axes.grid(alpha=0.3)
    figure.savefig(sweep.folder / "sweep.png", dpi=120)


def _drawn(study: Study) -> list[FrozenTrial]:
    """Return the trials that have settings: not those that wait, nor one that was killed before it had any."""
    return [trial for trial in study.get_trials() if trial.params and trial.state in _STATES]


def _rank(sweep: Sweep, trial: FrozenTrial) -> tuple[bool, float]:
    if trial.state != TrialState.COMPLETE or trial.value is None:
        return True, trial.number
    return False, -trial.value if sweep.maximize else trial.value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
