"""The demo's task: adding two numbers of two digits, asked in digits or in words. Every answer can be verified.

    37+48=                          85
    thirty-seven plus forty-eight   85

A pair of numbers belongs to one split for good, whatever its order and notation: a problem that is held out was never
trained on in another dress. A stage makes the rows that it needs from ``problems``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Literal
from zlib import crc32

Split = Literal["train", "held-out"]
Row = dict[str, Any]

_ONES = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")


@dataclass(frozen=True)
class Problem:
    """``first + second``, both from 10 to 99, asked in digits, or in words where both are written in two words."""

    first: int
    second: int
    words: bool

    @property
    def prompt(self) -> str:
        """The question."""
        if self.words:
            return f"{in_words(self.first)} plus {in_words(self.second)}"
        return f"{self.first}+{self.second}="

    @property
    def answer(self) -> str:
        """The only right answer, in digits."""
        return str(self.first + self.second)


def in_words(number: int) -> str:
    """Return a number from 21 to 99 in its two words: ``48`` is ``"forty-eight"``. Round numbers have none."""
    assert has_two_words(number)
    return f"{_TENS[number // 10 - 2]}-{_ONES[number % 10 - 1]}"


def has_two_words(number: int) -> bool:
    """Whether ``in_words`` can write the number. Ten, eleven and twenty would be exceptions to learn by heart."""
    return number > 20 and number % 10 > 0


def problems(split: Split, n: int, seed: int = 0) -> list[Problem]:
    """Return ``n`` different problems of a split, in an order that ``seed`` decides.

    Raises:
        ValueError: ``n`` is more than the split has (about 14,500 for training and 1,600 held out).
    """
    pool = _pool(split)
    if n > len(pool):
        raise ValueError(f"the {split} split has {len(pool)} problems, {n} were asked for")
    return Random(seed).sample(pool, n)


@cache
def _pool(split: Split) -> tuple[Problem, ...]:
    """Return all problems of a split."""
    numbers = range(10, 100)
    return tuple(
        Problem(first, second, words)
        for first in numbers
        for second in numbers
        if _is_held_out(first, second) == (split == "held-out")
        for words in ((False, True) if has_two_words(first) and has_two_words(second) else (False,))
    )


def rows(split: Split, n: int, seed: int = 0) -> list[Row]:
    """Return ``n`` different problems as dialogues, ``{"messages": [user, assistant]}``."""
    return [dialogue(problem) for problem in problems(split, n, seed)]


def texts(split: Split, n: int, seed: int = 0) -> list[Row]:
    """Return ``n`` raw texts, ``{"text": …}``, of a few sums each: prose that the built-in model has never seen."""
    random = Random(seed)
    return [{"text": " ".join(map(_sentence, problems(split, 6, random.getrandbits(32))))} for _ in range(n)]


def dialogue(problem: Problem) -> Row:
    """Return the problem as a question and its right answer."""
    return {
        "messages": [
            {"role": "user", "content": problem.prompt},
            {"role": "assistant", "content": problem.answer},
        ]
    }


def is_correct(row: Row, answer: str) -> bool:
    """Whether ``answer`` is exactly the answer that a row of ``rows`` ends with, white space around it aside."""
    return bool(answer.strip() == row["messages"][-1]["content"])


def _is_held_out(first: int, second: int) -> bool:
    low, high = sorted((first, second))
    return crc32(f"{low}+{high}".encode()) % 10 == 0


def _sentence(problem: Problem) -> str:
    write = in_words if problem.words else str
    return f"Add {write(problem.second)} to {write(problem.first)} and you have {problem.answer}."
