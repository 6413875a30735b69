"""How fast a run goes and how much memory it takes: for people, and for timings.jsonl."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

GIB = 2**30


class Speed:
    """Measures between two lines of the log. Time spent in evaluating and saving is not counted."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.steps = 0
        self.tokens = 0
        self.rows = 0

    def add(self, seconds: float, tokens: int, rows: int) -> None:
        """Count a step."""
        self.seconds += seconds
        self.steps += 1
        self.tokens += tokens
        self.rows += rows

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all ranks."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def take(self) -> dict[str, Any]:
        """Return the figures since the last time, and begin anew."""
        seconds = self.seconds or float("inf")
        line: dict[str, Any] = {
            "time": time.time(),
            "seconds_per_step": self.seconds / max(self.steps, 1),
            "tokens_per_second": self.tokens / seconds,
            "samples_per_second": self.rows / seconds,
            "memory_gib": peak_memory_gib(),
        }
        if torch.cuda.is_available():
            line["gpu_memory_gib"] = torch.cuda.max_memory_allocated() / GIB
            line["gpu_utilisation"] = _gpu_utilisation()
        self.__init__()  # type: ignore[misc]
        return line


def peak_memory_gib() -> float:
    """Return the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB


def _gpu_utilisation() -> float | None:
    """Return the device's utilisation in percent; None without nvidia-ml-py, which torch asks."""
    try:
        return float(torch.cuda.utilization())
    except (ModuleNotFoundError, RuntimeError):
        return None
