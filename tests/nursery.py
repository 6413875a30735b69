"""Starts runs that tests kill. Importing everything takes seconds, so one process imports it and forks for each run.

    python nursery.py

It reads a task as a line of JSON from stdin, {"log": FILE, "run": {...} or "words": [...], "die_at": N or null,
"pause_at": STEP or null, "die_in": [MOMENT, N] or null, "signal_in": [MOMENT, N, SIGNAL] or null}, answers `process`
with the child's id and, when the child is gone, `status` with what `waitpid` gave. The child makes `llmtk.Run(**run)`
and trains, or runs the command `llmtk WORDS`. With `die_at` it kills itself, as `kill -9` does, right before its N-th
operation on a file below the run's folder: an opening, making, renaming, cutting or removing; of an opening to write,
half of the times when the file is already emptied. Its log ends with their number. With `die_in` it does so when it
comes to a moment of `MOMENTS` for the N-th time; with `signal_in` it sends itself another signal then.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from typing import Any

import torch
from llmtk_stage_sft import SupervisedFineTuning

from llmtk import Mean, Round, Run

# What a run imports on its way. No tensor is computed before the fork: threads do not survive one.
IMPORTED = (
    "datasets",
    "llmtk.cli.commands",
    "llmtk.cli.run",
    "llmtk.data",
    "llmtk.models.adapters",
    "llmtk.models.checks",
    "llmtk.models.saving",
    "llmtk.reporting.card",
    "llmtk.reporting.plot",
    "llmtk.run",
    "llmtk_rl.stage",
    "llmtk_stage_grpo",
    "llmtk_stage_pt",
    "matplotlib.figure",
    "peft",
    "transformers.models.llama.modeling_llama",
)
OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


class ThreeWindows(SupervisedFineTuning):
    """Each round goes over its rows three times, in windows that differ; its metric is drawn from a generator."""

    name = "three-windows"

    @property
    def windows_per_round(self):
        return 3

    def prepare_batch(self, run, rows):
        noise = torch.rand(1, generator=run.generator("passes")).item()
        window = super().prepare_batch(run, rows).windows[0]
        backwards = window.select(range(len(window) - 1, -1, -1))
        return Round([window, backwards, window], {"noise": Mean(noise, 1.0)})


class Pausing(SupervisedFineTuning):
    """Stays a while in one step, so that a test can do something in its midst."""

    name = "pausing"

    def compute_loss(self, run, batch):
        if str(run.step) == os.environ.get("PAUSE_AT"):
            print("in the midst of a step", flush=True)
            time.sleep(10)
        return super().compute_loss(run, batch)


STAGES: dict[str, Any] = {"three-windows": ThreeWindows, "pausing": Pausing}


MOMENTS = {
    "reading": ("llmtk.data", "read_splits"),
    "loading": ("llmtk.training.setup", "_load_models"),
    "opening": ("llmtk.folder", "RunFolder._write_facts"),
    "generation": ("llmtk.generation.sampling", "Stopping.ends"),
    "rewards": ("llmtk_rl.rewards", "Rewards.__call__"),
    "scoring": ("llmtk.run", "Run.score_window"),
    "windows": ("llmtk.training.loop", "_finish_step"),
}
"""What happens once, while a run is set up: rows are read, a model is loaded, the folder is locked but holds nothing.
And what happens in the midst of a round, more than once: a token is written, completions are rewarded, a window is
scored, a step is over but not yet saved."""


def signal_in(moment: str, at: int, number: int) -> None:
    """Have a signal sent to this process when it comes to a moment for the N-th time."""
    module, name = MOMENTS[moment]
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    function, count = getattr(owner, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


class Operations:
    """Counts operations on files below a folder, and kills the process right before one of them."""

    def __init__(self, folder: str, die_at: int | None) -> None:
        self.folder = os.path.abspath(folder)
        self.die_at = die_at
        self.count = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in OPERATIONS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if not os.path.abspath(os.fsdecode(arguments[0])).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.die_at:
            if event == "open" and self.count % 2 and str(arguments[1]).startswith("w"):
                os.truncate(arguments[0], 0) if os.path.exists(arguments[0]) else None
            os.kill(os.getpid(), signal.SIGKILL)


def work(task: dict[str, Any]) -> int:
    """Do a task in this process, and return its exit code."""
    if task.get("pause_at") is not None:
        os.environ["PAUSE_AT"] = str(task["pause_at"])
    if task.get("die_in"):
        signal_in(*task["die_in"], signal.SIGKILL)
    if task.get("signal_in"):
        signal_in(*task["signal_in"])
    if task.get("words"):
        from llmtk.cli import call

        return call(task["words"])
    settings = dict(task["run"])
    operations = Operations(settings["output_dir"], task.get("die_at"))
    sys.addaudithook(operations)
    stage = settings.pop("stage")
    Run(STAGES.get(stage, stage), **settings).train()
    print(f"operations: {operations.count}", flush=True)
    return 0


def child(task: dict[str, Any]) -> None:
    """Do a task, and leave the process."""
    log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        code = work(task)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    print("ready", flush=True)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            child(json.loads(line))
        print("process", process, flush=True)
        print("status", os.waitpid(process, 0)[1], flush=True)


if __name__ == "__main__":
    main()
