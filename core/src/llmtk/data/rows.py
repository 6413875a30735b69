"""What a row is, before any tokenizer has seen it, and which kind of row can become which other.

A new row type is one dataclass here (or anywhere that imports this module) and, where a conversion makes sense, one
function under :func:`conversion`. Nothing else in the package lists the types.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Message = dict[str, Any]


class Cell(str):
    """Text from a table, in which a number or a truth can only be spelt. Who wants one of those may read it so."""

    __slots__ = ()


class RowError(ValueError):
    """Why a row cannot be used, in a few words. Who catches it knows the row's place."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One example. ``place`` is where a person finds it: ``data.jsonl:12``, ``data.json: row 12`` or ``row 12``."""

    type: ClassVar[str]
    place: str = ""

    def check(self) -> None:
        """Raise :class:`RowError` if no stage could train on this row."""
        raise NotImplementedError

    def texts(self) -> list[str]:
        """Return the row's texts, for a tokenizer to be trained on."""
        raise NotImplementedError


_NUMBER = re.compile(r"(: row |:)\d+$")


def source_of(place: str) -> str:
    """Return the source that a row's place names: ``data.jsonl`` of ``data.jsonl:12``. Empty where it names none."""
    return _NUMBER.sub("", place) if _NUMBER.search(place) else ""


@dataclass(frozen=True)
class Text(Row):
    """A document."""

    type: ClassVar[str] = "text"
    text: str

    def check(self) -> None:
        check_text("text", self.text)

    def texts(self) -> list[str]:
        return [self.text]


@dataclass(frozen=True)
class Dialogue(Row):
    """A conversation: messages with a role and a content, and the tools that the assistant may call."""

    type: ClassVar[str] = "dialogue"
    messages: list[Message]
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        check_messages("messages", self.messages)
        check_assistant("messages", self.messages)
        check_tools(self.tools)

    def texts(self) -> list[str]:
        return _contents(self.messages)


@dataclass(frozen=True)
class PromptCompletion(Row):
    """What is given and what is to be learnt: both text, trained on as it stands, or both lists of messages."""

    type: ClassVar[str] = "prompt_completion"
    prompt: str | list[Message]
    completion: str | list[Message]
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        check_answer(self.prompt, "completion", self.completion)
        check_tools(self.tools)

    def texts(self) -> list[str]:
        return _texts(self.prompt, self.completion)


@dataclass(frozen=True)
class Pair(Row):
    """Two answers to a prompt, of which ``chosen`` is preferred: all text, or all lists of messages.

    ``margin`` says by how much it is preferred, in units of the reward, where that is known.
    """

    type: ClassVar[str] = "pair"
    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None

    def check(self) -> None:
        for name, answer in (("chosen", self.chosen), ("rejected", self.rejected)):
            check_answer(self.prompt, name, answer)
        check_tools(self.tools)
        if self.margin is not None and (isinstance(self.margin, bool) or not isinstance(self.margin, int | float)):
            raise RowError(f"margin is {kind(self.margin)}; a number is expected")
        if self.margin is not None and not math.isfinite(self.margin):
            raise RowError(f"margin is {self.margin}; a finite number is expected")

    def texts(self) -> list[str]:
        return _texts(self.prompt, self.chosen, self.rejected)


@dataclass(frozen=True)
class Labelled(Row):
    """An answer to a prompt, and whether it is desirable: text, or lists of messages."""

    type: ClassVar[str] = "labelled"
    prompt: str | list[Message]
    completion: str | list[Message]
    label: bool
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        check_answer(self.prompt, "completion", self.completion)
        check_tools(self.tools)
        if not isinstance(self.label, bool):
            raise RowError(f"label is {kind(self.label)} ({self.label!r}); true (desirable) or false is expected")

    def texts(self) -> list[str]:
        return _texts(self.prompt, self.completion)


@dataclass(frozen=True)
class Prompt(Row):
    """What is to be answered: text, or a list of messages; and every other column of the row, for rewards."""

    type: ClassVar[str] = "prompt"
    prompt: str | list[Message]
    columns: dict[str, Any]
    tools: list[dict[str, Any]] | None = None

    def check(self) -> None:
        if isinstance(self.prompt, str):
            check_text("prompt", self.prompt)
        else:
            check_messages("prompt", self.prompt)
            if self.prompt[-1]["role"] == "assistant":
                raise RowError("prompt ends with a turn of the assistant, which leaves nothing to answer")
        check_tools(self.tools)
        try:
            json.dumps(self.columns)
        except (TypeError, ValueError) as error:
            raise RowError(f"its columns hold what JSON cannot: {error}") from error

    def texts(self) -> list[str]:
        return _texts(self.prompt)


def _texts(*sides: str | list[Message]) -> list[str]:
    return [text for side in sides for text in ([side] if isinstance(side, str) else _contents(side))]


def _contents(messages: list[Message]) -> list[str]:
    return [content for message in messages if (content := message.get("content"))]


def check_text(name: str, value: object, *, may_be_empty: bool = False) -> None:
    """Raise :class:`RowError` unless ``value`` is text that a tokenizer can read."""
    if not isinstance(value, str):
        raise RowError(f"{name} is {kind(value)}; text is expected")
    if not may_be_empty and not value.strip():
        raise RowError(f"{name} is empty")
    check_unicode(name, value)


def check_unicode(name: str, value: str) -> None:
    """Raise :class:`RowError` for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(f"{name} holds half a surrogate pair at character {error.start}") from error


def check_messages(name: str, messages: object) -> None:
    """Raise :class:`RowError` unless ``messages`` is a list of messages, each with a role and a content."""
    if not isinstance(messages, list):
        raise RowError(f"{name} is {kind(messages)}; a list of messages is expected")
    if not messages:
        raise RowError(f"{name} is empty")
    for number, message in enumerate(messages, start=1):
        _check_message(f"message {number} of {name}", message)


def _check_message(name: str, message: object) -> None:
    if not isinstance(message, dict):
        raise RowError(f"{name} is {kind(message)}; an object with role and content is expected")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise RowError(f"{name} has no role" if role in (None, "") else f"role of {name} is {kind(role)}, not text")
    check_unicode(f"role of {name}", role)
    if content is None and message.get("tool_calls"):
        return
    if content is None:
        raise RowError(f"{name} ({role}) has no content")
    if isinstance(content, list):
        raise RowError(f"content of {name} ({role}) is a list; text is expected, or parts that are all of type text")
    # An empty answer teaches nothing but to say nothing; an empty question is a question.
    check_text(
        f"content of {name} ({role})", content, may_be_empty=role != "assistant" or bool(message.get("tool_calls"))
    )


def check_assistant(name: str, messages: list[Message]) -> None:
    """Raise :class:`RowError` if the messages hold nothing to learn."""
    roles = list(dict.fromkeys(message["role"] for message in messages))
    if "assistant" not in roles:
        raise RowError(f"{name} has no turn of the assistant; its roles are {', '.join(roles)}")


def check_answer(prompt: object, name: str, answer: object) -> None:
    """Raise :class:`RowError` unless ``answer`` can follow ``prompt``: text after text, or messages after messages."""
    if isinstance(prompt, str) and isinstance(answer, str):
        check_text("prompt", prompt, may_be_empty=True)
        check_text(name, answer)
        return
    if isinstance(prompt, str) or isinstance(answer, str):
        raise RowError(f"prompt and {name} are of two kinds: both must be text, or both lists of messages")
    check_messages("prompt", prompt)
    check_messages(name, answer)
    check_assistant(name, cast("list[Message]", answer))


def check_tools(tools: object) -> None:
    """Raise :class:`RowError` unless ``tools`` is a list of JSON schemas, or absent."""
    if tools is None:
        return
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"tools is {kind(tools)}; a list of objects is expected")


def kind(value: object) -> str:
    """Return what a value is, in the words of JSON."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    of = str if isinstance(value, str) else type(value)
    return "null" if value is None else names.get(of, of.__name__)


AnyRow = TypeVar("AnyRow", bound=Row)
CONVERSIONS: dict[tuple[str, str], Callable[[Any], Sequence[Row]]] = {}
"""(from, to) -> the function that makes rows of the one type from a row of the other."""


def conversion(
    source: type[AnyRow], target: type[Row]
) -> Callable[[Callable[[AnyRow], Sequence[Row]]], Callable[[AnyRow], Sequence[Row]]]:
    """Register the decorated function as the conversion from one row type to another.

    It gives a sequence, since one row may become several, and raises :class:`RowError` for a row that has no
    counterpart.
    """

    def register(function: Callable[[AnyRow], Sequence[Row]]) -> Callable[[AnyRow], Sequence[Row]]:
        CONVERSIONS[source.type, target.type] = function
        return function

    return register


def reachable(row_type: str, wanted: Sequence[str]) -> str | None:
    """Return ``row_type`` if it is wanted, else the first wanted type that it converts to, else None."""
    if row_type in wanted:
        return row_type
    return next((name for name in wanted if (row_type, name) in CONVERSIONS), None)


def convert(row: Row, wanted: Sequence[str]) -> Sequence[Row]:
    """Return ``row`` as rows of a wanted type (see :func:`reachable`). Raises :class:`RowError` where there is none."""
    target = reachable(row.type, wanted)
    if target is None:
        raise RowError(f"a row of type {row.type} cannot become one of {', '.join(wanted)}")
    return [row] if target == row.type else CONVERSIONS[row.type, target](row)


@conversion(PromptCompletion, Dialogue)
def _join_turns(row: PromptCompletion) -> list[Row]:
    if isinstance(row.prompt, str) or isinstance(row.completion, str):
        raise RowError("prompt and completion are plain text, which has no turns; give them as lists of messages")
    return [Dialogue(row.prompt + row.completion, row.tools, place=row.place)]


@conversion(Pair, Labelled)
def _label_both(row: Pair) -> list[Row]:
    answers = ((row.chosen, True), (row.rejected, False))
    return [Labelled(row.prompt, answer, label, row.tools, place=row.place) for answer, label in answers]


@conversion(Pair, PromptCompletion)
def _keep_chosen(row: Pair) -> list[Row]:
    return [PromptCompletion(row.prompt, row.chosen, row.tools, place=row.place)]


@conversion(Pair, Dialogue)
def _join_chosen(row: Pair) -> list[Row]:
    return [joined for part in _keep_chosen(row) for joined in convert(part, [Dialogue.type])]


@conversion(Dialogue, Prompt)
def _ask_for_the_answer(row: Dialogue) -> list[Row]:
    """What the assistant said last becomes the column `answer`."""
    last = max(index for index, message in enumerate(row.messages) if message["role"] == "assistant")
    if last == 0:
        raise RowError("messages begin with the assistant's turn, which leaves no prompt")
    return [Prompt(row.messages[:last], {"answer": row.messages[last].get("content")}, row.tools, place=row.place)]
