"""A run's log: all that it said, what the libraries under it logged, and why it failed, with times, in `run.log`."""

from __future__ import annotations

import logging
import sys
from logging.handlers import MemoryHandler
from typing import TYPE_CHECKING

from llmtk.config.secrets import concealed
from llmtk.errors import LlmtkError

if TYPE_CHECKING:
    from pathlib import Path

FILE = "run.log"
LOGGER = logging.getLogger("llmtk")
LIBRARIES = ("accelerate", "datasets", "peft", "transformers")


class RunLog:
    """Takes what is logged from now on, keeps it until the run has a folder, and writes it there until it is closed.

    `level` is the lowest level of the libraries' messages, or `passive` for what they have.
    """

    def __init__(self, level: str) -> None:
        self._waiting = MemoryHandler(sys.maxsize, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
        self._handler: logging.Handler = self._waiting
        self._loggers = [LOGGER, *map(logging.getLogger, LIBRARIES)]
        self._levels = [logger.level for logger in self._loggers]
        LOGGER.setLevel(logging.INFO)
        for logger in self._loggers:
            logger.addHandler(self._handler)
            if logger is not LOGGER and level != "passive":
                logger.setLevel(level.upper())

    @property
    def is_open(self) -> bool:
        """Whether the run has its folder: before, it was refused."""
        return self._handler is not self._waiting

    def open(self, folder: Path) -> None:
        """Write what was logged so far, and whatever follows, behind what the folder's log has."""
        file = _File(folder / FILE, encoding="utf-8")
        file.setFormatter(_Discreet("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._waiting.setTarget(file)
        self._waiting.flush()
        for logger in self._loggers:
            logger.addHandler(file)
            logger.removeHandler(self._waiting)
        self._handler = file

    def failed(self, error: BaseException) -> None:
        """Log why the run ends: for what a user can mend the message, else the traceback."""
        known = isinstance(error, LlmtkError)
        LOGGER.error("%s: %s", type(error).__name__, error, exc_info=None if known else error)

    def close(self) -> None:
        """Take nothing any more, and leave the loggers as they were."""
        for logger, level in zip(self._loggers, self._levels, strict=True):
            logger.removeHandler(self._handler)
            logger.setLevel(level)
        self._handler.close()


class _File(logging.FileHandler):
    """Passes over a line that cannot be written: on a full disk, what the run must write is what says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Print no traceback, as logging would."""


class _Discreet(logging.Formatter):
    """Puts names in place of the environment's secrets, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return concealed(super().format(record))
