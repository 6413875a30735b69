"""What models were asked about a micro-batch, told again about a part of it: one forward pass, several losses.

A loss is a pure function of the model and the batch, its terms and metrics are sums over groups, and what it asks of
models is one value or more per target. So its share of some groups follows from the answers about all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from llmtk.errors import PluginError
from llmtk.scoring.scores import Scores

if TYPE_CHECKING:
    from llmtk.batch import Batch

Answer = TypeVar("Answer", Scores, Tensor)


class Memory:
    """Answers of `run.score`, `run.values` and `run.map_logits` about a micro-batch, in their order.

    with run.remembering() as memory:
        output = inner(batch)
        with memory.of(batch, groups) as part:
            share = inner(part)     # the terms and metrics of these groups, without gradient
    """

    def __init__(self, outer: Memory | None = None) -> None:
        self._outer = outer
        self._told: list[tuple[Hashable, Batch, Any]] = []
        self._groups: Sequence[int] | None = None
        self._next = 0

    @contextmanager
    def of(self, batch: Batch, groups: Sequence[int]) -> Iterator[Batch]:
        """Give these groups of the batch, and answer about them from memory, without gradient, within a context."""
        self._groups, self._next = groups, 0
        try:
            with torch.no_grad():
                yield part_of(batch, groups)
        finally:
            self._groups = None

    def asked(self, batch: Batch, compute: Callable[[], Answer], question: Hashable = None) -> Answer:
        """Compute an answer and take it down; or give that of a part. PluginError for a question not asked before.

        `question` is what is asked: which model, and for what.
        """
        if self._groups is None:
            answer = compute() if self._outer is None else self._outer.asked(batch, compute, question)
            self._told.append((question, batch, answer))
            return answer
        if self._next == len(self._told):
            raise PluginError("compute_loss asks the model more about some groups of a micro-batch than about all")
        before, whole, answer = self._told[self._next]
        self._next += 1
        if question != before:
            raise PluginError(
                f"compute_loss asks the model in another order about some groups of a micro-batch: {question} where it "
                f"was {before} about all"
            )
        if not torch.equal(part_of(whole, self._groups).host.tokens, batch.host.tokens):
            raise PluginError("compute_loss asks the model about other groups than those that it was given")
        return cast("Answer", _share(whole, self._groups, answer, batch))


def part_of(batch: Batch, groups: Sequence[int]) -> Batch:
    """Return a batch of these groups alone, on the batch's device, without waiting for that."""
    return batch.host.select(groups).to(batch.tokens.device)


def _share(whole: Batch, groups: Sequence[int], answer: Any, part: Batch) -> Scores | Tensor:
    targets = whole.host.targets_of(groups).to(whole.tokens.device)
    if isinstance(answer, Tensor):
        return answer.detach()[targets]
    columns = {field.name: getattr(answer, field.name) for field in fields(answer)}
    found = {name: column.detach()[targets] for name, column in columns.items() if isinstance(column, Tensor)}
    return Scores(part, **found)
