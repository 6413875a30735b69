"""Rows fetched ahead: by other threads, the same ones, and the same runs; batches through pinned memory."""

from __future__ import annotations

import threading
from itertools import chain

import pytest
import torch

from llmtk import ConfigurationError, Data
from llmtk.config.sections import TrainConfig
from llmtk.training.backend import Backend
from llmtk.training.fetching import Fetcher
from llmtk.training.order import RowOrder

from .kit import Lm, assert_same_run, make
from .test_resume import GPT2_DROPOUT, Draws


class Watched:
    """Rows that remember who asked for them."""

    def __init__(self, rows):
        self.rows, self.asked = rows, []
        self.come = threading.Event()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.asked.append((index, threading.current_thread().name))
        self.come.set()
        return self.rows[index]


def test_coming_rows_are_fetched_by_other_threads_before_they_are_wanted():
    rows = Watched([{"row": index} for index in range(20)])
    fetcher = Fetcher(rows, workers=1)
    assert fetcher.batches == 2
    assert fetcher.fetch([3, 4], coming=[[5, 6], [7, 8]]) == [{"row": 3}, {"row": 4}]
    for future in fetcher._coming.values():
        future.result(timeout=10)
    asked = list(rows.asked)
    assert {index for index, _ in asked} == {3, 4, 5, 6, 7, 8}
    assert all(name.startswith("rows") == (index > 4) for index, name in asked)
    assert fetcher.fetch([5, 6], coming=[[7, 8], [9, 10]]) == [{"row": 5}, {"row": 6}]
    for future in fetcher._coming.values():
        future.result(timeout=10)
    assert [index for index, _ in rows.asked[len(asked) :]] == [9, 10]  # 5 to 8 were there
    # Others than foreseen are fetched all the same.
    assert fetcher.fetch([15]) == [{"row": 15}]
    assert not fetcher._coming
    fetcher.close()


def test_an_error_in_a_row_is_raised_where_the_row_is_wanted():
    class Broken(Watched):
        def __getitem__(self, index):
            if index == 5:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    fetcher = Fetcher(Broken(list(range(9))), workers=2)
    assert fetcher.fetch([3], coming=[[4], [5]]) == [3]
    assert fetcher.fetch([4], coming=[[5]]) == [4]
    with pytest.raises(OSError, match="the disk is gone"):
        fetcher.fetch([5])
    fetcher.close()


def test_the_order_looks_ahead_within_an_epoch_that_is_begun():
    asked = []
    order = RowOrder(10, 0, lambda epoch: asked.append(epoch))
    assert order.ahead(4, 2) == []
    first = order.take(4)
    ahead = order.ahead(4, 5)
    assert [len(batch) for batch in ahead] == [4, 2]
    assert [order.take(4), order.take(4)] == ahead
    assert sorted([*first, *chain(*ahead)]) == list(range(10))
    assert order.ahead(4, 2) == []
    assert asked == [0]


@pytest.mark.parametrize("settings", [{}, {"stage": Draws, "model": GPT2_DROPOUT}], ids=["plain", "draws"])
def test_a_run_that_fetches_ahead_is_the_same_run(tmp_path, settings):
    runs = [
        make(tmp_path / str(workers), dataloader_num_workers=workers, max_steps=7, logging_steps=1, **settings)
        for workers in (0, 2)
    ]
    for run in runs:
        run.train()
    assert_same_run(*runs)


class Lazy(Lm):
    """Trains on rows that are watched."""

    def build_data(self, run):
        data = super().build_data(run)
        self.watched = Watched(data.train)
        return Data(self.watched, data.eval)


def test_workers_fetch_for_a_run(tmp_path):
    names = {}
    for workers in (0, 1):
        run = make(tmp_path / str(workers), Lazy, dataloader_num_workers=workers, max_steps=3)
        run.train()
        names[workers] = {name for _, name in run.stage.watched.asked}
    assert names[0] == {threading.current_thread().name}
    assert any(name.startswith("rows") for name in names[1])


# Pinned memory


def test_batches_are_pinned_where_there_is_a_cuda_device(monkeypatch):
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        from llmtk.training import backend

        assert backend._pins_memory(TrainConfig()) is available
        assert backend._pins_memory(TrainConfig(dataloader_pin_memory=False)) is False


def test_pinning_without_a_device_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="batches are pinned for copies to a CUDA device"):
        Backend(TrainConfig(bf16=False, dataloader_pin_memory=True))


@pytest.mark.parametrize("pins", [True, False])
def test_micro_batches_are_pinned_before_they_are_moved(tmp_path, monkeypatch, pins):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    run = make(tmp_path / "run", max_steps=1)
    run._set_up()
    run.backend.pins_memory = pins
    run.train()
    assert bool(pinned) is pins
