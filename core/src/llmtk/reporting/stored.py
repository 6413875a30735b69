"""Runs as their folders tell them: found and read without their model, while they train or after."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.config.reading import read_as_written
from llmtk.errors import ConfigurationError
from llmtk.folder import CONFIG, INFO, LOCK, RESULTS, RunFolder, flat

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FINISHED, RUNNING, UNFINISHED = "finished", "running", "unfinished"
_PLACE = ("step", "epoch")


@dataclass(frozen=True)
class StoredRun:
    """What a run's folder says of it."""

    path: Path
    config: Mapping[str, Any]
    """config.yaml, its `${VAR}` as they stand: a report tells no secret."""
    info: Mapping[str, Any]
    """run.json: versions, plugins, data."""
    results: Mapping[str, Any]
    """results.json; empty for a run that has not finished."""
    metrics: Sequence[Mapping[str, Any]]
    """The lines of metrics.jsonl, each with its step."""
    status: str
    """finished, running, or unfinished: stopped or killed before its end."""

    @classmethod
    def read(cls, path: str | Path) -> StoredRun:
        """Read a run's folder. ConfigurationError where there is none, or a file of it is damaged."""
        folder = Path(path)
        if not folder.is_dir():
            raise ConfigurationError(f"{path}: there is no such run. `llmtk runs list` lists those there are")
        if not (folder / CONFIG).is_file():
            raise ConfigurationError(f"{path} holds no run: there is no {CONFIG} in it")
        results = _json_of(folder / RESULTS)
        return cls(
            path=folder,
            config=read_as_written(folder / CONFIG),
            info=RunFolder(folder).info(),
            results=results,
            metrics=read_lines(folder / "metrics.jsonl"),
            status=RUNNING if is_locked(folder / LOCK) else FINISHED if results else UNFINISHED,
        )

    @property
    def stage(self) -> str:
        """The stage's name."""
        return str(self.config.get("stage", ""))

    @property
    def model(self) -> str:
        """What the model is called."""
        model = self.config.get("model") or {}
        return str(
            model.get("name_or_path") or f"{(model.get('from_config') or {}).get('model_type', '?')} from scratch"
        )

    @property
    def steps(self) -> int:
        """Optimizer steps, as far as they are known: those of the last line of metrics, or of the results."""
        logged = [line["step"] for line in self.metrics if "step" in line]
        return int(max([*logged, self.results.get("steps") or 0]))

    @property
    def metric_names(self) -> list[str]:
        """What was measured over the steps, in the order of appearance."""
        return list(dict.fromkeys(name for line in self.metrics for name in line if name not in _PLACE))

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """Return a metric's (step, value) wherever it was measured and is finite."""
        return [(line["step"], float(line[metric])) for line in self.metrics if line.get(metric) is not None]

    def last(self, metric: str) -> float | None:
        """Return a metric's last value, or None where it was never measured."""
        points = self.curve(metric)
        return points[-1][1] if points else None

    @property
    def facts(self) -> dict[str, Any]:
        """What the run consisted of, flat: data, plugins, precision, versions and devices."""
        plugins = dict(self.info.get("plugins") or [])
        parts = {name: self.info.get(name) for name in ("precision", "data", "environment")}
        return flat({**parts, "plugins": plugins})


def find_runs(folder: str | Path) -> list[Path]:
    """Return the folders of all runs below a folder, the newest last. ConfigurationError where there is no folder."""
    if not Path(folder).is_dir():
        raise ConfigurationError(f"{folder}: there is no such folder. Give the one that holds the runs")
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name != "checkpoints" and not name.startswith(".")]
        if CONFIG in files and INFO in files:
            found.append(Path(parent))
    return sorted(found, key=lambda path: ((path / INFO).stat().st_mtime, str(path)))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's file, or none. A last line that is still being written is left out.

    ConfigurationError where another one is damaged.
    """
    if not file.is_file():
        return []
    *lines, rest = file.read_text(encoding="utf-8", errors="replace").split("\n")
    try:
        found = [json.loads(line) for line in [*lines, *([rest] if rest.endswith("}") else [])]]
    except ValueError as error:
        raise ConfigurationError(f"{file} is damaged: {error}") from None
    if not all(isinstance(line, dict) for line in found):
        raise ConfigurationError(f"{file} is damaged: a line holds no JSON object")
    return found


def _json_of(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{file} is damaged: {error}") from None
    if not isinstance(found, dict):
        raise ConfigurationError(f"{file} is damaged: it holds no JSON object")
    return found


def is_locked(file: Path) -> bool:
    """Say whether a process holds the run's folder. The lock that this takes to find out is a shared, short one."""
    try:
        with file.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
