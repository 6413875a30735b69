"""The formats that data comes in, recognised by their columns.

A new format is one parsing function and one entry in :data:`FORMATS`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtk.data.rows import (
    Cell,
    Dialogue,
    Labelled,
    Message,
    Pair,
    Prompt,
    PromptCompletion,
    Row,
    RowError,
    Text,
    check_messages,
    check_text,
    kind,
    reachable,
)
from llmtk.errors import ConfigurationError, DatasetError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence, Set

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
    takes_all: bool = False
    """Whether a row keeps its other columns too."""

    def __str__(self) -> str:
        more = [*sorted(self.optional), *["any others"] * self.takes_all]
        optional = f" (optional: {', '.join(more)})" if more else ""
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
    answer = columns["output"]
    check_text("output", answer)
    return Dialogue([*_alpaca_prompt(columns), _said(answer)], place=place)


def _alpaca_preference(columns: Columns, place: str) -> Row:
    for name in ("chosen", "rejected"):
        check_text(name, columns[name])
    chosen, rejected = ([_said(columns[name])] for name in ("chosen", "rejected"))
    return Pair(_alpaca_prompt(columns), chosen, rejected, margin=_margin(columns), place=place)


def _alpaca_prompt(columns: Columns) -> list[Message]:
    """Join instruction and input by a line break, as the format's other readers do."""
    instruction, given, system = columns["instruction"], columns.get("input", ""), columns.get("system", "")
    for name, value in [("instruction", instruction), ("input", given), ("system", system)]:
        check_text(name, value, may_be_empty=True)
    question = f"{instruction}\n{given}" if instruction and given else instruction or given
    return [*_system(system), *_history(columns.get("history", [])), {"role": "user", "content": question}]


def _system(text: str) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def _said(answer: str) -> Message:
    return {"role": "assistant", "content": answer}


def _history(history: object) -> list[Message]:
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("history must be a list of [question, answer] pairs")
    return [message for pair in history for message in _exchange(*pair)]


def _exchange(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, _said(answer)]


def _preference(columns: Columns, place: str) -> Row:
    prompt, chosen, rejected = (_clean(_listed(columns[name])) for name in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        # Some data sets give the question as text, and again as the first turns of both answers.
        shared = _common_messages(chosen, rejected)
        if shared and prompt in [message.get("content") for message in shared]:
            prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
        else:
            prompt = [{"role": "user", "content": prompt}]
    return Pair(prompt, chosen, rejected, _tools(columns), _margin(columns), place=place)


def _implicit_preference(columns: Columns, place: str) -> Row:
    """What the two have in common is the prompt: whole messages, or words."""
    chosen, rejected = (_clean(columns[name]) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str):
        length = _common_words(chosen, rejected)
    elif isinstance(chosen, list) and isinstance(rejected, list):
        check_messages("chosen", chosen)
        check_messages("rejected", rejected)
        length = len(_common_messages(chosen, rejected))
        if not length:
            raise RowError("chosen and rejected begin with different messages, so that there is no prompt")
    else:
        raise RowError(f"chosen is {kind(chosen)} and rejected {kind(rejected)}; both must be text, or messages")
    prompt, chosen, rejected = chosen[:length], chosen[length:], rejected[length:]
    return Pair(prompt, chosen, rejected, _tools(columns), _margin(columns), place=place)


def _common_messages(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """Return the messages that both begin with. The last one of each is its answer, also where they are equal."""
    shared = []
    for first, second in zip(chosen[:-1], rejected[:-1], strict=False):
        if first != second:
            break
        shared.append(first)
    return shared


def _common_words(chosen: str, rejected: str) -> int:
    """Return the length of what both begin with, up to a word's beginning, its white space left to the answers.

    In a script that parts no words by spaces it ends at the first character that differs.
    """
    differing = (index for index, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
    length = next(differing, min(len(chosen), len(rejected)))
    spaces = [index for index in range(length) if chosen[index].isspace()]
    if spaces:
        return spaces[-1]
    return 0 if chosen[:length].isascii() or length in (len(chosen), len(rejected)) else length


def _sharegpt_dialogue(columns: Columns, place: str) -> Row:
    messages = _system(columns.get("system", "")) + _sharegpt(columns["conversations"], "conversations")
    return Dialogue(messages, _sharegpt_tools(columns), place=place)


def _sharegpt_preference(columns: Columns, place: str) -> Row:
    turns = _sharegpt(columns["conversations"], "conversations")
    chosen, rejected = (_sharegpt(_listed(columns[name]), name) for name in ("chosen", "rejected"))
    prompt = _system(columns.get("system", "")) + turns
    return Pair(prompt, chosen, rejected, _sharegpt_tools(columns), _margin(columns), place=place)


_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def _sharegpt(turns: Any, name: str) -> list[Message]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"{name} must be a list of turns, each with from and value")
    for turn in turns:
        if not isinstance(turn.get("from"), str) or turn["from"] not in _SHAREGPT_ROLES:
            raise RowError(f"a turn of {name} is from {turn.get('from')!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    return [_sharegpt_message(turn, f"turn {number} of {name}") for number, turn in enumerate(turns, start=1)]


def _sharegpt_message(turn: dict[str, Any], name: str) -> Message:
    if turn["from"] == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _sharegpt_calls(turn.get("value"), name)}
    return {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")}


def _sharegpt_calls(value: Any, name: str) -> list[dict[str, Any]]:
    """Return calls, which stand there as JSON with name and arguments, in the form that chat templates know."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(f"{name} is a function_call, but not JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise RowError(f"{name} is a function_call without name and arguments")
    return [{"type": "function", "function": call} for call in calls]


def _sharegpt_tools(columns: Columns) -> Any:
    """Return the tools; a bare function, as this format has them, is put into the form that chat templates know."""
    tools = _tools(columns)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return tools
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def _listed(answer: Any) -> Any:
    """Return a single message as a list of one."""
    return [answer] if isinstance(answer, dict) else answer


def _labelled(columns: Columns, place: str) -> Row:
    prompt, completion = _clean(columns["prompt"]), _clean(_listed(columns["completion"]))
    return Labelled(prompt, completion, _label(columns), _tools(columns), place=place)


def _labelled_messages(columns: Columns, place: str) -> Row:
    messages = _clean(columns["messages"])
    check_messages("messages", messages)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise RowError("messages must end with the assistant's turn, which the label judges, behind a prompt")
    return Labelled(messages[:-1], messages[-1:], _label(columns), _tools(columns), place=place)


def _label(columns: Columns) -> Any:
    """Return the label; a table can but spell it."""
    label = columns["label"]
    return {"true": True, "false": False}.get(label.lower(), label) if isinstance(label, Cell) else label


def _margin(columns: Columns) -> Any:
    """Return the margin, if there is one; a table can but spell it."""
    margin = columns.get("margin")
    try:
        return float(margin) if isinstance(margin, Cell) else margin
    except ValueError:
        return margin


def _prompt(columns: Columns, place: str) -> Row:
    others = {name: value for name, value in columns.items() if name not in ("prompt", "tools")}
    return Prompt(_clean(columns["prompt"]), others, _tools(columns), place=place)


def _question(columns: Columns, place: str) -> Row:
    check_text("question", columns["question"])
    others = {name: value for name, value in columns.items() if name != "question"}
    return Prompt([{"role": "user", "content": columns["question"]}], others, place=place)


def _clean(messages: Any) -> Any:
    """Leave out null fields of messages: a template takes ``tool_calls: null`` for a tool call. Join parts of text."""
    if not isinstance(messages, list):
        return messages
    return [_clean_message(message) if isinstance(message, dict) else message for message in messages]


def _clean_message(message: Message) -> Message:
    said = {name: value for name, value in message.items() if value is not None}
    parts = said.get("content")
    if isinstance(parts, list) and parts and all(map(_is_text_part, parts)):
        said["content"] = "".join(part["text"] for part in parts)
    return said


def _is_text_part(part: object) -> bool:
    """Whether a part of a content, as OpenAI's newer form has them, is text: ``{"type": "text", "text": "..."}``."""
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


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
        Format(
            "preference",
            Pair,
            frozenset({"prompt", "chosen", "rejected"}),
            _preference,
            frozenset({"tools", "margin"}),
        ),
        Format(
            "implicit preference",
            Pair,
            frozenset({"chosen", "rejected"}),
            _implicit_preference,
            frozenset({"tools", "margin"}),
        ),
        Format(
            "alpaca preference",
            Pair,
            frozenset({"instruction", "chosen", "rejected"}),
            _alpaca_preference,
            frozenset({"input", "system", "history", "margin"}),
        ),
        Format("sharegpt", Dialogue, frozenset({"conversations"}), _sharegpt_dialogue, frozenset({"system", "tools"})),
        Format(
            "sharegpt preference",
            Pair,
            frozenset({"conversations", "chosen", "rejected"}),
            _sharegpt_preference,
            frozenset({"system", "tools", "margin"}),
        ),
        Format(
            "labelled",
            Labelled,
            frozenset({"prompt", "completion", "label"}),
            _labelled,
            frozenset({"tools"}),
        ),
        Format("prompt", Prompt, frozenset({"prompt"}), _prompt, frozenset({"tools"}), takes_all=True),
        Format("question", Prompt, frozenset({"question"}), _question, takes_all=True),
        Format(
            "labelled messages", Labelled, frozenset({"messages", "label"}), _labelled_messages, frozenset({"tools"})
        ),
    ]
}


def named(name: str, columns: Set[str], row_types: Sequence[str], where: str) -> Format:
    """Return the format that a source says it has.

    Raises :class:`ConfigurationError` for an unknown one, and :class:`DatasetError` for one that the columns do not fit
    or that gives no rows of a wanted type.
    """
    if name not in FORMATS:
        raise ConfigurationError(
            f"{where}: there is no format {name!r}.{suggest(name, FORMATS)} Known are {', '.join(FORMATS)}."
        )
    form = FORMATS[name]
    if missing := sorted(form.needs - columns):
        raise DatasetError(
            f"{where} lacks {' and '.join(missing)}, which the format {name} needs. Its columns are "
            f"{', '.join(sorted(columns))}; data.columns renames them."
        )
    if not reachable(form.row_type.type, row_types):
        raise DatasetError(
            f"{where}: the format {name} gives rows of type {form.row_type.type}, and rows of type "
            f"{' or '.join(row_types)} are needed here."
        )
    return form


def recognise(columns: Iterable[str], row_types: Sequence[str], where: str) -> Format:
    """Return the one format that the columns fit and that gives rows of a wanted type; other columns are ignored.

    Raises :class:`DatasetError`, which tells the columns of ``where`` and what each format needs.
    """
    columns = sorted(set(columns))
    exact = _exact(set(columns), row_types)
    if len(exact) == 1:
        return exact[0]
    raise DatasetError(_explain(where, columns, row_types, _fitting(set(columns)), exact))


def refuse_mixed(kinds: Mapping[frozenset[str], str], row_types: Sequence[str], where: str) -> None:
    """Raise :class:`DatasetError` for rows of several formats. ``kinds`` gives, by its columns, where the first is."""
    first: dict[str, str] = {}
    for columns, place in kinds.items():
        exact = _exact(columns, row_types)
        if len(exact) > 1:
            return
        for entry in exact:
            first.setdefault(entry.name, f"{place} is {entry.name} (its columns: {', '.join(sorted(columns))})")
    if len(first) > 1:
        raise DatasetError(
            f"{where} mixes rows of {len(first)} formats: {'; '.join(first.values())}. Put the rows of each into a "
            "file of its own, and give them all: [FIRST.jsonl, SECOND.jsonl]"
        )


def _fitting(columns: Set[str]) -> list[Format]:
    return [entry for entry in FORMATS.values() if entry.needs <= columns]


def _exact(columns: Set[str], row_types: Sequence[str]) -> list[Format]:
    """Return the formats that the columns fit, and that say most of what is wanted."""
    useful = [entry for entry in _fitting(columns) if reachable(entry.row_type.type, row_types)]
    # A format that needs all that another needs, and more, says more about the row.
    exact = [entry for entry in useful if not any(entry.needs < other.needs for other in useful)]
    # What is there as it is wanted goes before what would have to be converted.
    return [entry for entry in exact if entry.row_type.type in row_types] or exact


def _explain(
    where: str, columns: list[str], row_types: Sequence[str], fitting: list[Format], exact: list[Format]
) -> str:
    known = [entry for entry in FORMATS.values() if reachable(entry.row_type.type, row_types)]
    needs = "".join(f"\n  {entry}" for entry in known)
    found = f"{where} has the columns {', '.join(columns) or '(none)'}"
    if exact:
        names = " and of ".join(entry.name for entry in exact)
        return (
            f"{found}, which fit the formats of {names}. Leave out the columns of all but one, in the data or "
            f"with data.columns ({{NAME: null}}), or give the source its format. They need:{needs}"
        )
    if fitting:
        given = ", ".join(f"{entry.name} (rows of type {entry.row_type.type})" for entry in fitting)
        wanted = " or ".join(row_types)
        return (
            f"{found}: the format {given}. Rows of type {wanted} are needed here. If these are such rows, rename their "
            f"columns to those of one of the formats below, in the data or with data.columns ({{THEIRS: OURS}}):{needs}"
        )
    return (
        f"{found}, which fit no format that is known here. Rename them to one of these, in the data or with "
        f"data.columns ({{THEIRS: OURS}}):{needs}"
    )
