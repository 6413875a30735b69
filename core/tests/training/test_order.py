"""The order of rows: each once an epoch, whatever the batch and the ranks, and a pure function of its seed."""

from __future__ import annotations

import time
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.trainer_pt_utils import get_length_grouped_indices

from llmtk import ConfigurationError, PluginError, hookimpl
from llmtk.run import Interrupted
from llmtk.training.order import Cursor, RowOrder, grouped_by_length, shuffled

from .kit import Lm, assert_same_run, make


def take_epoch(order: RowOrder, count: int) -> list[list[int]]:
    epoch, batches = order.cursor.epoch, []
    while order.cursor.epoch == epoch:
        batches.append(order.take(count))
    return batches


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 4))
def test_an_epoch_has_every_row_once_over_all_ranks(rows, count, ranks):
    order = RowOrder(rows, seed=3)
    for _ in range(3):
        batches = take_epoch(order, count)
        assert [len(batch) for batch in batches[:-1]] == [count] * (len(batches) - 1)
        assert len(batches) == -(-rows // count)
        by_rank = [index for batch in batches for rank in range(ranks) for index in batch[rank::ranks]]
        assert sorted(by_rank) == list(range(rows))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(shuffled(30, seed, epoch)) for seed in (0, 1, -1, 2**64 - 2) for epoch in (0, 1)}
    assert len(orders) == 8
    assert all(sorted(order) == list(range(30)) for order in orders)


def test_every_order_of_three_rows_comes_equally_often():
    counts = Counter(tuple(shuffled(3, 0, epoch)) for epoch in range(6000))
    assert len(counts) == 6
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 25.7  # 5 degrees of freedom, 1 in 10,000


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20), st.lists(st.tuples(st.integers(1, 15), st.booleans()), max_size=12), st.data())
def test_an_order_goes_on_from_a_cursor_alone(rows, takes, data):
    order = RowOrder(rows, seed=1)
    stop = data.draw(st.integers(0, len(takes)))
    for count, cross in takes[:stop]:
        order.take(count, cross=cross)
    again = RowOrder(rows, seed=1)
    again.cursor = Cursor(order.cursor.epoch, order.cursor.consumed)
    for count, cross in takes[stop:]:
        assert again.take(count, cross=cross) == order.take(count, cross=cross)
    assert again.epochs == order.epochs


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(1, 25), min_size=1, max_size=5))
def test_draws_cross_epochs_without_loss(rows, counts):
    order = RowOrder(rows, seed=5)
    drawn = [index for count in counts for index in order.take(count, cross=True)]
    endless = [int(index) for epoch in range(sum(counts) // rows + 1) for index in shuffled(rows, 5, epoch)]
    assert drawn == endless[: sum(counts)]
    assert order.epochs == pytest.approx(sum(counts) / rows)


def test_a_plugin_may_order_some_epochs():
    order = RowOrder(4, 0, lambda epoch: [3, 1, 0, 2] if epoch == 1 else None)
    epochs = [take_epoch(order, 3) for _ in range(3)]
    assert epochs[1] == [[3, 1, 0], [2]]
    for epoch in (0, 2):
        assert list(chain(*epochs[epoch])) == list(shuffled(4, 0, epoch))


@pytest.mark.parametrize("answer", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 2, 4], [0, 1, 2, 3, 3], []])
def test_an_order_that_is_no_permutation_is_refused(answer):
    with pytest.raises(PluginError, match=f"all 4 rows, each once; it gave {len(answer)}"):
        RowOrder(4, 0, lambda epoch: answer).take(1)


# -- mixtures -----------------------------------------------------------------------------------------------------


def test_each_row_comes_as_often_as_its_source_weighs():
    order = RowOrder(9, seed=5, mixture=[(4, 2.0), (5, 0.4)])
    assert order.rows == 10
    counts = Counter()
    for epoch in range(5):
        rows = [index for batch in take_epoch(order, 3) for index in batch]
        assert Counter(rows)[0] == 2, f"epoch {epoch}"
        assert sum(index >= 4 for index in rows) == 2
        counts.update(rows)
    assert [counts[index] for index in range(9)] == [10] * 4 + [2] * 5


def test_a_fraction_of_a_source_changes_from_epoch_to_epoch():
    order = RowOrder(6, seed=0, mixture=[(6, 0.5)])
    first, second, third = ({index for batch in take_epoch(order, 2) for index in batch} for _ in range(3))
    assert first | second == set(range(6))
    assert first == third


def test_a_mixture_is_a_pure_function_of_seed_and_epoch():
    def take(seed, epoch):
        order = RowOrder(9, seed=seed, mixture=[(4, 1.5), (5, 1.0)])
        order.cursor = Cursor(epoch, 3)
        return order.take(4)

    assert take(1, 2) == take(1, 2)
    assert len({tuple(take(seed, epoch)) for seed in (1, 2) for epoch in (2, 3)}) == 4


# Grouped by length


@pytest.mark.parametrize(("rows", "batch"), [(1, 4), (7, 2), (50, 3), (2000, 8)])
def test_groups_of_about_equal_length_are_those_of_transformers(monkeypatch, rows, batch):
    lengths = np.random.default_rng(rows).integers(1, 40, rows)
    order = shuffled(rows, 5, 0)
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(order))
    assert list(grouped_by_length(order, lengths, batch)) == get_length_grouped_indices(lengths.tolist(), batch)


def test_batches_grouped_by_length_waste_little():
    lengths = np.random.default_rng(0).integers(1, 100, 4000)

    def padding(order):
        batches = [lengths[np.asarray(order[start : start + 8])] for start in range(0, 4000, 8)]
        return sum(int(batch.max() * len(batch) - batch.sum()) for batch in batches)

    usual = RowOrder(4000, 3).take(4000)
    grouped = RowOrder(4000, 3, arrange=lambda order: grouped_by_length(order, lengths, 8)).take(4000)
    assert sorted(grouped) == sorted(usual)
    assert padding(grouped) < padding(usual) / 10


@pytest.mark.parametrize("by_length", [False, True])
def test_an_order_goes_on_in_the_middle_of_a_million_rows_at_once(by_length):
    lengths = np.random.default_rng(0).integers(1, 100, 1_000_000)
    order = RowOrder(1_000_000, 3)
    if by_length:
        order = RowOrder(1_000_000, 3, arrange=lambda usual: grouped_by_length(usual, lengths, 64))
    order.cursor = Cursor(4, 900_000)
    began = time.perf_counter()
    order.take(64)
    assert time.perf_counter() - began < 1


LONG_AND_SHORT = [{"text": "x" * (3 + 7 * i % 40)} for i in range(48)]
PAIRS = {"rows": LONG_AND_SHORT, "group_by_length": True, "per_device_train_batch_size": 2}


class Watch:
    """Keeps the lengths of the rows of each window, and stops half-way if asked to."""

    name = "watch"

    def __init__(self, stops=False):
        self.seen, self.stops = [], stops

    @hookimpl
    def extra_metrics(self, run, window):
        self.seen.append(window.segment_lengths.tolist())

    @hookimpl
    def step_finished(self, run, step):
        if self.stops and step.step == 3:
            run.ask_to_stop(15)


def test_a_run_grouped_by_length_goes_on_to_the_bit(tmp_path):
    settings = PAIRS | {"max_steps": 24, "logging_steps": 1}
    watch = Watch()
    whole = make(tmp_path / "whole", plugins=[watch], **settings)
    whole.train()
    assert max(max(lengths) for lengths in watch.seen) == max(watch.seen[0])
    spread = [max(lengths) - min(lengths) for lengths in watch.seen]
    usual = Watch()
    make(tmp_path / "usual", plugins=[usual], **settings | {"group_by_length": False}).train()
    assert sum(spread) < sum(max(lengths) - min(lengths) for lengths in usual.seen)
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", plugins=[Watch(stops=True)], **settings).train()
    parts = make(tmp_path / "parts", plugins=[Watch()], resume="auto", **settings)
    parts.train()
    assert_same_run(whole, parts)


class Priced(Lm):
    """Its rows have a column of their own."""

    def encode_rows(self, run, rows):
        encoded = super().encode_rows(run, rows)
        return encoded.add_column("cost", [-length for length in encoded["length"]])


def test_rows_are_grouped_by_another_column(tmp_path):
    watch = Watch()
    settings = PAIRS | {"length_column_name": "cost", "max_steps": 24}
    make(tmp_path / "run", Priced, plugins=[watch], **settings).train()
    assert min(min(lengths) for lengths in watch.seen) == min(watch.seen[0])
    with pytest.raises(ConfigurationError, match="have no column 'cost'; they have input_ids, length, place"):
        make(tmp_path / "other", plugins=[watch], **settings).train()


class Sorts:
    name = "sorts"

    @hookimpl
    def order_examples(self, run, epoch):
        return list(range(48))


def test_what_would_not_be_grouped_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="a plugin orders the rows"):
        make(tmp_path / "a", rows=LONG_AND_SHORT, group_by_length=True, plugins=[Sorts()]).train()
    with pytest.raises(ConfigurationError, match="length_column_name is used by group_by_length"):
        make(tmp_path / "b", length_column_name="cost")
    with pytest.raises(ConfigurationError, match="have no column 'length'; they have none"):
        make(tmp_path / "c", "pt", group_by_length=True).train()
