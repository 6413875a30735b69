"""Rows to be answered: from files of every format that can ask something, or from standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llmtk.data import read_rows
from llmtk.data.formats import FORMATS, Columns, Format, _clean, _tools
from llmtk.data.rows import (
    Dialogue,
    Labelled,
    Pair,
    Prompt,
    PromptCompletion,
    Row,
    RowError,
    check_messages,
    conversion,
    convert,
)
from llmtk.errors import DatasetError

if TYPE_CHECKING:
    from llmtk.config.sections import DataConfig

STDIN = "-"


@dataclass(frozen=True)
class Asked(Prompt):
    """A row to be answered. Unlike prompts for training, dialogues keep their other columns, and may end unanswered."""

    type: ClassVar[str] = "unanswered"


@conversion(Prompt, Asked)
def _prompt(row: Prompt) -> list[Row]:
    return [Asked(row.prompt, row.columns, row.tools, place=row.place)]


@conversion(Dialogue, Asked)
def _dialogue(row: Dialogue) -> list[Row]:
    return [asked for part in convert(row, [Prompt.type]) for asked in convert(part, [Asked.type])]


def _messages(columns: Columns, place: str) -> Row:
    """Take what the assistant said last for the column `answer`, if the dialogue ends with it.

    A column `prompt` beside messages says again what they begin with.
    """
    messages = _clean(columns["messages"])
    check_messages("messages", messages)
    others = {name: value for name, value in columns.items() if name not in ("messages", "tools", "prompt")}
    if messages[-1]["role"] == "assistant":
        others = {"answer": messages[-1].get("content")} | others
        messages = messages[:-1]
    if not messages:
        raise RowError("messages hold the assistant's turn alone, which leaves no prompt")
    return Asked(messages, others, _tools(columns), place=place)


_FORMAT = Format("messages to answer", Asked, frozenset({"messages"}), _messages, frozenset({"tools"}), takes_all=True)
FORMATS[_FORMAT.name] = _FORMAT


def read_prompts(source: str, config: DataConfig | None = None) -> tuple[list[Prompt], bool]:
    """Return the rows of a file, or of standard input for `-`, and whether they are lines of text, each a question.

    Such a question is yet to be put through the chat template, if there is one (`TextModel.row`). A .txt file holds
    such lines; standard input does unless it begins with `{`, as JSON lines do. `config` has the columns and the
    catalog of a run. DatasetError for data that cannot be read, naming every bad row.
    """
    given: Any = source
    if source == STDIN:
        text = _standard_input()
        if not text.lstrip().startswith("{"):
            return _questions("standard input", text), True
        given = _json_lines(text)
    elif source.lower().endswith(".txt"):
        (document,) = read_rows(source, ("text",))
        return _questions(source, *document.texts()), True
    rows: list[Any] = read_rows(given, (Asked.type,), config)
    return [Prompt(row.prompt, row.columns, row.tools, place=row.place) for row in rows], False


def prompts_of(rows: Sequence[Row]) -> list[Prompt]:
    """Return a stage's rows as rows to be answered. What each should be answered with becomes a column of it.

    DatasetError for rows of a type that asks nothing, as texts do.
    """
    return [_asking(row) for row in rows]


def _asking(row: Row) -> Prompt:
    if isinstance(row, Pair):
        return Prompt(row.prompt, {"reference": row.chosen}, row.tools, place=row.place)
    if isinstance(row, PromptCompletion):
        return Prompt(row.prompt, {"reference": row.completion}, row.tools, place=row.place)
    if isinstance(row, Labelled):
        return Prompt(row.prompt, {"reference": row.completion} if row.label else {}, row.tools, place=row.place)
    try:
        (asking,) = convert(row, [Prompt.type])
    except RowError as error:
        raise DatasetError(f"{row.place}: {error}") from error
    assert isinstance(asking, Prompt)
    return asking


def _standard_input() -> str:
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"standard input: invalid UTF-8 at byte {error.start}") from error
    if not text.strip():
        raise DatasetError("standard input is empty: it holds no rows")
    return text


def _json_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"standard input, line {number}: broken JSON: {error}") from error
    return rows


def _questions(name: str, text: str) -> list[Prompt]:
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1)]
    return [Prompt(line, {}, place=f"{name}:{number}") for number, line in lines if line]
