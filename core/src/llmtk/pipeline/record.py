"""What a pipeline keeps of itself between calls: pipeline.json, and a lock while it runs."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from llmtk.errors import ConfigurationError
from llmtk.folder import LOCK, write_json
from llmtk.pipeline.inputs import Hashes, Inputs

RECORD = "pipeline.json"
PATIENCE = 2.0
"""Seconds in which a step that was left behind takes the lock. A run that is no step of ours never does."""


@dataclass
class Made:
    """What is known of a step that was begun."""

    inputs: Inputs
    output: Mapping[str, str] | None = None
    """The files of its model, with their SHA-256, when it had finished."""
    seconds: float = 0.0
    """How long it ran, but for what was killed together with the pipeline."""


@dataclass
class Record:
    """The steps that were begun, by name, and the hashes of files."""

    folder: Path
    """The pipeline's."""
    steps: dict[str, Made] = field(default_factory=dict)
    hashes: Hashes = field(default_factory=lambda: Hashes({}))

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a pipeline's record, or begin one. ConfigurationError for one that is damaged."""
        file = folder / RECORD
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            steps = {
                name: Made(**{**made, "inputs": Inputs(**made["inputs"])}) for name, made in stored["steps"].items()
            }
            return cls(folder, steps, Hashes(stored["hashes"]))
        except FileNotFoundError:
            return cls(folder)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError(f"{file} is damaged: {error}. Give another output_dir, or remove the file and the "
                                     "steps beside it") from None  # fmt: skip

    def write(self) -> None:
        """Write the record, whole or not at all."""
        write_json(self.folder / RECORD, {"steps": {name: asdict(made) for name, made in self.steps.items()},
                               "hashes": self.hashes.known})  # fmt: skip


@contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the folder of a pipeline, or of other runs that are steps of one, by a lock that ends with the process.

    ConfigurationError where another process holds it. Steps that a killed one left behind are waited for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    except OSError as error:
        raise ConfigurationError(f"output_dir {folder} cannot be written to: {error.strerror}") from error
    with lock:
        _take(lock, folder, say)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _take(lock: IO[Any], folder: Path, say: Callable[[str], None]) -> None:
    for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        if kind == fcntl.LOCK_SH or _is_asked_for(lock, folder):  # by steps alone: llmtk.pipeline.step
            say(f"A run below {folder} was left behind by a process that was killed, and is ending: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        return
    lock.seek(0)
    owner = lock.read().strip() or "unknown"
    raise ConfigurationError(f"output_dir {folder} is in use by process {owner}; wait for it, or end it")


def _is_asked_for(lock: IO[Any], folder: Path) -> bool:
    """Whether a step that still runs takes the lock that we hold, when we let it.

    A pipeline that is begun at once may be faster than the step that waits to hear of the end of the one before.
    """
    from llmtk.reporting.stored import is_locked

    end = time.monotonic() + PATIENCE
    while any(map(is_locked, folder.glob(f"*/{LOCK}"))) and time.monotonic() < end:
        fcntl.flock(lock, fcntl.LOCK_SH)
        time.sleep(0.05)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
