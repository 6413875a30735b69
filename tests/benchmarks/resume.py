"""What it costs to go on at row 999,000 of a million: by llmtk's order, and by a loader that replays, side by side.

    python tests/benchmarks/resume.py [--rows 1000000] [--rounds 3]

llmtk draws an epoch's order from (seed, epoch) and goes to the place; the other way is Accelerate's
`skip_first_batches` over torch's DataLoader, which draws the order and reads none of the skipped rows either, and the
plainest one, which reads them all. Rows are of 16 tokens, in a table of Arrow's. Printed are the seconds to the first
batch of 8.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from accelerate import skip_first_batches
from datasets import Dataset
from torch.utils.data import DataLoader, RandomSampler

from llmtk.training.order import Cursor, RowOrder

BATCH = 8


def main() -> None:
    """Measure all ways turn about, and print their medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = table(options.rows)
    skipped = (options.rows - 1000) // BATCH * BATCH
    ways: dict[str, Callable[[], Any]] = {
        "llmtk": lambda: ours(rows, skipped),
        "skip_first_batches": lambda: next(iter(skip_first_batches(loader(rows), skipped // BATCH))),
        "reading all": lambda: replayed(rows, skipped // BATCH),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way, go_on in ways.items():
            began = time.perf_counter()
            go_on()
            seconds[way].append(time.perf_counter() - began)
    for way, found in seconds.items():
        print(f"{way:20} {statistics.median(found):8.3f} s to the batch behind row {skipped:,}")


def table(rows: int) -> Dataset:
    """Return rows of 16 tokens."""
    tokens = pa.array(np.arange(16 * rows, dtype=np.int32) % 1000)
    return Dataset(pa.table({"input_ids": pa.FixedSizeListArray.from_arrays(tokens, 16)}))


def ours(rows: Dataset, skipped: int) -> list[Any]:
    """Go on as a run that resumes does."""
    order = RowOrder(len(rows), seed=1)
    order.cursor = Cursor(0, skipped)
    return [rows[index] for index in order.take(BATCH)]


def loader(rows: Dataset) -> Any:
    """Return torch's loader in a drawn order."""
    return DataLoader(rows, batch_size=BATCH, sampler=RandomSampler(rows), collate_fn=list)  # type: ignore[arg-type]


def replayed(rows: Dataset, batches: int) -> Any:
    """Go on by reading all that comes before."""
    found = iter(loader(rows))
    for _ in range(batches):
        next(found)
    return next(found)


if __name__ == "__main__":
    main()
