"""`llmtk chat`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.asking import as_options, check_settings, sampling_of, sampling_options, template_option
from llmtk.errors import LlmtkError, suggest

if TYPE_CHECKING:
    from llmtk.inference.chat import Chat

COMMANDS = {
    "/reset": "forget what was said",
    "/system": "TEXT: forget what was said, and begin with this system prompt",
    "/save": "FILE: append the dialogue to a file, as a row that can be trained on",
    "/help": "this list",
    "/quit": "end; so does Ctrl-D",
}


@click.command("chat")
@click.argument("models", nargs=-1, required=True, metavar="RUN|MODEL")
@click.option("--compare", is_flag=True, help="Ask two models, and show their answers side by side.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@template_option
@sampling_options(max_new_tokens=512)
def command(models: tuple[str, ...], compare: bool, system: str | None, template: str | None, **settings: Any) -> None:
    """Talk with the model in a folder: a finished run's, or any that transformers loads.

    Answers are shown as they are written; Ctrl-C ends one. /help lists what else can be said. With --compare, two
    models answer each question, and each keeps to its own history.
    """
    if len(models) != 1 + compare:
        raise click.UsageError("Give two models with --compare, and one without it.")
    check_settings(settings)
    from llmtk.inference.chat import Chat
    from llmtk.inference.model import LanguageModel, check

    for name in models:
        check(name)
    with as_options():
        loaded = [LanguageModel(name, template=template) for name in models]
        chats = [Chat(model, sampling_of(model, settings), system) for model in loaded]
    click.echo(f"{' and '.join(models)} on {loaded[0].device}. /help lists commands, Ctrl-D ends.", err=True)
    while (line := _read()) is not None:
        try:
            if line.startswith("/"):
                if not _obey(chats, line):
                    return
            elif line:
                _answer(chats, line)
        except KeyboardInterrupt:  # before the answer began, or in its last moment
            click.echo("interrupted", err=True)
        except LlmtkError as error:
            click.echo(f"error: {error}", err=True)


def _read() -> str | None:
    """Return the next line, or None at the end. On a terminal Ctrl-C drops the line: it may have come too late."""
    prompt = ""
    if sys.stdin.isatty():
        prompt = "> "
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then knows arrow keys and history)
    try:
        return input(prompt).strip()
    except EOFError:
        return None
    except KeyboardInterrupt:
        if not prompt:
            raise
        click.echo("\nCtrl-D ends.", err=True)
        return ""
    except UnicodeDecodeError:
        click.echo("error: that was no UTF-8", err=True)
        return ""


def _obey(chats: Sequence[Chat], line: str) -> bool:
    """Do what a line that begins with a slash says; return whether to go on."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/quit":
        return False
    if word == "/help":
        click.echo("\n".join(f"{name:9}{text}" for name, text in COMMANDS.items()))
    elif word in ("/reset", "/system"):
        for chat in chats:
            chat.reset(rest or None if word == "/system" else chat.system)
    elif word == "/save" and rest:
        from llmtk.inference.chat import names_of

        for name, chat in zip(names_of([chat.model for chat in chats]), chats, strict=True):
            chat.save(rest, **({"model": name} if len(chats) > 1 else {}))
        click.echo(f"saved: {rest}", err=True)
    elif word == "/save":
        click.echo("/save needs a file: /save dialogues.jsonl", err=True)
    else:
        click.echo(f"{word} is no command.{suggest(word, COMMANDS)} /help lists them.", err=True)
    return True


def _answer(chats: Sequence[Chat], text: str) -> None:
    """Ask, and show the answers: one as it is written, two side by side."""
    from llmtk.inference.chat import readable

    if len(chats) > 1:
        _compare(chats, text)
        return
    chats[0].ask(text, lambda piece: click.echo(readable(piece), nl=False))
    click.echo()


def _compare(chats: Sequence[Chat], text: str) -> None:
    from llmtk.inference.chat import names_of, readable

    names = names_of([chat.model for chat in chats])
    if not sys.stdout.isatty():
        for name, chat in zip(names, chats, strict=True):
            click.echo(f"{name}: {readable(chat.ask(text))}")
        return
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    said = [""] * len(chats)

    def table() -> Table:
        found = Table(expand=True)
        for name in names:
            found.add_column(Text(name), ratio=1)
        found.add_row(*map(Text, said))
        return found

    with Live(table(), vertical_overflow="visible") as live:
        for index, chat in enumerate(chats):

            def hear(piece: str, index: int = index) -> None:
                said[index] += readable(piece)
                live.update(table())

            chat.ask(text, hear)
