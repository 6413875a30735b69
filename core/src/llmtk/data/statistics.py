"""What there is to know of rows before anything is trained on them: how long, how much is learnt, what stands twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llmtk.contract import Dataset
    from llmtk.data.rows import Row


@dataclass(frozen=True)
class Statistics:
    """One split, encoded."""

    lengths: NDArray[np.int64]
    """(rows,): the tokens of each row."""
    targets: int
    """Tokens that the loss is taken on."""

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.lengths.sum())


def statistics(encoded: Dataset) -> Statistics:
    """Count the tokens of encoded rows."""
    lengths, targets = [], 0
    for row in cast("Iterable[Mapping[str, Any]]", encoded):  # `datasets` reads many rows in little more time than one
        parts = list(sequences(row))
        lengths.append(sum(len(ids) for _, ids, _ in parts))
        targets += sum(int(np.count_nonzero(mask)) for _, _, mask in parts)
    return Statistics(np.asarray(lengths, dtype=np.int64), targets)


def sequences(row: Mapping[str, Any]) -> Iterator[tuple[str, Sequence[int], NDArray[np.bool_]]]:
    """Yield the parts of an encoded row: name, token ids (tokens,), and which of them are targets (tokens,).

    Of a document all tokens are targets but the first; of a prompt, none.
    """
    for column in (name for name in row if name.endswith("_ids")):
        ids, name = row[column], column.removesuffix("_ids")
        marked = row.get("targets" if name == "input" else f"{name}_targets")
        if marked is None:
            marked = np.arange(len(ids)) > (0 if name == "input" else len(ids))
        yield name, ids, np.asarray(marked, dtype=bool)


def histogram(lengths: NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (from, up to, rows) of lengths in steps that double, without the empty ones at both ends."""
    steps = np.frexp(np.maximum(lengths, 1))[1]  # 1: 1, 2-3: 2, 4-7: 3
    counts = np.bincount(steps)
    return [(2 ** (step - 1), 2**step - 1, int(counts[step])) for step in range(int(steps.min()), len(counts))]


def repeated(rows: Sequence[Row], known: Sequence[Row] = ()) -> list[tuple[str, str]]:
    """Return the places of rows that stand there a second time, each with the place where they stood first.

    With ``known``, the places of rows that stand among those already.
    """
    first = {_digest(row): row.place for row in reversed(known)}
    found = []
    for row in rows:
        digest = _digest(row)
        if digest in first:
            found.append((row.place, first[digest]))
        elif not known:
            first[digest] = row.place
    return found


def _digest(row: Row) -> bytes:
    content = repr(replace(row, place="")).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()
