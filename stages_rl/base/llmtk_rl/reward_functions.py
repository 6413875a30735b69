"""The rewards that come with llmtk, each a small class: its options, and what it makes of completions.

A reward is called as a function of the user's is: with lists as long as the batch, of which it takes those that it
names (`completions`, `completion_ids`), and gives a list of numbers. `columns` names the columns that it needs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from fractions import Fraction
from importlib import import_module
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from llmtk import ConfigurationError, Section

Completion = str | list[dict[str, Any]]
"""A completion as reward functions are given it: text, or behind a prompt of messages a list of one message."""


def text_of(completion: Completion) -> str:
    """Return a completion's text."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


class _Compared:
    """1 where a completion is the same, in some sense, as what stands in a column of its row; else 0."""

    class Options(Section):
        """What completions are compared with."""

        column: str = "answer"
        """The column that holds the right answer."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.columns = [options.column]

    def __call__(self, completions: Sequence[Completion], **columns: Sequence[Any]) -> list[float]:
        """Return (completions,) 1 or 0. ValueError for a row whose right answer is missing or cannot be read."""
        answers = columns[self.options.column]
        return [float(self.same(text_of(c), self._text(a))) for c, a in zip(completions, answers, strict=True)]

    def same(self, completion: str, answer: str) -> bool:
        """Tell whether a completion is right."""
        raise NotImplementedError

    def _text(self, answer: Any) -> str:
        if answer is None:
            raise ValueError(f"column {self.options.column!r} is null")
        return str(answer)


class ExactMatch(_Compared):
    """Equal text, but for white space around it."""

    def same(self, completion: str, answer: str) -> bool:
        return completion.strip() == answer.strip()


class Format:
    """1 where a regular expression matches, else 0."""

    class Options(Section):
        """What form completions are to have."""

        pattern: str
        """A regular expression of Python's; `(?s)` at its beginning lets `.` stand for line breaks too."""
        match: Literal["full", "search"] = "full"
        """`full`: it matches the whole completion; `search`: any part of it."""

        @field_validator("pattern")
        @classmethod
        def _is_a_pattern(cls, pattern: str) -> str:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
            return pattern

    def __init__(self, options: Options) -> None:
        pattern = re.compile(options.pattern)
        self._match = pattern.fullmatch if options.match == "full" else pattern.search

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        """Return (completions,) 1 or 0."""
        return [float(self._match(text_of(completion)) is not None) for completion in completions]


_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    # A minus behind a number or a letter is no sign: 10-5 holds 10 and 5.
    r"(?P<sign>(?<![\w)\]}])[-−])?(?:\\?\$\s?)?(?:"
    rf"\\[dt]?frac\{{(?P<above>-?\d+)\}}\{{(?P<below>\d+)\}}"
    rf"|(?P<digits>{_DIGITS})(?:[eE](?P<exponent>[-+]?\d{{1,3}})(?!\d)|\s?/\s?(?P<over>\d+)(?!\d|\.\d))?)"
)
_LONGEST_NUMBER = 1000
"""Digits of a number that can be right."""


def number_in(text: str) -> Fraction | None:
    """Return the number that a text ends in, exactly: 1,234.50, $18, 50% (as 50), -3, 3/4, 1e-3 or \\frac{3}{4}.

    Where the text marks an answer, it is that which counts: the first number behind the last `####`, as in gsm8k, else
    the last in the last \\boxed{}. None where there is no number.
    """
    _, marked, behind = text.rpartition("####")
    if marked:
        return _value(_NUMBER.search(behind))
    boxed = _last_boxed(text)
    found = list(_NUMBER.finditer(text if boxed is None else boxed))
    return _value(found[-1] if found else None)


def _value(found: re.Match[str] | None) -> Fraction | None:
    if found is None or len(found[0]) > _LONGEST_NUMBER:
        return None
    above, below = found["above"] or found["digits"].replace(",", ""), found["below"] or found["over"] or "1"
    if not int(below):
        return None
    value = Fraction(above) * Fraction(10) ** int(found["exponent"] or 0) / int(below)
    return -value if found["sign"] else value


def _last_boxed(text: str) -> str | None:
    r"""Return what stands in the last \boxed{...}, whose braces may hold braces."""
    _, marked, behind = text.rpartition(r"\boxed{")
    if not marked:
        return None
    depth = 1
    for end, character in enumerate(behind):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return behind[:end]
    return behind


class Numeric(_Compared):
    """The number that a completion ends in is the one that the column ends in."""

    class Options(_Compared.Options):
        """What numbers are compared with, and how closely."""

        tolerance: float = Field(1e-6, ge=0)
        """How far apart two numbers may be that count as equal."""

    def same(self, completion: str, answer: str) -> bool:
        right = number_in(answer)
        if right is None:
            raise ValueError(f"column {self.options.column!r} holds no number: {answer[-60:]!r}")
        given = number_in(completion)
        return given is not None and abs(given - right) <= self.options.tolerance


class Math(_Compared):
    """Mathematically equal, as math-verify judges it: expressions, sets, intervals, equations, in LaTeX or plain."""

    class Options(_Compared.Options):
        """What expressions are compared with, and for how long."""

        seconds: int = Field(5, ge=1)
        """A completion that takes longer than this to read, or to compare, counts as wrong."""

    def __init__(self, options: Any) -> None:
        super().__init__(options)
        try:
            self._library: Any = import_module("math_verify")
        except ImportError as error:
            raise ConfigurationError(
                f"the library math-verify cannot be imported ({error}). Install it: pip install 'llmtk-rl[math]'"
            ) from error
        # It logs each expression that it cannot read, and a policy writes many.
        logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def same(self, completion: str, answer: str) -> bool:
        right = self._library.parse(answer, parsing_timeout=self.options.seconds)
        if not right:
            raise ValueError(f"column {self.options.column!r} holds no expression: {answer[-60:]!r}")
        given = self._library.parse(completion, parsing_timeout=self.options.seconds)
        return bool(self._library.verify(right, given, timeout_seconds=self.options.seconds))


class Length:
    """A penalty on the number of tokens, the stop token included: 0 at best, -1 at worst.

    With `max_tokens`, that of DAPO (arXiv 2503.14476, equation 13, "soft overlong punishment"): 0 up to max_tokens -
    buffer_tokens, then falling evenly to -1 at max_tokens. With `target_tokens`, -|tokens - target| / target, which is
    the term of LCPO-Exact (arXiv 2503.04697, equation 1) with alpha = 1 / target, and no less than -1.
    """

    class Options(Section):
        """How long completions are to be: max_tokens or target_tokens."""

        max_tokens: int | None = Field(None, ge=1)
        """From here on the penalty is -1."""
        buffer_tokens: int = Field(0, ge=0)
        """The last tokens before max_tokens, in which the penalty grows."""
        target_tokens: int | None = Field(None, ge=1)
        """How long a completion should be."""

        @model_validator(mode="after")
        def _one_of_two(self) -> Length.Options:
            if (self.max_tokens is None) == (self.target_tokens is None):
                raise ValueError("give max_tokens or target_tokens, and not both")
            if self.buffer_tokens > (self.max_tokens or 0):
                raise ValueError(f"buffer_tokens ({self.buffer_tokens}) are the last of max_tokens, which must be more")
            return self

    def __init__(self, options: Options) -> None:
        self.options = options

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """Return (completions,) penalties from -1 to 0."""
        return [self._penalty(len(ids)) for ids in completion_ids]

    def _penalty(self, tokens: int) -> float:
        o = self.options
        if o.target_tokens is not None:
            return max(-abs(tokens - o.target_tokens) / o.target_tokens, -1.0)
        assert o.max_tokens is not None
        if tokens > o.max_tokens:
            return -1.0
        over = tokens - (o.max_tokens - o.buffer_tokens)
        return -over / o.buffer_tokens if over > 0 else 0.0


class Repetition:
    """A penalty on saying things again: distinct n-grams of tokens / n-grams - 1, which is 0 where none is repeated.

    As in arXiv 2502.03373, algorithm 1, but for the completion as a whole, and not for the tokens that repeat.
    """

    class Options(Section):
        """What counts as repeated."""

        n: int = Field(3, ge=1)
        """Tokens of an n-gram."""

    def __init__(self, options: Options) -> None:
        self.n = options.n

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """Return (completions,) penalties from -1 to 0; 0 for a completion of fewer than n tokens."""
        return [self._penalty(ids) for ids in completion_ids]

    def _penalty(self, ids: Sequence[int]) -> float:
        ngrams = [tuple(ids[start : start + self.n]) for start in range(len(ids) - self.n + 1)]
        return len(set(ngrams)) / len(ngrams) - 1 if ngrams else 0.0
