"""Curricula: easy rows first, by their length, by a column, or by what the model itself finds hard.

Each row has a difficulty. A step draws from the rows that are open by then, in the usual shuffled order, and each row
comes once an epoch; where too few are open, the next easiest are. What is open at optimizer step s grows until `steps`:

    length   rows of at most  start + (end - start) s / steps  tokens   (arXiv 2108.06084, section 4)
    else     the share  sqrt(c^2 + (1 - c^2) s / steps)  of the easiest rows, c being `start_share` (arXiv 1903.09848)

By length or column the order is a pure function of (seed, epoch). By loss it depends on the model at the epoch's
beginning; so it is part of the checkpoint.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator

from llmtk import Batch, ConfigurationError, RunView, Section, hookimpl
from llmtk.contract import Data, Dataset
from llmtk.training.order import shuffled

if TYPE_CHECKING:
    from llmtk.run import Run

Array = np.ndarray[Any, Any]


class Curriculum:
    """Orders the rows of each epoch from easy to hard."""

    class Options(Section):
        """What makes a row hard, and how fast hard ones come."""

        by: Literal["length", "column", "loss"] = "length"
        """`length`: its tokens; `column`: a number in it; `loss`: the mean negative log-prob of its targets, taken when
        an epoch begins (of a pair, of chosen and rejected together)."""
        steps: int = Field(..., ge=1)
        """Optimizer steps after which all rows are open."""
        start_length: int = Field(64, ge=1)
        """Tokens of the longest row that is open at first (by: length)."""
        end_length: int | None = Field(None, ge=1)
        """Tokens of the longest row that is open at the end of `steps`; longer ones come after that. By default the
        longest row's."""
        column: str | None = None
        """The column of encoded rows, not of the file, that holds the difficulty: `margin` of pairs, `length`, or a
        stage's own."""
        start_share: float = Field(0.1, gt=0, le=1)
        """Share of the rows that is open at first (by: column or loss)."""

        @model_validator(mode="after")
        def _belongs_together(self) -> Curriculum.Options:
            used = {"length": {"start_length", "end_length"}, "column": {"column", "start_share"}}
            mine = used.get(self.by, {"start_share"})
            if idle := sorted(self.model_fields_set - mine - {"by", "steps"}):
                raise ValueError(f"{idle[0]} is not used with by: {self.by}")
            if self.by == "column" and self.column is None:
                raise ValueError("by: column needs `column`, the name of the column")
            if self.end_length is not None and self.end_length < self.start_length:
                raise ValueError("end_length is below start_length: the rows that are open become more, never fewer")
            return self

    def __init__(self, options: Options) -> None:
        self.options = options
        self.epoch: int | None = None
        self.order: list[int] = []

    @property
    def column(self) -> str:
        """The column that holds the difficulty (by: length or column)."""
        return self.options.column or "length"

    @hookimpl(wrapper=True)
    def build_data(self, run: RunView) -> Generator[None, Data, Data]:
        if self.options.by == "loss":
            check_losses(run)
        data = yield
        if self.options.by != "loss" and not cast("Run", run).config.data.streaming:  # the core refuses a stream
            self._check_grows(numbers(data.train, self.column))
        return data

    @hookimpl
    def order_examples(self, run: RunView, epoch: int) -> Sequence[int]:
        if self.epoch != epoch:
            self.order, self.epoch = self._ordered(run, epoch), epoch
        return self.order

    def _ordered(self, run: RunView, epoch: int) -> list[int]:
        difficulty = self._difficulty(run)
        usual = shuffled(len(difficulty), run.data_seed, epoch)
        rounds, ranked = -(-len(difficulty) // run.global_rows), np.sort(difficulty)

        def bound(batch: int) -> float:
            return self._open(ranked, (epoch * rounds + batch) * run.windows_per_round)

        return by_difficulty(difficulty, usual, run.global_rows, bound)

    def _open(self, ranked: Array, step: int) -> float:
        """Return the difficulty up to which rows are open in a step, of all difficulties (rows,), the least first."""
        o, gone = self.options, min(1.0, step / self.options.steps)
        if gone == 1.0:
            return math.inf
        if o.by == "length":
            end = ranked[-1] if o.end_length is None else o.end_length
            return float(o.start_length + (end - o.start_length) * gone)
        share = math.sqrt(o.start_share**2 + (1 - o.start_share**2) * gone)
        return float(ranked[math.ceil(share * len(ranked)) - 1])

    def _difficulty(self, run: RunView) -> Array:
        """Return the difficulty of each row (rows,), equal on all ranks."""
        return losses(run) if self.options.by == "loss" else numbers(run.train_rows, self.column)

    def _check_grows(self, difficulty: Array) -> None:
        """Refuse a curriculum by length whose rows are all open at once: it would leave the order as it is."""
        longest = int(difficulty.max(initial=0))
        if self.options.by == "length" and self.options.start_length >= longest:
            raise ConfigurationError(
                f"plugins.curriculum would do nothing: the longest row has {longest} tokens, and with start_length "
                f"{self.options.start_length} all are open from the start. Give a start_length below {longest}"
            )

    @hookimpl
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        return {"epoch": self.epoch, "order": torch.tensor(self.order, dtype=torch.int64)}

    @hookimpl
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        self.epoch, self.order = state["epoch"], state["order"].tolist()


def by_difficulty(difficulty: Array, usual: Array, size: int, limit: Callable[[int], float]) -> list[int]:
    """Return an order of the rows (rows,): batch by batch, the first of `usual` that are open, or else the easiest.

    Args:
        difficulty: Of each row, (rows,).
        usual: The rows in their usual order, (rows,).
        size: Rows of a batch.
        limit: The difficulty up to which rows are open in the n-th batch of the epoch.
    """
    place = np.empty(len(usual), dtype=np.int64)
    place[usual] = np.arange(len(usual))
    waiting = iter(np.lexsort((place, difficulty)).tolist())
    pool: list[int] = []  # places in the usual order, the first on top
    order: list[int] = []
    following = next(waiting, None)
    while len(order) < len(usual):
        up_to = limit(len(order) // size)
        for _ in range(min(size, len(usual) - len(order))):
            while following is not None and (not pool or difficulty[following] <= up_to):
                heapq.heappush(pool, int(place[following]))
                following = next(waiting, None)
            order.append(int(usual[heapq.heappop(pool)]))
    return order


def numbers(rows: Dataset, column: str) -> Array:
    """Return a column of encoded rows (rows,). ConfigurationError where they have none, or it holds no numbers."""
    data: Any = rows
    names = getattr(data, "column_names", ())
    if column not in names:
        instead = ". Blocks of text have no length; use by: loss" if column == "length" else ""
        raise ConfigurationError(
            f"plugins.curriculum: the encoded rows have no column {column!r}. They have: "
            f"{', '.join(names) or 'none'}{instead}"
        )
    values = np.asarray(data[column][:])
    if values.dtype.kind not in "iufb" or not np.isfinite(values.astype(float)).all():
        raise ConfigurationError(f"plugins.curriculum: the column {column!r} does not hold a number in every row")
    return values.astype(float)


def check_losses(run: RunView) -> None:
    """Refuse stages whose rows have no loss of their own, by a ConfigurationError."""
    if "generation" in run.stage.needs:
        raise ConfigurationError(
            f"plugins.curriculum.by: loss needs rows with answers; stage {run.stage_name} writes them itself, anew "
            "each time, so that their loss says little of a row. Use by: length or by: column"
        )
    if run.stage.head != "language":
        raise ConfigurationError(
            f"plugins.curriculum.by: loss needs log-probs of tokens; a model of stage {run.stage_name} has a head of "
            "one value, and gives none. Use by: length or by: column"
        )


def losses(run: RunView) -> Array:
    """Return the mean negative log-prob of each training row's targets (rows,) under the model as it is. Collective.

    Of a pair, over the targets of chosen and rejected together.
    """
    count = len(run.train_rows)
    found = np.full(count, np.nan)
    for start in range(0, count, run.global_rows):
        indices = range(start, min(start + run.global_rows, count))
        mine = list(indices)[run.rank :: run.world_size]
        rows = [run.train_rows[index] for index in mine]
        windows = run.hooks.prepare_batch(rows).windows
        means = [mean for window in windows for mean in group_losses(run, window)]
        if [place for window in windows for place in window.places] != [row["place"] for row in rows]:
            raise ConfigurationError(
                f"plugins.curriculum.by: loss needs one group for each row, in their order and with their places; of "
                f"{len(mine)} rows this stage made {len(means)} groups. Use by: length or by: column"
            )
        for theirs, values in run.gather((mine, means)):
            found[theirs] = values
    return found


def group_losses(run: RunView, window: Batch) -> list[float]:
    """Return the mean negative log-prob of the targets of each group of a window. Collective."""
    logps = run.score_window(window).logps.cpu()
    group = window.sequence_group[window.target_sequence]
    sums = torch.zeros(len(window)).index_add(0, group, -logps)
    means: list[float] = (sums / torch.bincount(group, minlength=len(window)).clamp(min=1)).tolist()
    return means
