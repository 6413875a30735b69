"""What the checks have in common: how they are named, run and told."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, LlmtkError, located, suggest

if TYPE_CHECKING:
    from llmtk.contract import Stage
    from llmtk.testing.trial import Trial


class Verdict(Enum):
    """What came of a check."""

    PASSED = "passed"
    FAILED = "FAILED"
    SKIPPED = "skipped"


@dataclass(frozen=True)
class Outcome:
    """What one check found: for a failure, what is wrong and how to mend it; for one that was skipped, why."""

    check: str
    title: str
    verdict: Verdict
    seconds: float
    message: str = ""
    mend: str = ""


@dataclass(frozen=True)
class Check:
    """A check: its title says what holds of a stage that passes it, and `mend` how to get there.

    `begin` starts what it needs of other processes, before all checks.
    """

    title: str
    mend: str
    run: Callable[[Trial], None]
    begin: Callable[[Trial], object] | None = None


class Failure(Exception):
    """A stage does not do what the check is about. The message says what it does, `mend` what to do.

    Without a mend of its own it has the check's.
    """

    def __init__(self, message: str, mend: str = "") -> None:
        super().__init__(message)
        self.mend = mend


class NotApplicable(Exception):
    """The check has nothing to look at in this stage. The message says why."""


class ConformanceError(AssertionError):
    """A stage failed at least one check."""


CRASHED = "Look at that line. `llmtk run STAGE --debug`, where it crashes in the same way, shows the whole traceback."

CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which they run."""


def check(
    name: str, title: str, mend: str, begin: Callable[[Trial], object] | None = None
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register the decorated function as a check. It raises `Failure` or `NotApplicable`, or returns."""

    def register(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
        CHECKS[name] = Check(title, mend, run, begin)
        return run

    return register


def check_stage(
    stage: str | type[Stage],
    checks: str | Iterable[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> list[Outcome]:
    """Check a stage against the contract, on a tiny model, on the CPU.

    Args:
        stage: An installed stage's name, or its class.
        checks: Which of `CHECKS`; by default all of them.
        options: The stage's options. By default those of its demo.
        rows: Rows to train on, two dozen or so. By default those of its demo.

    Raises:
        ConformanceError: It failed one or more. The message is a report of these.
    """
    found = list(outcomes(stage, checks, options=options, rows=rows))
    failed = [outcome for outcome in found if outcome.verdict is Verdict.FAILED]
    if failed:
        raise ConformanceError(f"{len(failed)} of {len(found)} checks failed\n\n" + "\n\n".join(map(_report, failed)))
    return found


def _report(failed: Outcome) -> str:
    mend = [f"Mend: {failed.mend}"] if failed.mend else []
    return "\n  ".join([f"{failed.check}: {failed.title}", failed.message, *mend])


def outcomes(
    stage: str | type[Stage],
    checks: str | Iterable[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Outcome]:
    """Run checks one after the other, as `check_stage` does, and yield what each found.

    They end with the first that fails where the stage's class cannot be loaded, or is refused as it is.
    """
    from llmtk.testing.trial import Trial
    from llmtk.testing.two_ranks import WORKER

    if WORKER in os.environ:  # else two processes would start two each, and so on
        raise ConfigurationError(
            "The file of the stage calls check_stage as it is imported, and two ranks import it to find the class. Put "
            'the call below `if __name__ == "__main__":`, or into a test'
        )
    wanted = _wanted(checks)
    told: dict[str, str] = {}  # what failed, by what was said of it: one crash fails many checks
    with tempfile.TemporaryDirectory(prefix="llmtk-check-") as folder, contextlib.ExitStack() as stack:
        trial = Trial(stage, Path(folder), options=options, rows=rows)
        stack.callback(trial.end)
        for begin in filter(None, (CHECKS[name].begin for name in wanted)):
            with contextlib.suppress(Exception):  # the check does it again, and tells
                begin(trial)
        for name in wanted:
            outcome = _outcome(name, CHECKS[name], trial)
            if outcome.verdict is Verdict.FAILED and (first := told.setdefault(outcome.message, name)) != name:
                outcome = replace(outcome, message=f"as told of the check {first!r}", mend="")
            yield outcome
            if outcome.verdict is Verdict.FAILED and not trial.is_usable:
                break  # nothing else can be checked


def _wanted(checks: str | Iterable[str] | None) -> list[str]:
    asked = list(CHECKS) if checks is None else [checks] if isinstance(checks, str) else list(checks)
    for name in asked:
        if name not in CHECKS:
            raise ConfigurationError(f"There is no check {name!r}.{suggest(name, CHECKS)} Known: {', '.join(CHECKS)}")
    return asked


def _outcome(name: str, one: Check, trial: Trial) -> Outcome:
    began = time.perf_counter()
    verdict, message, mend = Verdict.PASSED, "", ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            one.run(trial)
    except NotApplicable as reason:
        verdict, message = Verdict.SKIPPED, str(reason)
    except Failure as failure:
        verdict, message, mend = Verdict.FAILED, str(failure), failure.mend or one.mend
    except LlmtkError as error:  # says itself what to do
        verdict, message = Verdict.FAILED, str(error)
    except (Exception, SystemExit) as error:
        verdict, message, mend = Verdict.FAILED, f"it crashes: {located(error)}", CRASHED
    return Outcome(name, one.title, verdict, time.perf_counter() - began, message, mend)
