"""Which rows come next: a pure function of (seed, epoch, index), so that a resumed run need not replay anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmtk.errors import PluginError

Order = Callable[[int], Sequence[int] | None]
"""An epoch's order as indices, or None for the usual one."""


@dataclass
class Cursor:
    """A position in the data: the epoch, and how many of its rows are consumed, over all ranks."""

    epoch: int = 0
    consumed: int = 0


class RowOrder:
    """Takes row indices, epoch after epoch, each epoch in an order of its own."""

    def __init__(self, rows: int, seed: int, order: Order = lambda epoch: None) -> None:
        self.rows = rows
        self.cursor = Cursor()
        self._seed = seed
        self._order = order
        self._epoch_order: tuple[int, Sequence[int]] | None = None

    @property
    def epochs(self) -> float:
        """How many epochs are consumed, with the fraction."""
        return self.cursor.epoch + self.cursor.consumed / self.rows

    def take(self, count: int, *, cross: bool = False) -> list[int]:
        """Take the next `count` indices. Unless told to cross, an epoch's last batch may be smaller."""
        taken: list[int] = []
        while len(taken) < count:
            order = self._order_of(self.cursor.epoch)
            part = order[self.cursor.consumed : self.cursor.consumed + count - len(taken)]
            taken += [int(index) for index in part]
            self.cursor.consumed += len(part)
            if self.cursor.consumed >= self.rows:
                self.cursor = Cursor(self.cursor.epoch + 1)
            if not cross:
                break
        return taken

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = self._order(epoch)
            self._epoch_order = (epoch, shuffled(self.rows, self._seed, epoch) if order is None else self._check(order))
        return self._epoch_order[1]

    def _check(self, order: Sequence[int]) -> Sequence[int]:
        if sorted(order) != list(range(self.rows)):
            raise PluginError(
                f"order_examples must order all {self.rows} rows, each once; it gave {len(order)} indices"
            )
        return order


def shuffled(rows: int, seed: int, epoch: int) -> Any:
    """Return the usual order of an epoch: a permutation drawn from (seed, epoch) alone."""
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(rows)
