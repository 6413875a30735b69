"""The formats that data comes in, recognised by their columns.

A new format is one parsing function and one entry in :data:`FORMATS`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtk.data.rows import Dialogue, Message, PromptCompletion, Row, RowError, Text, check_text, reachable
from llmtk.errors import DatasetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Columns = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """How one format's columns become a row of ``row_type``.

    ``parse`` gets columns of which all in ``needs`` are there and none is null; it raises :class:`RowError`.
    """

    name: str
    row_type: type[Row]
    needs: frozenset[str]
    parse: Callable[[Columns, str], Row]
    optional: frozenset[str] = frozenset()

    def __str__(self) -> str:
        optional = f" (optional: {', '.join(sorted(self.optional))})" if self.optional else ""
        return f"{self.name}: {', '.join(sorted(self.needs))}{optional}"

    def row(self, columns: Columns, place: str) -> Row:
        """Return the checked row. Raises :class:`RowError`."""
        columns = {name: value for name, value in columns.items() if value is not None}
        missing = sorted(self.needs - columns.keys())
        if missing:
            raise RowError(f"{' and '.join(missing)} missing; its columns are {', '.join(map(str, columns)) or 'none'}")
        row = self.parse(columns, place)
        row.check()
        return row


def _messages(columns: Columns, place: str) -> Row:
    return Dialogue(_clean(columns["messages"]), _tools(columns), place=place)


def _prompt_completion(columns: Columns, place: str) -> Row:
    return PromptCompletion(_clean(columns["prompt"]), _clean(columns["completion"]), _tools(columns), place=place)


def _text(columns: Columns, place: str) -> Row:
    return Text(columns["text"], place=place)


def _alpaca(columns: Columns, place: str) -> Row:
    """Join instruction and input by a line break, as the format's other readers do."""
    instruction, answer = columns["instruction"], columns["output"]
    given, system = columns.get("input", ""), columns.get("system", "")
    check_text("output", answer)
    for name, value in [("instruction", instruction), ("input", given), ("system", system)]:
        check_text(name, value, may_be_empty=True)
    question = f"{instruction}\n{given}" if instruction and given else instruction or given
    first: list[Message] = [{"role": "system", "content": system}] if system else []
    return Dialogue(first + _history(columns.get("history", [])) + _exchange(question, answer), place=place)


def _history(history: object) -> list[Message]:
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("history must be a list of [question, answer] pairs")
    return [message for pair in history for message in _exchange(*pair)]


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _clean(messages: Any) -> Any:
    """Leave out null fields of messages: a template takes ``tool_calls: null`` for a tool call."""
    if not isinstance(messages, list):
        return messages
    return [
        {name: value for name, value in message.items() if value is not None} if isinstance(message, dict) else message
        for message in messages
    ]


def _tools(columns: Columns) -> Any:
    """Return the tools; some data sets keep them as JSON in a string, since their schemas differ from row to row."""
    tools = columns.get("tools")
    if not isinstance(tools, str):
        return tools or None
    try:
        return (json.loads(tools) or None) if tools.strip() else None
    except (ValueError, RecursionError) as error:
        raise RowError(f"tools is text, but not JSON: {error}") from error


FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in [
        Format("messages", Dialogue, frozenset({"messages"}), _messages, frozenset({"tools"})),
        Format(
            "alpaca", Dialogue, frozenset({"instruction", "output"}), _alpaca, frozenset({"input", "system", "history"})
        ),
        Format(
            "prompt/completion",
            PromptCompletion,
            frozenset({"prompt", "completion"}),
            _prompt_completion,
            frozenset({"tools"}),
        ),
        Format("text", Text, frozenset({"text"}), _text),
    ]
}


def recognise(columns: Iterable[str], row_types: Sequence[str], where: str) -> Format:
    """Return the one format that the columns fit and that gives rows of a wanted type; other columns are ignored.

    Raises :class:`DatasetError`, which tells the columns of ``where`` and what each format needs.
    """
    columns = sorted(set(columns))
    fitting = [entry for entry in FORMATS.values() if entry.needs <= set(columns)]
    useful = [entry for entry in fitting if reachable(entry.row_type.type, row_types)]
    # A format that needs all that another needs, and more, says more about the row.
    exact = [entry for entry in useful if not any(entry.needs < other.needs for other in useful)]
    if len(exact) == 1:
        return exact[0]
    raise DatasetError(_explain(where, columns, row_types, fitting, exact))


def _explain(
    where: str, columns: list[str], row_types: Sequence[str], fitting: list[Format], exact: list[Format]
) -> str:
    known = [entry for entry in FORMATS.values() if reachable(entry.row_type.type, row_types)]
    needs = "".join(f"\n  {entry}" for entry in known)
    found = f"{where} has the columns {', '.join(columns) or '(none)'}"
    if exact:
        names = " and of ".join(entry.name for entry in exact)
        return f"{found}, which fit the formats of {names}. Leave out the columns of all but one. They need:{needs}"
    if fitting:
        given = ", ".join(f"{entry.name} (rows of type {entry.row_type.type})" for entry in fitting)
        wanted = " or ".join(row_types)
        return f"{found}: the format {given}. Rows of type {wanted} are needed here. The formats for these:{needs}"
    return f"{found}, which fit no format that is known here. Rename them to one of these:{needs}"
