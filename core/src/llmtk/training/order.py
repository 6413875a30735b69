"""Which rows come next: a pure function of (seed, epoch, index), so that a resumed run need not replay anything.

And which of them are a rank's share: a function of the rows' lengths too, the same on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llmtk.errors import ConfigurationError, PluginError
from llmtk.training.balance import deal

if TYPE_CHECKING:
    from llmtk.config.run_config import RunConfig
    from llmtk.config.sections import TrainConfig
    from llmtk.contract import Data, Dataset
    from llmtk.host.hooks import Hooks
    from llmtk.training.stream import StreamedRows

Order = Callable[[int], Sequence[int] | None]
"""An epoch's order as indices, or None for the usual one."""
Lengths = np.ndarray[Any, np.dtype[np.integer[Any]]]
Mixture = Sequence[tuple[int, float]]
"""(rows, weight) of each source, in the order of the rows."""
_NO_EPOCH = 2**63
"""A number that no epoch has, for what is drawn once."""
Arrange = Callable[[Any], Any]
"""Puts an epoch's usual order (rows,) in another one."""
MEGABATCHES = 50
"""Batches, at most, among whose rows those of about equal length are brought together."""


@dataclass
class Cursor:
    """A position in the data: the epoch, and how many of its rows are consumed, over all ranks."""

    epoch: int = 0
    consumed: int = 0
    block: int = 0
    """Of a stream: the block, and how many of its rows are consumed."""
    row: int = 0


class RowOrder:
    """Takes row indices, epoch after epoch, each epoch in an order of its own.

    `mixture` is as in `llmtk.contract.Data`; without it each row comes once an epoch. No plugin orders a mixture.
    `arrange` puts the usual order in another.
    """

    def __init__(
        self,
        rows: int,
        seed: int,
        order: Order = lambda epoch: None,
        arrange: Arrange = lambda usual: usual,
        mixture: Mixture = (),
    ) -> None:
        self.rows = sum(rows_taken(*part) for part in mixture) if mixture else rows
        """Rows of an epoch."""
        self._mixture = mixture
        self.cursor = Cursor()
        self._seed = seed
        self._order = order
        self._arrange = arrange
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

    def ahead(self, count: int, batches: int) -> list[list[int]]:
        """Return the next global batches without taking them: so many of `count` rows, but none of another epoch.

        None of an epoch that is not begun either, whose order a plugin may not know yet.
        """
        if self._epoch_order is None or self._epoch_order[0] != self.cursor.epoch:
            return []
        at, order = self.cursor.consumed, self._epoch_order[1]
        starts = range(at, min(at + count * batches, self.rows), count)
        return [[int(index) for index in order[start : start + count]] for start in starts]

    def usual(self, epoch: int) -> Any:
        """Return the order (rows,) of an epoch that no plugin orders."""
        order = shuffled(self.rows, self._seed, epoch)
        return self._arrange(mixed(self._mixture, self._seed, epoch)[order] if self._mixture else order)

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            order = self._order(epoch)
            self._epoch_order = (epoch, self.usual(epoch) if order is None else self._check(order))
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


def rows_taken(rows: int, weight: float) -> int:
    """Return how many rows an epoch takes from a source of so many: each `weight` times."""
    return max(1, round(rows * weight)) if rows else 0


def mixed(mixture: Mixture, seed: int, epoch: int) -> Any:
    """Return the row indices of an epoch of a mixture, source by source.

    A source's rows stand in a circle, in an order drawn from the seed alone, and an epoch takes the next
    `rows * weight` of it. So a row comes `weight` times an epoch, and none a third time before all came twice.
    """
    parts, start = [], 0
    for number, (rows, weight) in enumerate(mixture):
        count = rows_taken(rows, weight)
        circle = start + shuffled(rows, seed, _NO_EPOCH + number)
        parts.append(circle[np.arange(epoch * count, (epoch + 1) * count) % max(rows, 1)])
        start += rows
    return np.concatenate(parts)


def row_order(config: RunConfig, data: Data, seed: int, batch: int, hooks: Hooks) -> RowOrder | StreamedRows:
    """Return the order of a run's rows, in global batches of `batch`; a stream has its own.

    ConfigurationError where nobody can order them as is asked: rows to be grouped by a length that they do not have, or
    a plugin beside a stream, sources with weights or groups, which it would pass over.
    """
    others = {
        "data.streaming": config.data.streaming,
        "sources with weights (data.train)": bool(data.mixture),
        "train.group_by_length": config.train.group_by_length,
    }
    asked = [name for name, given in others.items() if given]
    if asked and hooks.answered("order_examples"):
        raise ConfigurationError(f"{asked[0]}: a plugin orders the rows of this run; leave one of them out")
    if config.data.streaming:
        return cast("StreamedRows", data.train)
    if not config.train.group_by_length:
        return RowOrder(len(data.train), seed, hooks.order_examples, mixture=data.mixture)
    lengths = _lengths_to_group_by(config.train, data.train)
    return RowOrder(
        len(data.train), seed, mixture=data.mixture, arrange=lambda usual: grouped_by_length(usual, lengths, batch)
    )


def _lengths_to_group_by(config: TrainConfig, rows: Dataset) -> Lengths:
    lengths = row_lengths(rows, config.length_column_name)
    if lengths is None:
        has = ", ".join(getattr(rows, "column_names", ())) or "none"
        raise ConfigurationError(
            f"train.group_by_length: this run's rows have no column {config.length_column_name!r}; they have {has}. "
            f"Where all rows are equally long, as blocks of text are, leave it out"
        )
    return lengths


def grouped_by_length(order: Any, lengths: Lengths, batch: int) -> Any:
    """Return an order (rows,) in which the rows of a batch are of about equal length, as transformers' Trainer has it.

    Rows are sorted, the longest first, within stretches of up to 50 batches, so that much of the order stays random.
    The longest row of all comes first: what does not fit into memory shows at once.
    """
    stretch = batch * max(1, min(len(order) // (4 * batch), MEGABATCHES))
    parts = [order[start : start + stretch] for start in range(0, len(order), stretch)]
    parts = [part[np.argsort(-lengths[part], kind="stable")] for part in parts]
    longest = int(np.argmax([lengths[part[0]] for part in parts]))
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    return np.concatenate(parts)


def row_lengths(rows: Dataset, column: str = "length") -> Lengths | None:
    """(rows,): the tokens of each row, from one column alone; None for rows without such a column."""
    data: Any = rows
    if column not in getattr(data, "column_names", ()):
        return None
    return np.asarray(data[column][:])


def share(indices: Sequence[int], lengths: Lengths | None, rank: int, ranks: int) -> list[int]:
    """Return a rank's part of a global batch, in the batch's order: by length, or in turns where lengths are unknown.

    Either way all ranks have equally many rows, but for one more on the first ones.
    """
    if lengths is None or ranks == 1:
        return list(indices[rank::ranks])
    sizes = lengths[np.asarray(indices, dtype=np.int64)].tolist()
    return [indices[position] for position in deal(sizes, ranks)[rank]]
