"""Which tokens of a dialogue are targets: what the assistant says, and the token with which it stops.

The dialogue is rendered whole, once. Where an assistant's turn stands in that text is found by rendering what comes
before it (with the prompt that asks for an answer) and what comes up to its end: both must be the text's beginning.
The tokenizer's offsets then say which tokens those characters are.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmtk.data.rows import Message, RowError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Span = tuple[int, int]
Render = Callable[[list[Message], bool], str]
"""(messages, whether the prompt for an answer follows) -> text"""


@dataclass(frozen=True)
class Rendered:
    """A dialogue's text, and the characters [begin, end) of each turn that is a target. The last ends the text."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class Marked:
    """Which tokens are targets, shape (tokens,)."""

    targets: NDArray[np.bool_]
    stopped: bool
    """Whether the template closed the last turn with a special token."""
    straddling: int | None
    """The first token that holds characters from before a turn and of the turn, if there is one."""


def render_spans(render: Render, messages: list[Message], *, first: int = 0, closing: str | None = None) -> Rendered:
    """Render ``messages`` up to the last assistant's turn, and find the assistant's turns from index ``first`` on.

    ``closing`` is the end token, which some templates put behind the last message whoever wrote it.
    Raises :class:`RowError` where the template renders the beginning of a dialogue otherwise than the whole.
    """
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant" and index >= first]
    assert turns, "rows are checked before they are encoded"
    messages = messages[: turns[-1] + 1]
    text = render(messages, False)
    spans = []
    for index in turns:
        begin = _begin(render, messages, index, text)
        end = _end(render, messages, index, text, closing)
        if begin >= end:
            raise RowError(f"the chat template leaves nothing of message {index + 1} (assistant)")
        spans.append((begin, end))
    return Rendered(text, spans)


def _begin(render: Render, messages: list[Message], index: int, text: str) -> int:
    if index == 0:
        return _begin_of_first(render, text)
    before = render(messages[:index], True)
    if not text.startswith(before):
        raise RowError(_unstable(index, "what it asks an answer with is not what it puts before that answer"))
    return len(before)


def _begin_of_first(render: Render, text: str) -> int:
    """Find where a dialogue's first message begins if it is the assistant's: behind what asks for any answer."""
    question: list[Message] = [{"role": "user", "content": "?"}]
    asked, asking = render(question, False), render(question, True)
    header = asking[len(asked) :] if asking.startswith(asked) else ""
    if not header or header not in text:
        raise RowError("the first message is the assistant's, and the chat template doesn't show where it begins")
    return text.index(header) + len(header)


def _end(render: Render, messages: list[Message], index: int, text: str, closing: str | None) -> int:
    if index == len(messages) - 1:
        return len(text)
    upto = render(messages[: index + 1], False)
    if closing and not text.startswith(upto):
        upto = upto.removesuffix(closing)
    if not text.startswith(upto):
        raise RowError(_unstable(index, "it renders that turn otherwise once more turns follow"))
    return len(upto)


def _unstable(index: int, why: str) -> str:
    return (
        f"the chat template changes earlier text, so the tokens of message {index + 1} (assistant) cannot be told: "
        f"{why} (some templates strip or add reasoning so). Give rows of prompt and completion (messages), where the "
        "last turn alone is learnt, or another template as data.template"
    )


def mark(rendered: Rendered, ids: NDArray[np.int64], offsets: NDArray[np.int64], stops: Set[int]) -> Marked:
    """Mark the tokens of the rendered turns.

    ``ids`` has shape (tokens,); ``offsets``, shape (tokens, 2), their characters [begin, end). A token that holds
    any character of a turn is a target. What a turn has behind its stop token (the last token of ``stops`` that only
    white space follows: ChatML's line break) is not.
    """
    begins, ends = _extents(offsets)
    targets = np.zeros(len(ids), dtype=bool)
    stopped, straddling = False, None
    for begin, end in rendered.spans:
        inside = np.flatnonzero((begins < end) & (ends > begin))
        if straddling is None and len(inside) and offsets[inside[0], 0] < begin:
            straddling = int(inside[0])
        stop = _stop(rendered.text, end, inside, ids, ends, stops)
        stopped = stop is not None
        targets[inside if stop is None else inside[inside <= stop]] = True
    return Marked(targets, stopped, straddling)


def _extents(offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where tokens begin and end; a token of white space alone is given as empty by some tokenizers."""
    begins, ends = offsets[:, 0], offsets[:, 1]
    former = np.concatenate([np.zeros(1, dtype=ends.dtype), ends[:-1]])
    return np.where(begins == ends, np.minimum(former, begins), begins), ends


def _stop(
    text: str, end: int, inside: NDArray[np.intp], ids: NDArray[np.int64], ends: NDArray[np.int64], stops: Set[int]
) -> int | None:
    for token in inside[::-1].tolist():
        if text[ends[token] : end].strip():
            return None
        if int(ids[token]) in stops:
            return int(token)
    return None
