"""The run's JSON-lines files. They only grow; a resumed run cuts them back to where its checkpoint left them.

`metrics.jsonl` holds what is deterministic, `timings.jsonl` what is not, `samples.jsonl` generated text.
"""

from __future__ import annotations

import json
import math
import os
from typing import TYPE_CHECKING, Any

from llmtk.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llmtk.folder import RunFolder

FILES = ("metrics", "timings", "samples")


class Records:
    """Appends lines to a run's files."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def write(self, file: str, line: Mapping[str, Any]) -> None:
        """Append a line. Numbers that JSON does not know (NaN, infinity) become null.

        CheckpointError where it cannot be written.
        """
        path = self._path(file)
        try:
            with path.open("a") as stream:
                stream.write(json.dumps(_jsonable(line), allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error

    def read(self, file: str) -> list[dict[str, Any]]:
        """Return all lines. CheckpointError where one is damaged."""
        path = self._path(file)
        lines = path.read_bytes().splitlines() if path.exists() else []
        return [_line(f"{path}:{number}", line) for number, line in enumerate(lines, start=1)]

    def offsets(self) -> dict[str, int]:
        """Make what is written durable, and return the size of each file."""
        sizes = {}
        for file in FILES:
            path = self._path(file)
            sizes[file] = path.stat().st_size if path.exists() else 0
            if sizes[file]:
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        return sizes

    def clear(self) -> None:
        """Remove the files: what a run left that died before its first checkpoint."""
        for file in FILES:
            self._path(file).unlink(missing_ok=True)

    def cut(self, offsets: Mapping[str, int]) -> None:
        """Cut the files back to these sizes. CheckpointError where one is shorter, or damaged."""
        for file, size in offsets.items():
            path = self._path(file)
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                raise CheckpointError(
                    f"{path} has {found} bytes, the checkpoint knew {size}: it was changed or replaced"
                )
            if found > size:
                os.truncate(path, size)
            self.read(file)

    def _path(self, file: str) -> Path:
        return self._folder.path / f"{file}.jsonl"


def _line(place: str, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise CheckpointError(f"{place} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} is damaged: it holds no JSON object")
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
