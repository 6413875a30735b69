"""The errors that llmtk raises for what a user can mend.

Each message says what is wrong, where, and what to do. The CLI prints the message alone (``--debug`` adds the
traceback) and exits with ``exit_code``: 2 for bad input, found before anything ran, and 1 for a failure while running.
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class LlmtkError(Exception):
    """Any error that llmtk raises on purpose."""

    exit_code = 1


class ConfigurationError(LlmtkError):
    """A key, a value or a combination of them that cannot be run."""

    exit_code = 2


class DatasetError(LlmtkError):
    """Data that is missing, damaged or of the wrong shape."""

    exit_code = 2


class NothingLeft(DatasetError):
    """Rows none of which is left, once those that do not fit are left out."""


class ModelLoadError(LlmtkError):
    """A model, tokenizer or adapter that cannot be loaded or built."""

    exit_code = 2


class PluginError(LlmtkError):
    """A stage or plugin that is unknown, broken, incompatible, or breaks the contract."""

    exit_code = 2


class CheckpointError(LlmtkError):
    """A checkpoint that cannot be written, found or trusted."""


class TrainingError(LlmtkError):
    """A failure while training: a loss that stays non-finite, a stage that answers nonsense."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest known name, or an empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


def located(error: BaseException) -> str:
    """Return an unexpected error and its line: the last outside of llmtk, Python and what is installed, if any is."""
    import sysconfig  # here, since every command imports this module first
    import traceback

    frames = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith("<frozen")]
    known = (str(Path(__file__).parent), sysconfig.get_path("stdlib"))
    own = [one for one in frames if not one.filename.startswith(known) and "site-packages" not in one.filename]
    place = [f" ({Path(one.filename).name}:{one.lineno}, in {one.name})" for one in own or frames]
    tells_itself = isinstance(error, SyntaxError)  # its own words have the line
    return f"{type(error).__name__}: {error}{'' if tells_itself or not place else place[-1]}"
