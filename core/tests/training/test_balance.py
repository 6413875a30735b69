"""Shares and micro-batches of about equal size: each row once, within bounds, and how much is gained on real rows."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtk.training.balance import deal, even_out, pack
from llmtk.training.order import row_lengths, share

REAL_ROWS = Path(__file__).parents[3].parent / "shared" / "data" / "alpaca_en_demo.json"
SIZES = st.lists(st.integers(1, 40) | st.integers(1, 400), max_size=40)


def totals(parts, sizes):
    return [sum(sizes[row] for row in part) for part in parts]


def fewest_parts(sizes, budget):
    """Count by trying every way to put each group into a part that is there, or a new one."""
    best = len(sizes)

    def place(group, filled):
        nonlocal best
        if len(filled) >= best:
            return
        if group == len(sizes):
            best = len(filled)
            return
        for part, inside in enumerate(filled):
            if inside + sizes[group] <= budget:
                place(group + 1, [*filled[:part], inside + sizes[group], *filled[part + 1 :]])
        place(group + 1, [*filled, sizes[group]])

    place(0, [])
    return best


# Micro-batches of a budget


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 300), st.integers(0, 50))
def test_packed_and_evened_parts_hold_each_group_once_within_the_budget_and_balanced(sizes, budget, more):
    packed = pack(sizes, budget)
    wanted = len(packed) + more
    parts = even_out(packed, sizes, wanted)
    assert sorted(chain(*parts)) == list(range(len(sizes)))
    assert len(parts) == min(wanted, len(sizes))
    assert all(part == sorted(part) for part in parts)

    filled = totals(parts, sizes)
    assert filled == sorted(filled, reverse=True)
    for part, inside in zip(parts, filled, strict=True):
        assert len(part) == 1 or inside <= budget
        assert inside - filled[-1] <= min(sizes[group] for group in part)
    assert not parts or filled[0] - filled[-1] <= max(sizes)
    assert even_out(pack(sizes, budget), sizes, wanted) == parts


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=7), st.integers(1, 60))
def test_packed_parts_are_few(sizes, budget):
    assert len(pack(sizes, budget)) <= (11 * fewest_parts(sizes, budget) + 6) // 9


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(100, 400))
def test_no_two_packed_parts_would_fit_into_one(sizes, budget):
    """So there are less than twice as many as the total needs at least, but for one."""
    filled = sorted(totals(pack(sizes, budget), sizes))
    assert len(filled) == 1 or filled[0] + filled[1] > budget
    assert len(filled) <= 2 * -(-sum(sizes) // budget)


def test_filling_in_order_takes_more_parts():
    sizes = [6, 5, 4, 5, 3, 7]
    assert totals(even_out(pack(sizes, 10), sizes, 3), sizes) == [10, 10, 10]


# Shares of ranks


@settings(max_examples=150, deadline=None)
@given(SIZES, st.integers(1, 6))
def test_dealt_shares_hold_equally_many_rows_and_each_once(sizes, ranks):
    shares = deal(sizes, ranks)
    assert sorted(chain(*shares)) == list(range(len(sizes)))
    assert [len(part) for part in shares] == [len(range(rank, len(sizes), ranks)) for rank in range(ranks)]
    assert all(part == sorted(part) for part in shares)
    assert deal(sizes, ranks) == shares
    if sizes:
        filled = totals(shares, sizes)
        assert max(filled) - min(filled) <= max(sizes)


def test_dealing_by_length_evens_out_what_dealing_in_turns_does_not():
    """Long rows and short ones take turns, so that striding gives one of two ranks all the long ones."""
    sizes = [400 + row if row % 2 == 0 else 20 + row for row in range(32)]
    plain = totals([range(rank, 32, 2) for rank in range(2)], sizes)
    dealt = totals(deal(sizes, 2), sizes)
    assert max(plain) / min(plain) > 10
    assert max(dealt) / min(dealt) < 1.02


def test_a_rank_takes_its_share_by_the_column_of_lengths():
    lengths = [9, 1, 9, 1, 1, 9, 1, 9]
    rows = Dataset.from_dict({"input_ids": [[0] * n for n in lengths], "length": lengths})
    batch = [6, 0, 3, 5]
    shares = [share(batch, row_lengths(rows), rank, 2) for rank in range(2)]
    assert sorted(chain(*shares)) == sorted(batch)
    assert [sum(lengths[row] for row in part) for part in shares] == [10, 10]
    assert all(sorted(part, key=batch.index) == part for part in shares), "in the batch's order"
    assert share(batch, row_lengths(rows), 0, 1) == batch
    # Rows that were picked or moved keep their lengths.
    assert row_lengths(rows.select([5, 1])).tolist() == [9, 1]


@pytest.mark.parametrize("rows", [[{"length": 3}], Dataset.from_dict({"input_ids": [[1], [2, 3]]}), range(4)])
def test_rows_without_known_lengths_are_dealt_in_turns(rows):
    assert row_lengths(rows) is None
    assert [share(range(10, 15), None, rank, 2) for rank in range(2)] == [[10, 12, 14], [11, 13]]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_real_rows_are_dealt_within_a_percent(ranks):
    """Batches of 16 rows a rank, their lengths in characters: the heaviest rank over the mean."""
    if not REAL_ROWS.exists():
        pytest.skip(f"{REAL_ROWS.name} is not here: real data that only the developers' machines have")
    lengths = np.array([sum(map(len, row.values())) for row in json.loads(REAL_ROWS.read_text())])
    plain, dealt = [], []
    order, size = np.random.default_rng(0).permutation(len(lengths)), 16 * ranks
    for start in range(0, len(order) - size + 1, size):
        sizes = lengths[order[start : start + size]].tolist()
        plain.append(_imbalance(totals([range(rank, size, ranks) for rank in range(ranks)], sizes)))
        dealt.append(_imbalance(totals(deal(sizes, ranks), sizes)))
    assert np.mean(dealt) < 1.01
    assert np.mean(plain) > 1.05


def _imbalance(filled):
    return max(filled) * len(filled) / sum(filled)
