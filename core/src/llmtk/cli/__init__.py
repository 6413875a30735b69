"""The `llmtk` command. Each command stands in a file of its own, which is imported when the command is called.

Exit codes: 0, all went well; 1, a run failed or was stopped; 2, bad input, found before anything ran; 130, Ctrl-C
outside of training.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from llmtk.errors import LlmtkError, located

if TYPE_CHECKING:
    from collections.abc import Sequence

_LESS = (
    "Less is taken by a smaller train.per_device_train_batch_size with more train.gradient_accumulation_steps, a "
    "smaller data.max_length, train.gradient_checkpointing, an adapter (peft) or model.quantization. "
    "llmtk plan, with the words of llmtk run, estimates what a run takes."
)
_REPORT = (
    "This is a fault in llmtk or a plugin. Look at that line if it is yours, else please report it; run again with "
    "--debug for the traceback."
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command, and exit with its code."""
    sys.exit(call(sys.argv[1:] if arguments is None else arguments))


def call(arguments: Sequence[str]) -> int:
    """Run one command, say on stderr what went wrong, and return the exit code."""
    from llmtk.cli.commands import llmtk

    words, debug = _without_debug(arguments)
    try:
        color = False if os.environ.get("NO_COLOR") else None  # https://no-color.org; None: on a terminal
        code = llmtk.main(words, prog_name="llmtk", standalone_mode=False, color=color)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone: `llmtk schema sft | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _say(error)
    return code if isinstance(code, int) else 0


def _without_debug(arguments: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out, wherever it stands: before the command or after it."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    words = [word for word in arguments[:end] if word != "--debug"]
    return [*words, *arguments[end:]], len(words) < end


def _say(error: Exception) -> int:
    if isinstance(error, click.ClickException):
        error.show()
        if isinstance(error, click.NoSuchOption) and not error.possibilities:
            _say_how_settings_are_written(error)
        return error.exit_code
    if isinstance(error, LlmtkError):
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    if _is_want_of_memory(error):
        click.echo(f"error: not enough memory: {str(error).strip().splitlines()[0]}\n{_LESS}", err=True)
        return 1
    click.echo(f"error: {located(error)}\n{_REPORT}", err=True)
    return 1


def _say_how_settings_are_written(error: click.NoSuchOption) -> None:
    """Say for `--learning_rate 1e-4`, where settings are taken, how it is written."""
    if error.ctx is None or not any("KEY=VALUE" in (argument.metavar or "") for argument in error.ctx.command.params):
        return
    from llmtk.config.problems import meant
    from llmtk.config.run_config import RunConfig

    keys = meant(error.option_name.lstrip("-"), RunConfig) or ["KEY"]
    spelt = " or ".join(key.replace(": ", "=") if ": " in key else f"{key}=VALUE" for key in keys)
    click.echo(f"A setting is written without dashes: {spelt}", err=True)


def _is_want_of_memory(error: Exception) -> bool:
    """Tell torch's errors, on a device or in the host's memory, without importing torch."""
    return type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
