"""How what transformers, safetensors, peft and the hub say reaches the user: errors as llmtk's, no progress bars."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmtk.errors import LlmtkError, ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator


_MENDS = {
    "trust_remote_code=True": "It comes with Python code that would run here with your rights. Read that code; if you "
    "trust it, set model.trust_remote_code: true",
    "use_safetensors=True": "Its weights are pickled, and a pickle can run any code when it is opened. Load them down "
    "(hf download NAME --local-dir FOLDER), and convert them: llmtk convert-weights FOLDER",
}
"""What libraries say to do, in words of their own interface, and what to do instead."""
_NOT_FOR_USERS = (
    ".*fan_in_fan_out",
    ".*is_gradient_checkpointing",
    ".*save_embedding_layers",
    ".*tied_target_modules",
    ".*ensure_weight_tying",
    ".*no longer tied after merging",
)


@contextmanager
def loading(what: str, mend: str = "") -> Iterator[None]:
    """Raise ``ModelLoadError("WHAT cannot be loaded: … MEND")`` for any error of the libraries inside the block."""
    try:
        yield
    except LlmtkError:
        raise
    except Exception as error:  # the libraries raise everything from OSError to AttributeError for a bad folder
        mend = next((ours for theirs, ours in _MENDS.items() if theirs in str(error)), mend)
        raise ModelLoadError(f"{what} cannot be loaded: {summary(error)}{mend and ' ' + mend}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Show no progress bars inside the block, nor the warnings of libraries about what they mend themselves."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            for message in _NOT_FOR_USERS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def without_report() -> Iterator[None]:
    """Leave out transformers' table of missing and unexpected weights inside the block, for who looks at them."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def summary(error: Exception, limit: int = 400) -> str:
    """Return the error's message on one line of at most ``limit`` characters, or its type where it has no message."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[: limit - 1] + "…"
