"""Several tasks in one run: metrics of each source of the data, and a second data set beside a stage's own.

Of each source, the loss of a stage whose loss is a sum over groups, divided by a weight that they declare:

    loss of a source  =  sum over its groups of what they add to the loss  /  sum over them of the weight

over a whole step, or evaluation, and all ranks. It comes from the forward pass that the stage makes anyway.

Beside a stage, N rows of a second data set in each optimizer step, with the log-probs of their T target tokens:

    loss  +  c / T  sum_t -log p_t            c: `coefficient`  (what PPO-ptx adds: arXiv 2203.02155, section 3.5)

Step n takes rows N n to N n + N - 1 of an endless line of epochs, each shuffled by (seed, epoch): a pure function of
the step, so a resumed run goes on with the same rows, and two ranks take those of one. They travel in columns of the
stage's groups, so that they are cut into micro-batches with them, counted with them, and kept in checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from llmtk import (
    Batch,
    ConfigurationError,
    Group,
    LossOutput,
    Mean,
    Round,
    RunView,
    Section,
    Sequence,
    Term,
    hookimpl,
)
from llmtk.contract import Data, Dataset, Row
from llmtk.data import source_of
from llmtk.training.order import shuffled

if TYPE_CHECKING:
    from llmtk.run import Run

BESIDE = "multitask_nll"
"""The name of the term, and of the weight that divides it."""
IDS, TARGETS, LENGTHS = (f"multitask_{name}" for name in ("ids", "targets", "lengths"))
"""Columns of the stage's groups: the tokens of the rows that go with a group, one row after the other (groups, width);
which of them are targets; and how long the rows are (groups, rows), 0 where there is none."""
NOTHING: Row = {"input_ids": [0, 0], "targets": [False, True]}
"""What goes with a group that is dealt no row, and counts nothing: every micro-batch must have something to score,
since each forward pass is one of all ranks."""


class Beside(Section):
    """A second data set, whose rows are learnt beside the stage's own."""

    data: str | list[str] | list[dict[str, Any]]
    """Where they are, as data.train names its sources: dialogues, or prompts and completions."""
    rows: int = Field(8, ge=1)
    """Rows of it in each optimizer step, over all ranks."""
    coefficient: float = Field(1.0, gt=0)
    """This times the mean negative log-prob of their target tokens is added to the loss."""


class Multitask:
    """Tells the sources of the data apart, and trains on a second data set beside."""

    class Options(Section):
        """What is told of each source, and what is learnt beside."""

        per_source: bool | None = None
        """Whether loss and metrics are told of each source too. By default where the training data have several."""
        beside: Beside | None = None
        """A second data set, whose rows are learnt beside the stage's own by their negative log-prob."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.tells_sources = False
        self.beside: Dataset | None = None
        self.digest = ""

    @hookimpl(wrapper=True)
    def build_data(self, run: RunView) -> Generator[None, Data, Data]:
        o = self.options
        if o.beside is not None:
            check_head(run)
        data = yield
        found = sources(data.train)
        if o.per_source and "" in found:
            raise ConfigurationError(
                "plugins.multitask.per_source: this run's rows do not say which source they are from: they are given "
                "in Python, or made of several documents. Give files under data.train, or leave it out"
            )
        several = len({name_of(source) for source in found}) > 1 and "" not in found
        self.tells_sources = several if o.per_source is None else o.per_source
        if not self.tells_sources and o.beside is None:
            why = "which has one" if found else "which a stream does not name beforehand (per_source: true asks for it)"
            raise ConfigurationError(
                "plugins.multitask would do nothing. It tells of each source of the training data, "
                f"{why if o.per_source is None else 'and per_source is false'}; or it learns a second data set "
                "beside, and plugins.multitask.beside names none. Other kinds of tasks together are not supported"
            )
        if self.tells_sources:
            for source in found | (sources(data.eval) if data.eval is not None else set()):
                check_task(name_of(source))
        if o.beside is not None:
            with cast("Run", run).speaking_of("plugins.multitask.beside.data"):
                self.beside = run.encode(o.beside.data, ("dialogue", "prompt_completion"))
            self.digest = digest(self.beside)
        return data

    @hookimpl
    def extra_run_info(self, run: RunView) -> Mapping[str, Any]:
        if self.beside is None or self.options.beside is None:
            return {}
        return {"beside": f"{self.options.beside.rows} rows a step, of {len(self.beside)}", "sha256": self.digest}

    # A second data set beside the stage's

    @hookimpl
    def around_prepare_batch(self, run: RunView, rows: list[Row], inner: Callable[[list[Row]], Round]) -> Round:
        round, data, settings = inner(rows), self.beside, self.options.beside
        if data is None or settings is None or not run.model.training:
            return round
        windows, by_rank = [], run.gather([len(window) for window in round.windows])
        for number, window in enumerate(round.windows):
            groups = [theirs[number] for theirs in by_rank]
            indices = due(len(data), settings.rows, run.data_seed, run.step + number)
            mine = dealt(indices, sum(groups))[sum(groups[: run.rank]) :][: len(window)]
            windows.append(carrying(window, [[data[index] for index in some] for some in mine]))
        return replace(round, windows=windows)

    @hookimpl
    def around_compute_loss(self, run: RunView, batch: Batch, inner: Callable[[Batch], LossOutput]) -> LossOutput:
        output = self._with_sources(run, batch, inner) if self.tells_sources else inner(batch)
        if self.options.beside is None or IDS not in batch.per_group:
            return output
        term = Term(carried_nll(run, batch), BESIDE, self.options.beside.coefficient)
        return replace(output, terms=output.terms | {BESIDE: term})

    @hookimpl
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        return {"sha256": self.digest}

    @hookimpl
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        if state["sha256"] != self.digest:
            raise ConfigurationError(
                "plugins.multitask.beside.data: the rows have changed since the checkpoint was written. Put them back, "
                "or start a new run"
            )

    # What is told of each source

    def _with_sources(self, run: RunView, batch: Batch, inner: Callable[[Batch], LossOutput]) -> LossOutput:
        """Compute the loss, and tell it and the stage's metrics of each source by itself."""
        with run.remembering() as memory:
            output = inner(batch)
            metrics = dict(output.metrics)
            for task, groups in tasks(batch).items():
                with memory.of(batch, groups) as part:
                    share = output if len(groups) == len(batch) else inner(part)
                told = {f"{task}/{name}": mean for name, mean in means(share, part).items()}
                check_task(task, output.metrics.keys() & told.keys())
                metrics |= told
        return replace(output, metrics=metrics)


# Sources


def sources(rows: Dataset) -> set[str]:
    """Return the sources of rows: empty for those that name none. Of a stream nothing is known yet."""
    data: Any = rows
    if "place" in getattr(data, "column_names", ()):
        return {source_of(place) for place in data["place"][:]}
    return {source_of(data[0]["place"])} if len(rows) else set()


def check_head(run: RunView) -> None:
    """Refuse a stage whose model gives tokens no log-probs, by a ConfigurationError."""
    if run.stage.head != "language":
        raise ConfigurationError(
            "plugins.multitask.beside learns text, and the model of this stage has a head of one value, which gives "
            "tokens no log-probs. Leave it out"
        )


def check_task(task: str, twice: Collection[str] = ()) -> None:
    """Refuse a task of which figures, `twice`, are called as those of the whole run are, by a ConfigurationError.

    All that begins with `loss/` is the core's, which so tells the terms of a loss.
    """
    if task == "loss" or twice:
        raise ConfigurationError(
            f"plugins.multitask: figures of the source {task!r} would be called as those of the whole run are "
            f"({', '.join(sorted(twice)) or 'loss/...'}). Give its file another name"
        )


def name_of(source: str) -> str:
    """Return what a source is called: its name without folder and suffix."""
    return Path(source).stem or "other"


def tasks(batch: Batch) -> dict[str, list[int]]:
    """Return the groups of each task."""
    found: dict[str, list[int]] = {}
    for group, place in enumerate(batch.places):
        found.setdefault(name_of(source_of(place)), []).append(group)
    return found


def means(output: LossOutput, batch: Batch) -> dict[str, Mean]:
    """Return loss and metrics of a batch as sums and counts; of several terms each, without its coefficient."""
    weights = batch.host.weights
    if len(output.terms) == 1:
        (term,) = output.terms.values()
        losses = {"loss": Mean(term.coefficient * term.sum.detach(), float(weights[term.per].sum()))}
    else:
        losses = {
            f"loss/{name}": Mean(term.sum.detach(), float(weights[term.per].sum()))
            for name, term in output.terms.items()
        }
    return losses | output.metrics


# Rows that go with groups


def due(size: int, count: int, seed: int, step: int) -> list[int]:
    """Return which rows of a data set of so many a step takes (count,)."""
    places = range(step * count, (step + 1) * count)
    orders = {epoch: shuffled(size, seed, epoch) for epoch in {place // size for place in places}}
    return [int(orders[place // size][place % size]) for place in places]


def dealt(indices: list[int], groups: int) -> list[list[int]]:
    """Deal rows to groups in their order, as evenly as they come."""
    count = len(indices)
    return [indices[group * count // groups : (group + 1) * count // groups] for group in range(groups)]


def digest(rows: Dataset) -> str:
    """Return a hash of rows' tokens and targets, in their order."""
    found = hashlib.sha256()
    for index in range(len(rows)):
        row = rows[index]
        found.update(repr((row["input_ids"], row["targets"])).encode())
    return found.hexdigest()


def carrying(window: Batch, dealt: SequenceOf[SequenceOf[Row]]) -> Batch:
    """Return a window whose groups carry these rows with them, and declare their targets as a weight."""
    rows = [list(of_group) or [NOTHING] for of_group in dealt]
    columns = {
        IDS: [torch.tensor([token for row in some for token in row["input_ids"]]) for some in rows],
        TARGETS: [torch.tensor([target for row in some for target in row["targets"]]) for some in rows],
        LENGTHS: [torch.tensor([len(row["input_ids"]) for row in some]) for some in rows],
    }
    targets = torch.tensor([sum(sum(row["targets"]) for row in some) for some in dealt], dtype=torch.float64)
    window = window.with_columns(per_group={name: _stacked(parts) for name, parts in columns.items()})
    return replace(window, weights=window.weights | {BESIDE: targets})


def _stacked(parts: SequenceOf[Tensor]) -> Tensor:
    """Stack vectors (n,) of unequal length, filled up with zeros: (parts, longest)."""
    longest = max(map(len, parts), default=0)
    return torch.stack([F.pad(part, (0, longest - len(part))) for part in parts]) if parts else torch.zeros(0, 0)


def carried(batch: Batch) -> Batch:
    """Return the rows that a batch's groups carry, as a batch with a group for each."""
    host = batch.host
    groups = []
    for ids, targets, lengths in zip(*(host.per_group[name] for name in (IDS, TARGETS, LENGTHS)), strict=True):
        sizes = lengths[lengths > 0].tolist()
        rows = zip(ids[: sum(sizes)].split(sizes), targets[: sum(sizes)].split(sizes), strict=True)
        groups.append(Group([Sequence(*row) for row in rows], {}))
    return Batch.collate(groups).to(batch.tokens.device)


def carried_nll(run: RunView, batch: Batch) -> Tensor:
    """Return the summed negative log-prob of the targets that the groups of a batch carry."""
    rows = carried(batch)
    sums = torch.zeros(len(rows), device=rows.tokens.device)
    sums = sums.index_add(0, rows.sequence_group, run.score(rows).sum())
    return -torch.where(batch.weights[BESIDE] > 0, sums, 0.0).sum()
