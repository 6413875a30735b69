"""A pipeline: its steps checked, decided upon, and run one after the other, each in a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.config.reading import merge, put, to_yaml
from llmtk.errors import ConfigurationError, LlmtkError, TrainingError, suggest
from llmtk.folder import CONFIG, LOCK, RESULTS, flat, replace_file, settings_of
from llmtk.pipeline.deciding import AGAIN, RESUME, RUN, SKIP, Decision, check, decide, output_of
from llmtk.pipeline.inputs import inputs_of
from llmtk.pipeline.reading import OLD, Step, read_steps
from llmtk.pipeline.record import Made, Record, held
from llmtk.training.signals import first_signal

if TYPE_CHECKING:
    from llmtk.run import Run


def alone() -> list[str]:
    """Return the words of a command that starts a module in one process; its name and arguments follow."""
    return [sys.executable, "-P", "-m"]


class Pipeline:
    """Several runs in a row.

        Pipeline.read("story.yaml", ["steps.sft.train.max_steps=100"]).run()

    `folder` is where all is written, each step in a folder of its name.
    """

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        self.folder = folder
        self.steps = list(steps)
        self._record = Record(folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._signal: int | None = None

    @classmethod
    def read(cls, file: str | Path, overrides: Sequence[str] = ()) -> Pipeline:
        """Read a pipeline's file. `overrides` are `key=value`. ConfigurationError lists what is wrong with it."""
        return cls(*read_steps(file, overrides))

    def plan(self, only: Collection[str] = (), rerun: Collection[str] = ()) -> list[Decision]:
        """Check all steps, and return what is to be done with each. Nothing is run, and nothing written.

        `only` leaves out all steps but these, `rerun` runs steps again although nothing has changed. Raises one error
        that lists what is wrong with which step.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigurationError("a pipeline starts the processes of its steps itself: llmtk pipeline -n N FILE")
        chosen = self._chosen(only, rerun)
        self._record = Record.read(self.folder)
        decisions: list[Decision] = []
        problems: list[LlmtkError] = []
        for step in chosen:
            undone = {decision.step.name for decision in decisions if decision.action != SKIP}
            try:
                decisions.append(self._planned(step, undone, step.name in rerun))
            except LlmtkError as error:
                problems.append(type(error)(f"step {step.name}: {error}"))
                decisions.append(Decision(step, RUN, ""))
        if problems:
            raise type(problems[0])("\n".join(map(str, problems)))
        return decisions

    def run(
        self,
        only: Collection[str] = (),
        rerun: Collection[str] = (),
        *,
        command: Callable[[], Sequence[str]] = alone,
        say: Callable[[str], None] = print,
        show: Callable[[list[Decision]], None] = lambda _: None,
    ) -> list[Decision]:
        """Run what is to be run, and return what was done with each step.

        Each step runs in a process of its own. `command` gives the words that start a module in one, for each step
        anew; `show` is given the plan before the first step begins. Raises as `plan` does, before anything is run;
        TrainingError where a step fails; Interrupted where a signal has stopped one, to go on at the next call.
        """
        done = []
        self._signal = None
        with ExitStack() as stack:
            stack.enter_context(first_signal(self._ask_to_stop))
            if is_there := self.folder.exists():
                stack.enter_context(held(self.folder, say))
            show(plan := self.plan(only, rerun))
            if not is_there:  # and bad input leaves none behind
                stack.enter_context(held(self.folder, say))
            for number, step in enumerate((decision.step for decision in plan), start=1):
                self._stop_if_asked(step)
                run = self._made(step)
                decision = decide(step, run, self._record, rerun=step.name in rerun)
                say(f"[{number}/{len(plan)}] {step.name}: {decision.action} ({decision.why})")
                if decision.action == SKIP:
                    self._record.steps[step.name].output = output_of(step, self._record)
                else:
                    self._perform(decision, run, [*command(), "llmtk.pipeline.step", str(self.folder / LOCK)], say)
                done.append(decision)
            self._record.write()
        return done

    def outcomes(self) -> list[dict[str, Any]]:
        """Return what each step has come to so far: status, steps, seconds, last loss, and the metric that decides."""
        return [self._outcome(step) for step in self.steps]

    def _outcome(self, step: Step) -> dict[str, Any]:
        from llmtk.reporting.stored import StoredRun

        made = self._record.steps.get(step.name)
        about = {"step": step.name, "stage": step.stage, "seconds": made.seconds if made else None}
        if not (step.folder / CONFIG).is_file():
            return about | {"status": "not begun", **dict.fromkeys(("steps", "loss", "metric", "value"))}
        run = StoredRun.read(step.folder)
        metric = f"eval_{str((run.config.get('train') or {}).get('metric_for_best_model')).removeprefix('eval_')}"
        return about | {
            "status": run.status,
            "steps": run.steps,
            "loss": run.last("loss"),
            "metric": metric,
            "value": run.last(metric),
        }

    # Deciding

    def _chosen(self, only: Collection[str], rerun: Collection[str]) -> list[Step]:
        names = [step.name for step in self.steps]
        for name in (*only, *rerun):
            if name not in names:
                raise ConfigurationError(
                    f"there is no step {name!r}; they are {', '.join(names)}.{suggest(name, names)}"
                )
        if only and (outside := sorted(set(rerun) - set(only))):
            raise ConfigurationError(
                f"{outside[0]} cannot be run again where it is left out; name it in both, or in none"
            )
        chosen = [step for step in self.steps if not only or step.name in only]
        for step in chosen:
            for other in step.takes.values():
                if only and other not in only and not (self.folder / other / RESULTS).is_file():
                    raise ConfigurationError(f"{step.name} takes from {other}, which is not finished; run that one too")
        return chosen

    def _planned(self, step: Step, undone: Collection[str], rerun: bool) -> Decision:
        """Check a step as far as it can be, and say what will be done with it. `undone` are the steps yet to be run."""
        run = self._made(step)
        waiting = {key: name for key, name in step.takes.items() if name in undone}
        decision = decide(step, run, self._record, rerun=rerun, waiting=dict.fromkeys(waiting.values()))
        if decision.action != SKIP:
            check(run, waiting)
        return decision

    def _made(self, step: Step) -> Run:
        from llmtk.run import Run

        return Run.from_layers(step.stage, merge(step.settings, {"output_dir": str(step.folder)}))

    # Doing

    def _perform(self, decision: Decision, run: Run, command: Sequence[str], say: Callable[[str], None]) -> None:
        step, steps = decision.step, self._record.steps
        if decision.action == AGAIN:
            say(f"The old run is kept in {self._set_aside(step)}")
        inputs = inputs_of(run, self.folder, self._record.hashes)
        made = steps[step.name] = Made(inputs, seconds=steps[step.name].seconds if decision.action == RESUME else 0.0)
        self._record.write()
        resume = ["--resume", "auto"] if decision.action == RESUME else []
        began = time.monotonic()
        code = self._wait([*command, str(self._write_settings(decision, run)), *resume])
        made.seconds += time.monotonic() - began
        self._record.write()
        self._check_end(step, code)
        made.output = output_of(step, self._record)
        self._record.write()

    def _set_aside(self, step: Step) -> Path:
        """Move a step's folder to where old ones are kept, none over another."""
        old = self.folder / OLD
        old.mkdir(exist_ok=True)
        number = 1
        while (aside := old / f"{step.name}-{number}").exists():
            number += 1
        return step.folder.rename(aside)

    def _write_settings(self, decision: Decision, run: Run) -> Path:
        """Write what `llmtk run` is to read, beside the step's folder.

        A resumed run has its former settings beneath, so those that have changed since are spelt out.
        """
        step, now = decision.step, flat(settings_of(run))
        changed: dict[str, Any] = {}
        for key in decision.changed:
            if key in now:
                put(changed, key.split("."), now[key], key)
        settings = merge({"stage": step.stage}, step.settings, changed, {"output_dir": str(step.folder)})
        file = self.folder / f"{step.name}.yaml"
        replace_file(file, to_yaml(settings))
        return file

    def _wait(self, words: Sequence[str]) -> int:
        # In a session of its own: what a terminal sends to all of the pipeline's processes is given to it once, by us.
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            if self._signal is not None:
                self._process.send_signal(self._signal)
            return self._process.wait()
        finally:
            self._process = None

    def _ask_to_stop(self, number: int) -> None:
        self._signal = number
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _stop_if_asked(self, step: Step) -> None:
        from llmtk.run import Interrupted

        if self._signal is not None:
            name = signal.Signals(self._signal).name
            raise Interrupted(f"{name} stopped the pipeline at step {step.name}. Go on with the same command")

    def _check_end(self, step: Step, code: int) -> None:
        if code == 0:
            return
        self._stop_if_asked(step)
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        raise TrainingError(
            f"step {step.name} ended with {how}. Mend what is wrong with it, and give the same command: what is "
            "finished is not run again"
        )
