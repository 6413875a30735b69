"""The user's cache: what takes long to compute, kept on disk under a hash of what it follows from.

A file under its name is whole, and the first of its name stays. Nothing is ever deleted: whoever wants the room back
deletes the folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def cache_folder(kind: str) -> Path:
    """Return where things of a kind are kept: in `$LLMTK_CACHE`, or in llmtk's folder in the user's cache."""
    own = os.environ.get("LLMTK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "llmtk").expanduser() / kind


def write_once(file: Path, write: Callable[[Path], None], *, is_good: Callable[[], bool]) -> None:
    """Let `write` make the file aside, then rename it, unless another process was first and made a good one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        write(aside)
        if not is_good():
            aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
