"""How the errors of transformers, safetensors, peft and the hub become errors of llmtk."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmtk.errors import LlmtkError, ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def loading(what: str, mend: str = "") -> Iterator[None]:
    """Raise ``ModelLoadError("WHAT cannot be loaded: … MEND")`` for any error of the libraries inside the block."""
    try:
        yield
    except LlmtkError:
        raise
    except Exception as error:  # the libraries raise everything from OSError to AttributeError for a bad folder
        raise ModelLoadError(f"{what} cannot be loaded: {summary(error)}{mend and ' ' + mend}") from error


def summary(error: Exception, limit: int = 400) -> str:
    """Return the error's message on one line of at most ``limit`` characters, or its type where it has no message."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
