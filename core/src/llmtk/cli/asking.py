"""What `llmtk predict` and `llmtk chat` share: how to sample, and the model that is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from llmtk.generation import Sampling
    from llmtk.inference import LanguageModel

template_option = click.option(
    "--template", metavar="FILE|chatml", help="Chat template in place of the tokenizer's own."
)


def sampling_options(max_new_tokens: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what gives a command an option for each setting of a single answer, by its name."""
    options = [
        click.option(
            "--max-new-tokens",
            type=int,
            default=max_new_tokens,
            show_default=True,
            help="Tokens of an answer, at most.",
        ),
        click.option(
            "--temperature",
            type=float,
            default=1.0,
            show_default=True,
            help="Divides the logits. 0: the likeliest token.",
        ),
        click.option("--top-k", type=int, default=0, help="Keep the K likeliest tokens. 0: all."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Keep the fewest tokens that have this share."
        ),
        click.option(
            "--min-p", type=float, default=0.0, help="Keep tokens with this share of the likeliest one's probability."
        ),
        click.option(
            "--repetition-penalty", type=float, default=1.0, show_default=True, help="Over 1: says less again."
        ),
        click.option("--stop", "stop_strings", multiple=True, metavar="TEXT", help="Ends an answer. May be repeated."),
        click.option(
            "--stop-token",
            "stop_tokens",
            multiple=True,
            metavar="TOKEN",
            help="Ends an answer, in place of the model's own: a token as the vocabulary spells it. May be repeated.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Decides what is drawn."),
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def check_settings(settings: dict[str, Any]) -> None:
    """Refuse settings that cannot be, before a model is loaded."""
    from llmtk.generation import Sampling

    try:
        Sampling(**{**settings, "stop_tokens": ()})
    except ValueError as error:
        raise ConfigurationError(f"sampling settings: {error}") from error


def sampling_of(model: LanguageModel, settings: dict[str, Any]) -> Sampling:
    """Return how to sample from a model, by a command's options. ConfigurationError for a token that it lacks."""
    given = dict(settings)
    tokens = given.pop("stop_tokens")
    if tokens:
        given["stop_tokens"] = tuple(_token(model, token) for token in tokens)
    return model.sampling(**given)


@contextmanager
def as_options() -> Iterator[None]:
    """Call the chat template by the name of its option in errors inside the block."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(str(error).replace("data.template", "--template")) from error


def _token(model: LanguageModel, token: str) -> int:
    found: int | None = model.tokenizer.get_vocab().get(token)
    if found is not None:
        return found
    raise ConfigurationError(
        f"--stop-token {token}: {model.name} has no such token. Text that is several tokens is given with --stop"
    )
