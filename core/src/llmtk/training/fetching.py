"""Rows fetched by index, those of the coming batches ahead, while a step is computed.

By threads, not by processes: rows are tokens already, most of them in Arrow tables, and what there is to wait for is a
disk, or a data set of a stage's own that does more. Which rows come is known beforehand, so that fetching ahead changes
nothing of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtk.contract import Dataset, Row

AHEAD = 2
"""Batches that each worker has in hand, as in torch's DataLoader."""


class Fetcher:
    """Fetches rows of one data set. With `workers`, coming batches too; without, when they are wanted."""

    def __init__(self, rows: Dataset, workers: int = 0) -> None:
        self.batches = AHEAD * workers
        """Coming batches to name in `fetch`."""
        self._rows = rows
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="rows") if workers else None
        self._coming: dict[tuple[int, ...], Future[list[Row]]] = {}

    def fetch(self, indices: Sequence[int], coming: Iterable[Sequence[int]] = ()) -> list[Row]:
        """Return rows, and begin with those that come next. What was begun and is no longer to come is let go."""
        begun = self._coming.pop(tuple(indices), None)
        if self._pool is not None:
            keys = [tuple(batch) for batch in coming]
            self._coming = {key: self._coming.get(key) or self._pool.submit(self._read, key) for key in keys}
        return self._read(indices) if begun is None else begun.result()

    def close(self) -> None:
        """Wait for nothing more."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, indices: Sequence[int]) -> list[Row]:
        # `datasets` reads many rows in little more time than one.
        many = getattr(self._rows, "__getitems__", None)
        return many(list(indices)) if many and indices else [self._rows[index] for index in indices]
