"""What the checks have in common: how they are named, run and told."""

from __future__ import annotations

import contextlib
import io
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, LlmtkError, suggest

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
    """A check: its title says what holds of a stage that passes it, and `mend` how to get there."""

    title: str
    mend: str
    run: Callable[[Trial], None]


class Failure(Exception):
    """A stage does not do what the check is about. The message says what it does."""


class NotApplicable(Exception):
    """The check has nothing to look at in this stage. The message says why."""


class ConformanceError(AssertionError):
    """A stage failed at least one check."""


CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which they run."""


def check(name: str, title: str, mend: str) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register the decorated function as a check. It raises `Failure` or `NotApplicable`, or returns."""

    def register(run: Callable[[Trial], None]) -> Callable[[Trial], None]:
        CHECKS[name] = Check(title, mend, run)
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
        told = [f"{one.check}: {one.title}\n  {one.message}\n  Mend: {one.mend}" for one in failed]
        raise ConformanceError(f"{len(failed)} of {len(found)} checks failed\n\n" + "\n\n".join(told))
    return found


def outcomes(
    stage: str | type[Stage],
    checks: str | Iterable[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[Outcome]:
    """Run checks one after the other, as `check_stage` does, and yield what each found."""
    from llmtk.testing.trial import Trial

    wanted = _wanted(checks)
    with tempfile.TemporaryDirectory(prefix="llmtk-check-") as folder:
        trial = Trial(stage, Path(folder), options=options, rows=rows)
        for name in wanted:
            yield _outcome(name, CHECKS[name], trial)


def _wanted(checks: str | Iterable[str] | None) -> list[str]:
    asked = list(CHECKS) if checks is None else [checks] if isinstance(checks, str) else list(checks)
    for name in asked:
        if name not in CHECKS:
            raise ConfigurationError(f"There is no check {name!r}.{suggest(name, CHECKS)} Known: {', '.join(CHECKS)}")
    return asked


def _outcome(name: str, one: Check, trial: Trial) -> Outcome:
    began = time.perf_counter()
    verdict, message = Verdict.PASSED, ""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            one.run(trial)
    except NotApplicable as reason:
        verdict, message = Verdict.SKIPPED, str(reason)
    except (Failure, LlmtkError) as failure:
        verdict, message = Verdict.FAILED, str(failure)
    except Exception as error:
        verdict, message = Verdict.FAILED, _told(error)
    mend = one.mend if verdict is Verdict.FAILED else ""
    return Outcome(name, one.title, verdict, time.perf_counter() - began, message, mend)


def _told(error: Exception) -> str:
    """Say what an error was and where it came from: the last place outside of the core, if there is one."""
    core = str(Path(__file__).parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(core) and "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    return f"{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno}, in {frame.name})"
