"""Rows that are read as they go: their order, and the rows themselves.

Blocks come in the order of the data, each shuffled by (seed, epoch, block). A position is a block and a row in it, so
that a resumed run passes over the blocks before it, and goes on with the same row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtk.errors import ConfigurationError, DatasetError, NothingLeft
from llmtk.training.order import Cursor

if TYPE_CHECKING:
    from llmtk.contract import Dataset, Row
    from llmtk.data import Row as DataRow
    from llmtk.run import Run

Blocks = Callable[[int], Iterator["Dataset"]]
"""The encoded blocks of an epoch, from a block's number on."""


class StreamedRows:
    """Takes rows from blocks, epoch after epoch. An index is a row's place in what was taken last."""

    rows = 0
    """Rows of an epoch: not known."""

    def __init__(self, blocks: Blocks, seed: int) -> None:
        self._open = blocks
        self._seed = seed
        self._taken: list[Row] = []
        self.cursor = Cursor()

    def __len__(self) -> int:
        """Return 0: how many there are is not known."""
        return self.rows

    def __getitem__(self, index: int) -> Row:
        return self._taken[index]

    @property
    def cursor(self) -> Cursor:
        """The position. Setting it opens the data there when the next rows are taken."""
        return self._cursor

    @cursor.setter
    def cursor(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._blocks: Iterator[Dataset] | None = None
        self._block: Dataset | None = None

    @property
    def epochs(self) -> float:
        """How many epochs are consumed; no fraction is known."""
        return float(self._cursor.epoch)

    def take(self, count: int, *, cross: bool = False) -> list[int]:
        """Take the next `count` rows. Unless told to cross, an epoch's last batch may be smaller."""
        self._taken = []
        while len(self._taken) < count:
            epoch = self._cursor.epoch
            self._take_from_block(count - len(self._taken))
            if self._cursor.epoch > epoch and not cross:
                break
        return list(range(len(self._taken)))

    def ahead(self, count: int, batches: int) -> list[list[int]]:
        """Return no coming batches: they are not read yet."""
        return []

    def _take_from_block(self, count: int) -> None:
        block, cursor = self._current(), self._cursor
        order = shuffled_block(len(block), self._seed, cursor.epoch, cursor.block)
        part = order[cursor.row : cursor.row + count]
        self._taken += [block[int(index)] for index in part]
        cursor.consumed += len(part)
        cursor.row += len(part)
        if cursor.row >= len(block):
            self._next_block()

    def _current(self) -> Dataset:
        if self._block is None:
            self._blocks = self._open(self._cursor.block)
            self._block = next(self._blocks, None)
        if self._block is None:
            raise DatasetError("data.train ends before the place that the run goes on from: the data has changed")
        return self._block

    def _next_block(self) -> None:
        """Go to the next block that has rows, or from the last one to the next epoch."""
        assert self._blocks is not None
        for number, block in enumerate(self._blocks, start=self._cursor.block + 1):
            if len(block):
                self._block, self._cursor = block, replace(self._cursor, block=number, row=0)
                return
        self.cursor = Cursor(self._cursor.epoch + 1)


def shuffled_block(rows: int, seed: int, epoch: int, block: int) -> Any:
    """Return the order of a block: a permutation drawn from (seed, epoch, block) alone."""
    generator = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64), counter=[0, 0, 0, block + 1])
    return np.random.Generator(generator).permutation(rows)


def stream(run: Run) -> StreamedRows:
    """Return the run's training data as a stream."""
    from llmtk.data.stream import stream_blocks

    def blocks(skip: int) -> Iterator[Dataset]:
        opened = stream_blocks(run.config.data, run.stage.row_types, run.notify, skip)
        for number, rows in enumerate(opened):
            # What is cut or left out is said of one block; of all it would be a line a block.
            with run.speaking_of("data.train"), _silent(run) if number else nullcontext():
                encoded = _encoded(run, rows, is_first=skip + number == 0)
            yield encoded

    return StreamedRows(blocks, run.data_seed)


def _encoded(run: Run, rows: list[DataRow], *, is_first: bool) -> Dataset:
    """Return a block as the stage encodes it. One of which nothing is left is empty, but for the first of an epoch."""
    try:
        return run.stage.encode_rows(run, rows)
    except NothingLeft:
        if is_first:
            raise
        return []


@contextmanager
def _silent(run: Run) -> Iterator[None]:
    speaks, run.console.speaks = run.console.speaks, False
    try:
        yield
    finally:
        run.console.speaks = speaks


def check_streaming(run: Run) -> None:
    """Refuse what needs all rows before the first step (ConfigurationError), and sources that are not there."""
    from llmtk.contract import Stage
    from llmtk.data.stream import check_stream

    config = run.config
    if config.train.max_steps < 1:
        raise ConfigurationError("data.streaming needs train.max_steps: how long an epoch is is not known")
    needing = {
        "train.precompute_reference": config.train.precompute_reference,
        "train.group_by_length": config.train.group_by_length,
        "train.dataloader_num_workers": config.train.dataloader_num_workers > 0,
        "model.tokenizer, trained on the data,": not isinstance(config.model.tokenizer, str | None),
        f"stage {run.stage_name}": type(run.stage).build_data is not Stage.build_data,
    }
    for name, needs in needing.items():
        if needs:
            raise ConfigurationError(
                f"data.streaming: {name} needs all rows before the first step; leave one of them out"
            )
    check_stream(config.data)
