"""Counts of rows against what is counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import Pair, Prompt, PromptCompletion, Text, encode
from llmtk.data.statistics import histogram, repeated, statistics


@pytest.fixture
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer(["</s>"], eos_token="</s>")


@pytest.mark.parametrize(
    ("rows", "lengths", "targets"),
    [
        ([PromptCompletion("ab", "cde"), PromptCompletion("a", "b")], [6, 3], 6),
        ([Pair("ab", "c", "de")], [7], 5),
        ([Text("abc"), Text("d")], [3, 1], 2),
        ([Prompt("abc", {})], [3], 0),
    ],
)
def test_tokens_and_targets(tokenizer: Any, rows: Any, lengths: list[int], targets: int) -> None:
    found = statistics(encode(rows, tokenizer, DataConfig())[0])
    assert found.lengths.tolist() == lengths
    assert (found.tokens, found.targets) == (sum(lengths), targets)


def test_a_histogram_doubles_its_steps() -> None:
    assert histogram(np.array([3, 4, 7, 8, 40])) == [(2, 3, 1), (4, 7, 2), (8, 15, 1), (16, 31, 0), (32, 63, 1)]
    assert histogram(np.array([1, 1])) == [(1, 1, 2)]


def test_rows_that_stand_there_twice() -> None:
    rows = [PromptCompletion("a", "b", place=f"row {n}") for n in (1, 2, 3)]
    other = PromptCompletion("a", "c", place="row 4")
    assert repeated([*rows, other]) == [("row 2", "row 1"), ("row 3", "row 1")]
    assert repeated([other, rows[2]], known=rows[:2]) == [("row 3", "row 1")]
