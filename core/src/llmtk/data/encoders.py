"""How each row type becomes tokens and targets.

A new row type is encoded by one function under :func:`encoder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from llmtk.data.dialogue import Rendered, mark, render_spans
from llmtk.data.rows import Dialogue, Labelled, Message, Pair, Prompt, PromptCompletion, Row, RowError, Text
from llmtk.data.templates import chat_template, render
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llmtk.config.sections import DataConfig


Side = Literal["left", "right"]
"""Of a text: its beginning, or its end."""


@dataclass
class EncodingReport:
    """What became of the rows. ``notices`` are for the user to read; the caller prints them."""

    rows: int = 0
    """Rows in the result."""
    tokens: int = 0
    targets: int = 0
    """Tokens that the loss is taken on; of documents, all."""
    truncated: int = 0
    too_long: list[str] = field(default_factory=list)
    """Places of rows left out for being over max_length."""
    without_target: list[str] = field(default_factory=list)
    """Places of rows left out since no target was left."""
    unknown: int = 0
    """Tokens that stand for text which the tokenizer doesn't know."""
    moved: int = 0
    """Rows in which one token joins the prompt's end with the answer's beginning."""
    cut_prompts: int = 0
    """Rows whose prompt was cut at max_prompt_length."""
    long_prompts: list[str] = field(default_factory=list)
    """Places of rows left out for a prompt over max_prompt_length."""
    first: dict[str, str] = field(default_factory=dict)
    """What is true of some rows -> what is said of the first of them."""
    notices: list[str] = field(default_factory=list)

    @property
    def dropped(self) -> list[str]:
        """Places of all rows that were left out."""
        return self.too_long + self.without_target + self.long_prompts

    def say_first(self, what: str, text: str) -> None:
        """Say something of the first row only of which `what` is true."""
        self.first.setdefault(what, text)

    def add(self, later: EncodingReport) -> None:
        """Add the report of rows that come behind these."""
        for name, value in vars(later).items():
            mine = getattr(self, name)
            setattr(self, name, mine | value | mine if isinstance(value, dict) else mine + value)


@dataclass(frozen=True)
class Encoded:
    """One row's tokens, shape (tokens,), and which of them are targets (None: a document, all of it)."""

    ids: NDArray[np.int64]
    targets: NDArray[np.bool_] | None
    place: str

    @property
    def parts(self) -> dict[str, NDArray[Any]]:
        """The columns that hold one value a token."""
        return {"input_ids": self.ids} | ({} if self.targets is None else {"targets": self.targets})

    @property
    def values(self) -> dict[str, Any]:
        """The columns that hold one value."""
        return {}

    def cut(self, length: int, side: Side) -> tuple[Encoded | None, bool]:
        """Return the row within a length, or None if nothing is left to learn, and whether it was over the length."""
        if self.targets is None:
            return (self if len(self.ids) else None), False
        over = len(self.ids) > length
        kept = slice(-length, None) if over and side == "left" else slice(length)
        targets = self.targets[kept].copy()
        targets[:1] = False
        return (replace(self, ids=self.ids[kept], targets=targets) if targets.any() else None), over

    def cut_prompt(self, length: int) -> tuple[Encoded, bool]:
        """Return the row with the last tokens of what stands before its first target, and whether any were cut."""
        assert self.targets is not None
        prompt = int(self.targets.argmax()) if self.targets.any() else len(self.ids)
        start = max(prompt - length, 0)
        return replace(self, ids=self.ids[start:], targets=self.targets[start:]), start > 0


@dataclass(frozen=True)
class EncodedAnswers:
    """A prompt's tokens, shape (tokens,), and by name each answer's (tokens, targets), which stand behind it.

    `values` are further columns, of one value each.
    """

    prompt: NDArray[np.int64]
    answers: dict[str, tuple[NDArray[np.int64], NDArray[np.bool_]]]
    values: dict[str, Any]
    place: str

    @classmethod
    def of(cls, wholes: dict[str, Encoded], values: dict[str, Any], place: str) -> EncodedAnswers:
        """Take apart sequences that begin alike. What they have in common, up to the first target, is the prompt."""
        sequences = [(whole.ids, np.asarray(whole.targets)) for whole in wholes.values()]
        shared = min(int(targets.argmax()) if targets.any() else len(ids) for ids, targets in sequences)
        first = sequences[0][0]
        shared = min([shared, *(_common(first, ids) for ids, _ in sequences)])
        answers = {
            name: (ids[shared:], targets[shared:]) for name, (ids, targets) in zip(wholes, sequences, strict=True)
        }
        return cls(first[:shared], answers, values, place)

    @property
    def parts(self) -> dict[str, NDArray[Any]]:
        """The columns that hold one value a token: `prompt_ids`, and `NAME_ids` and `NAME_targets` of each answer."""
        columns: dict[str, NDArray[Any]] = {"prompt_ids": self.prompt}
        for name, (ids, targets) in self.answers.items():
            columns |= {f"{name}_ids": ids, f"{name}_targets": targets}
        return columns

    def cut(self, length: int, side: Side) -> tuple[EncodedAnswers | None, bool]:
        """Return the row with each answer within a length, or None if one has no target left, and whether one was over.

        The prompt counts. From the right it is never cut; from the left it gives way to the longest answer, but for its
        last token.
        """
        longest = max(len(ids) for ids, _ in self.answers.values())
        if side == "left" and len(self.prompt) + longest > length:
            shorter, _ = self.cut_prompt(max(length - longest, 1))
            return shorter.cut(length, "right")[0], True
        room = max(length - len(self.prompt), 0)
        answers = {name: (ids[:room], targets[:room].copy()) for name, (ids, targets) in self.answers.items()}
        for _, targets in answers.values():
            targets[:1] &= len(self.prompt) > 0
        kept = replace(self, answers=answers) if all(targets.any() for _, targets in answers.values()) else None
        return kept, longest > room

    def cut_prompt(self, length: int) -> tuple[EncodedAnswers, bool]:
        """Return the row with the last tokens of its prompt, and whether any were cut."""
        return replace(self, prompt=self.prompt[-length:]), len(self.prompt) > length


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt's tokens, shape (tokens,), up to where the answer begins, and the row as JSON."""

    prompt: NDArray[np.int64]
    values: dict[str, Any]
    place: str

    @property
    def parts(self) -> dict[str, NDArray[Any]]:
        """The column `prompt_ids`."""
        return {"prompt_ids": self.prompt}

    def cut(self, length: int, side: Side) -> tuple[EncodedPrompt | None, bool]:
        """Return the row, or None if there is no room for an answer within a length."""
        over = len(self.prompt) >= length
        return (None if over else self), over

    def cut_prompt(self, length: int) -> tuple[EncodedPrompt, bool]:
        """Return the last tokens of the prompt, and whether any were cut."""
        return replace(self, prompt=self.prompt[-length:]), len(self.prompt) > length


@dataclass
class Context:
    """What encoders share: the tokenizer, what follows from it and the configuration, and the report."""

    tokenizer: PreTrainedTokenizerBase
    config: DataConfig
    report: EncodingReport

    @cached_property
    def template(self) -> str:
        """The chat template's text."""
        return chat_template(self.tokenizer, self.config.template)

    @cached_property
    def eos(self) -> int:
        """The end token. Raises :class:`ConfigurationError` where the tokenizer has none."""
        if self.tokenizer.eos_token_id is None:
            raise ConfigurationError(
                "The tokenizer has no end token (eos_token), so the model couldn't learn to stop: give it one, or use "
                "a chat template that closes each turn with a special token."
            )
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def bos(self) -> list[int]:
        """What the tokenizer itself puts before a text: its first token, or nothing."""
        first = self.tokenizer("")["input_ids"][:1]
        return first if first == [self.tokenizer.bos_token_id] else []

    @cached_property
    def stops(self) -> frozenset[int]:
        """Tokens that can end a turn: the end token and every special token without another duty."""
        tokenizer = self.tokenizer
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        duties = {tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id}
        return frozenset((special - duties) | ({tokenizer.eos_token_id} - {None}))

    def tokens(self, texts: list[str], *, offsets: bool = False) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Return each text's token ids, shape (tokens,), and, if asked for, their characters, shape (tokens, 2).

        No special token is added: a template or an encoder has put them where they belong.
        """
        if offsets and not self.tokenizer.is_fast:
            raise ConfigurationError(
                "The tokenizer is a slow one, which doesn't say where its tokens stand in the text; dialogues need a "
                "fast one (a folder with a tokenizer.json)."
            )
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=offsets,
            verbose=False,
        )
        characters = found["offset_mapping"] if offsets else [[]] * len(texts)
        return [
            (np.asarray(ids, dtype=np.int64), np.asarray(pairs, dtype=np.int64).reshape(-1, 2))
            for ids, pairs in zip(found["input_ids"], characters, strict=True)
        ]

    def moved_boundary(self, place: str, token: int) -> None:
        """Count a row in which ``token`` joins the end of what is given with the beginning of what is learnt."""
        text = self.tokenizer.convert_ids_to_tokens(token)
        self.report.say_first(
            "moved",
            f"{place}: the token {text!r} joins the prompt's end with the answer's beginning. It is a target, here "
            "and wherever else this happens. An answer that begins apart from the prompt, or a prompt that ends "
            "without white space, avoids it.",
        )
        self.report.moved += 1


Turns = tuple[list[Message], list[dict[str, Any]] | None, int, str]
"""Messages, tools, the index of the first message that may be learnt, and the row's place."""

AnyEncoded = Encoded | EncodedAnswers | EncodedPrompt
Encoder = Callable[[Context, Sequence[Any]], Iterator[AnyEncoded]]
AnyEncoder = TypeVar("AnyEncoder", bound=Encoder)
ENCODERS: dict[str, Encoder] = {}
"""Row type -> what encodes a batch of such rows, in their order."""


def encoder(row_type: type[Row]) -> Callable[[AnyEncoder], AnyEncoder]:
    """Register the decorated function as the encoder of a row type."""

    def register(function: AnyEncoder) -> AnyEncoder:
        ENCODERS[row_type.type] = function
        return function

    return register


@encoder(Text)
def _encode_texts(context: Context, rows: Sequence[Text]) -> Iterator[Encoded]:
    """Without an end token: who packs documents puts it between them."""
    for row, (ids, _) in zip(rows, context.tokens([row.text for row in rows]), strict=True):
        yield Encoded(ids, None, row.place)


@encoder(Dialogue)
def _encode_dialogues(context: Context, rows: Sequence[Dialogue]) -> Iterator[Encoded]:
    """All turns of the assistant are targets, unless data.loss_on says otherwise."""
    if context.config.loss_on == "completion":
        raise ConfigurationError(
            f"data.loss_on: completion is for rows of prompt and completion, and {rows[0].place} is a dialogue. Take "
            "assistant or last_turn"
        )
    turns = [(row.messages, row.tools, _first_target(context, row.messages, 0), row.place) for row in rows]
    return _encode_turns(context, turns)


@encoder(PromptCompletion)
def _encode_completions(context: Context, rows: Sequence[PromptCompletion]) -> Iterator[Encoded]:
    """Plain ones as they stand, without a template; of conversational ones the completion's turns are targets."""
    for plain, group in groupby(rows, key=lambda row: isinstance(row.prompt, str)):
        alike = list(group)
        turns = [] if plain else [_turns(context, row) for row in alike]
        yield from _encode_plain(context, alike) if plain else _encode_turns(context, turns)


@encoder(Pair)
def _encode_pairs(context: Context, rows: Sequence[Pair]) -> Iterator[EncodedAnswers]:
    sides = [_encode_answers(context, rows, [getattr(row, name) for row in rows]) for name in ("chosen", "rejected")]
    for row, chosen, rejected in zip(rows, *sides, strict=True):
        values = {} if row.margin is None else {"margin": float(row.margin)}
        yield EncodedAnswers.of({"chosen": chosen, "rejected": rejected}, values, row.place)


@encoder(Labelled)
def _encode_labelled(context: Context, rows: Sequence[Labelled]) -> Iterator[EncodedAnswers]:
    wholes = _encode_answers(context, rows, [row.completion for row in rows])
    for row, whole in zip(rows, wholes, strict=True):
        yield EncodedAnswers.of({"completion": whole}, {"label": row.label}, row.place)


@encoder(Prompt)
def _encode_prompts(context: Context, rows: Sequence[Prompt]) -> Iterator[EncodedPrompt]:
    """Messages through the template, up to where the assistant is to begin; text as it stands."""
    asked = context.tokens([_asked(context, row) for row in rows])
    for row, (ids, _) in zip(rows, asked, strict=True):
        bos = context.bos if isinstance(row.prompt, str) else []
        values = {"prompt": json.dumps(row.prompt), "columns": json.dumps(row.columns)}
        yield EncodedPrompt(np.concatenate([np.asarray(bos, dtype=np.int64), ids]), values, row.place)


def _asked(context: Context, row: Prompt) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    try:
        return render(context.tokenizer, context.template, row.prompt, row.tools, prompt=True)
    except RowError as error:
        raise DatasetError(f"{row.place}: {error}.") from error


def _encode_answers(context: Context, rows: Sequence[Pair | Labelled], answers: Sequence[Any]) -> Iterator[Encoded]:
    """Encode prompt and answer of each row as a row of prompt and completion is."""
    joined = [
        PromptCompletion(row.prompt, answer, row.tools, place=row.place)
        for row, answer in zip(rows, answers, strict=True)
    ]
    return _encode_completions(context, joined)


def _turns(context: Context, row: PromptCompletion) -> Turns:
    assert isinstance(row.prompt, list)
    assert isinstance(row.completion, list)
    messages = row.prompt + row.completion
    return messages, row.tools, _first_target(context, messages, len(row.prompt)), row.place


def _first_target(context: Context, messages: list[Message], completion: int) -> int:
    """Return the index of the first message that may be learnt; `completion` is where the completion begins."""
    if context.config.loss_on in ("last_turn", "everything"):
        return max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    return 0 if context.config.loss_on == "assistant" else completion


def _encode_plain(context: Context, rows: Sequence[PromptCompletion]) -> Iterator[Encoded]:
    loss_on, everything = context.config.loss_on, context.config.loss_on == "everything"
    if loss_on in ("assistant", "last_turn"):
        raise ConfigurationError(
            f"data.loss_on: {loss_on} is for turns of a dialogue, and {rows[0].place} is plain text. Take completion "
            "or everything"
        )
    prompts = [str(row.prompt) for row in rows]
    wholes = [f"{row.prompt}{row.completion}" for row in rows]
    tokens = context.tokens(prompts + wholes)
    bos = np.asarray(context.bos, dtype=np.int64)
    for row, (prompt, _), (whole, _) in zip(rows, tokens[: len(rows)], tokens[len(rows) :], strict=True):
        boundary = _common(prompt, whole)
        if not everything and boundary < min(len(prompt), len(whole)):
            context.moved_boundary(row.place, int(whole[boundary]))
        end = [] if len(whole) and whole[-1] == context.eos else [context.eos]
        ids = np.concatenate([bos, whole, np.asarray(end, dtype=np.int64)])
        yield Encoded(ids, np.arange(len(ids)) >= (0 if everything else len(bos) + boundary), row.place)


def _common(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Return how many tokens the two have in common from the start."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length


def _encode_turns(context: Context, dialogues: Sequence[Turns]) -> Iterator[Encoded]:
    rendered = [_render(context, *dialogue) for dialogue in dialogues]
    tokens = context.tokens([item.text for item in rendered], offsets=True)
    for item, (ids, offsets), (*_, place) in zip(rendered, tokens, dialogues, strict=True):
        marked = mark(item, ids, offsets, context.stops)
        everything = context.config.loss_on == "everything"
        targets = np.ones_like(marked.targets) if everything else marked.targets
        if marked.straddling is not None and not everything:
            context.moved_boundary(place, int(ids[marked.straddling]))
        if not marked.stopped:
            ids, targets = np.append(ids, context.eos), np.append(targets, True)
            context.report.say_first(
                "not stopped",
                "The chat template puts no special token behind the assistant's last turn: the end token "
                f"{context.tokenizer.eos_token} is put there, and is a target.",
            )
        yield Encoded(ids, targets, place)


def _render(
    context: Context, messages: list[Message], tools: list[dict[str, Any]] | None, first: int, place: str
) -> Rendered:
    def text(part: list[Message], prompt: bool, tools: list[dict[str, Any]] | None = tools) -> str:
        return render(context.tokenizer, context.template, part, tools, prompt=prompt)

    try:
        rendered = render_spans(text, messages, first=first, closing=context.tokenizer.eos_token)
        if tools and text(messages, False, None) == text(messages, False):
            context.report.say_first(
                "tools", f"{place}: the chat template doesn't show tools: the model will not see them."
            )
        if _hides_calls(text, messages):
            context.report.say_first(
                "tool calls",
                f"{place}: the chat template doesn't show tool calls: a turn that makes one is learnt without it.",
            )
    except RowError as error:
        raise DatasetError(f"{place}: {error}.") from error
    return rendered


def _hides_calls(text: Callable[[list[Message], bool], str], messages: list[Message]) -> bool:
    """Whether messages with tool calls look as they would without."""
    if not any(message.get("tool_calls") for message in messages):
        return False
    without = [{name: value for name, value in message.items() if name != "tool_calls"} for message in messages]
    try:
        return text(without, False) == text(messages, False)
    except RowError:  # the template cannot do without
        return False
