"""What is to be done with a step, and why: by what it followed from when it was made, and follows from now."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmtk.errors import ConfigurationError
from llmtk.folder import LOCK, RESULTS, may_change
from llmtk.pipeline.inputs import inputs_of

if TYPE_CHECKING:
    from llmtk.pipeline.reading import Step
    from llmtk.pipeline.record import Record
    from llmtk.run import Run

RUN, RESUME, AGAIN, SKIP = "run", "resume", "run again", "skip"
"""What is done with a step. `run again` puts the old run aside."""
SHOWN = 4
"""Changes that are named before they are only counted."""


@dataclass(frozen=True)
class Decision:
    """What is to be done with a step, and why."""

    step: Step
    action: str
    why: str
    changed: tuple[str, ...] = ()
    """Settings in which a resumed step differs from what it was."""


def decide(step: Step, run: Run, record: Record, *, rerun: bool = False, waiting: Collection[str] = ()) -> Decision:
    """Return what is to be done with a step, whose run is made and not set up.

    `waiting` are the steps that it takes from and that are yet to be run: then it is what can be said of it by now.
    Raises ConfigurationError where the step's folder is not the pipeline's, or somebody is at it.
    """
    others = " and ".join(waiting)
    if not _is_begun(step, record):
        return Decision(step, RUN, f"with what comes of {others}" if others else "it was not begun")
    if rerun:
        return Decision(step, AGAIN, "as is asked for")
    inputs = inputs_of(run, record.folder, record.hashes)
    changes = {
        key: change
        for key, change in inputs.changes(record.steps[step.name].inputs, run.config.given).items()
        if not key.startswith(tuple(f"step:{name}/" for name in waiting))
    }
    decision = _finished(step, record, changes) if is_finished(step) else _interrupted(step, run, changes)
    if others and decision.action == SKIP:
        return Decision(step, AGAIN, f"if {others} should come out other than before")
    if others and decision.action == RESUME:
        return replace(decision, why=f"{decision.why}; or run again, if {others} should come out other than before")
    return decision


def is_finished(step: Step) -> bool:
    """Whether a step has come to its end."""
    return (step.folder / RESULTS).is_file()


def output_of(step: Step, record: Record) -> dict[str, str]:
    """Return the files of a step's model, with their SHA-256."""
    return {Path(file).name: found for file, found in record.hashes.of_all(step.folder).items()}


def check(run: Run, waiting: Collection[str]) -> None:
    """Refuse what can be refused without loading a model. `waiting` are settings that name what is not there yet."""
    from llmtk.training import setup

    try:
        if not waiting:
            setup.check(run)
        if not any(key.startswith("data.") for key in waiting):
            setup.read_rows(run)
    finally:
        run.hooks.run_finished(None)  # a stage may have begun something to check it


def _is_begun(step: Step, record: Record) -> bool:
    from llmtk.reporting.stored import is_locked

    if not step.folder.exists() or (step.folder.is_dir() and not any(step.folder.iterdir())):
        return False
    if step.name not in record.steps:
        raise ConfigurationError(
            f"{step.folder} was not made by this pipeline. Move it away, or give another output_dir"
        )
    if is_locked(step.folder / LOCK):
        raise ConfigurationError(f"{step.folder} is in use by another process; wait for it, or end it")
    return True


def _finished(step: Step, record: Record, changes: Mapping[str, str]) -> Decision:
    if changes:
        return Decision(step, AGAIN, _in_words(changes))
    # None: the pipeline was killed just before it could write this down.
    if record.steps[step.name].output not in (None, output_of(step, record)):
        return Decision(step, AGAIN, "its model is not the one that it wrote")
    return Decision(step, SKIP, "finished, nothing has changed")


def _interrupted(step: Step, run: Run, changes: Mapping[str, str]) -> Decision:
    from llmtk.training.checkpoints import list_checkpoints

    if not all(may_change(run, key) for key in changes):
        return Decision(step, AGAIN, _in_words(changes))
    if not run.config.train.do_train:
        return Decision(step, AGAIN, "it was interrupted, and an evaluation is not gone on with")
    saved = list_checkpoints(run.checkpoints)
    where = f"after step {saved[-1][0]}" if saved else "before its first checkpoint"
    what = f"; {_in_words(changes)}" if changes else ""
    return Decision(step, RESUME, f"it was interrupted {where}{what}", tuple(changes))


def _in_words(changes: Mapping[str, str]) -> str:
    told = [f"{key}: {change}" for key, change in list(changes.items())[:SHOWN]]
    return ", ".join(told) + (f", and {len(changes) - SHOWN} more" if len(changes) > SHOWN else "")
