"""Cutting windows, for one rank and for several that run side by side in threads."""

from __future__ import annotations

import threading
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtk import Batch, Group, Sequence
from llmtk.training.micro_batches import cut_window


class Rank:
    """A rank of several: what `Backend` offers to `cut_window`, over a barrier of threads."""

    device = torch.device("cpu")

    def __init__(self, rank, shared, barrier):
        self.rank, self._shared, self._barrier = rank, shared, barrier

    def gather(self, value):
        self._shared[self.rank] = value
        self._barrier.wait(10)
        values = list(self._shared)
        self._barrier.wait(10)
        return values

    def broadcast(self, value, source=0):
        return self.gather(value)[source]

    def to_device(self, batch):
        return batch.to(self.device)


def on_ranks(function, ranks):
    """Run `function(backend)` on each rank; a rank that does not come to a collective call fails them all."""
    shared, barrier, answers = [None] * ranks, threading.Barrier(ranks), [None] * ranks

    def work(rank):
        try:
            answers[rank] = function(Rank(rank, shared, barrier))
        except BaseException as error:
            barrier.abort()
            answers[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors := [answer for answer in answers if isinstance(answer, BaseException)]:
        raise errors[0]
    return answers


def window(lengths, first=0) -> Batch:
    groups = []
    for index, length in enumerate(lengths, first):
        targets = [False] + [True] * (length - 1)
        groups.append(Group([Sequence([index] * length, targets)], {"tokens": length - 1, "rows": 1}, place=f"{index}"))
    return Batch.collate(groups)


def places(cut, counting=True) -> list[list[str]]:
    return [part.batch.places for part in cut.parts if part.counts == counting]


def cut_alone(lengths, **how):
    return on_ranks(lambda backend: cut_window(window(lengths), backend, **{"rows": 99} | how), 1)[0]


def test_by_rows():
    cut = cut_alone([3, 2, 4, 2, 5], rows=2)
    assert places(cut) == [["0", "1"], ["2", "3"], ["4"]]
    assert cut.totals == {"rows": 5, "tokens": 11}
    assert (cut.groups, cut.tokens) == (5, 16)


def test_by_a_budget_of_tokens_filled_to_the_brim():
    assert sorted(places(cut_alone([3, 4, 2, 1, 5], tokens=5))) == [["0", "2"], ["1", "3"], ["4"]]


def test_by_a_budget_the_parts_are_about_equal_and_the_largest_comes_first():
    cut = cut_alone([1, 1, 1, 6, 1, 1, 1], tokens=7)
    assert [len(part.batch.tokens) for part in cut.parts] == [6, 6]
    cut = cut_alone([2, 2, 2, 5], tokens=5)
    assert [len(part.batch.tokens) for part in cut.parts] == [5, 4, 2]


def test_a_group_over_the_budget_stands_alone_and_comes_first():
    assert places(cut_alone([2, 9, 2, 8], tokens=4)) == [["1"], ["3"], ["0", "2"]]


def test_a_rank_deals_its_groups_into_as_many_parts_as_another_needs():
    """Not by halving what it would have cut alone."""
    lengths = [[9, 9, 9], [4, 4, 1, 1, 1, 1]]
    cuts = on_ranks(lambda b: cut_window(window(lengths[b.rank]), b, rows=9, tokens=12), 2)
    assert [[len(part.batch.tokens) for part in cut.parts] for cut in cuts] == [[9, 9, 9], [4, 4, 4]]
    lengths = [[1] * 9, [1] * 6]
    cuts = on_ranks(lambda b: cut_window(window(lengths[b.rank]), b, rows=3), 2)
    assert [[len(part.batch) for part in cut.parts] for cut in cuts] == [[3, 3, 3], [2, 2, 2]]


def test_parts_say_which_groups_they_hold():
    whole = window([2, 5, 2, 5, 3])
    for how in ({"tokens": 6}, {"rows": 2}):
        for part in cut_alone([2, 5, 2, 5, 3], **how).parts:
            assert [whole.places[group] for group in part.groups] == part.batch.places


def test_the_budget_counts_shared_prefixes_once():
    pair = Group([Sequence([1, 1], [True, True], 0)] * 2, {}, prefixes=[[5] * 6])
    whole = Batch.collate([pair, pair])
    assert len(on_ranks(lambda b: cut_window(whole, b, rows=9, tokens=20), 1)[0].parts) == 1
    assert len(on_ranks(lambda b: cut_window(whole, b, rows=9, tokens=19), 1)[0].parts) == 2


def test_an_empty_window_on_every_rank_has_no_parts():
    assert all(cut.parts == [] for cut in on_ranks(lambda b: cut_window(window([]), b, rows=2), 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=7), min_size=1, max_size=4).filter(any),
    st.integers(1, 4),
    st.none() | st.integers(1, 12),
)
def test_ranks_have_equally_many_parts_and_every_row_counts_once(lengths, rows, tokens):
    windows = [window(part, first=100 * rank) for rank, part in enumerate(lengths)]
    cuts = on_ranks(lambda b: cut_window(windows[b.rank], b, rows=rows, tokens=tokens), len(lengths))

    assert len({len(cut.parts) for cut in cuts}) == 1
    for rank, cut in enumerate(cuts):
        counted = list(chain(*places(cut)))
        assert (counted if tokens is None else sorted(counted, key=int)) == windows[rank].places
        assert all(len(part.batch) >= 1 for part in cut.parts)
        if tokens is None:
            assert all(len(part.batch) <= rows for part in cut.parts)
        else:
            assert all(len(part.batch) == 1 or len(part.batch.tokens) <= tokens for part in cut.parts)
        assert cut.totals == {"tokens": sum(n - 1 for part in lengths for n in part), "rows": sum(map(len, lengths))}
        assert cut.groups == sum(map(len, lengths))
        assert cut.tokens == sum(map(sum, lengths))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=3), st.integers(1, 3), st.none() | st.integers(1, 8))
def test_a_rank_splits_before_it_repeats(counts, rows, tokens):
    """A part that counts nothing is there only when each of the others is one row already."""
    cuts = on_ranks(lambda b: cut_window(window([2] * counts[b.rank]), b, rows=rows, tokens=tokens), len(counts))
    for cut in cuts:
        if places(cut, counting=False):
            assert all(len(part) == 1 for part in places(cut))


def test_a_rank_without_rows_borrows_the_smallest_part_of_another():
    lengths = [[], [7, 2], []]
    cuts = on_ranks(lambda b: cut_window(window(lengths[b.rank]), b, rows=1), 3)
    assert [places(cut) for cut in cuts] == [[], [["0"], ["1"]], []]
    assert [places(cut, counting=False) for cut in cuts] == [[["1"], ["1"]], [], [["1"], ["1"]]]


@pytest.mark.parametrize("lengths", [[[2, 2, 2], [2]], [[2], [2, 2, 2]]])
def test_a_rank_with_too_few_rows_repeats_its_own(lengths):
    cuts = on_ranks(lambda b: cut_window(window(lengths[b.rank], first=10 * b.rank), b, rows=1), 2)
    short = cuts[[len(part) for part in lengths].index(1)]
    assert len(short.parts) == 3
    assert places(short, counting=False) == places(short) * 2
