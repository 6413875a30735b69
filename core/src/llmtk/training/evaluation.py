"""Evaluation: exact means over all rows and ranks, with nothing of the run changed by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from llmtk.errors import TrainingError
from llmtk.training.micro_batches import cut_window
from llmtk.training.order import row_lengths, share
from llmtk.training.tally import Tally, WindowTally

if TYPE_CHECKING:
    from torch import nn

    from llmtk.contract import Dataset
    from llmtk.run import Run


def evaluate(run: Run, rows: Dataset) -> dict[str, float] | None:
    """Return the exact global means over the rows, or None where a signal came in between.

    Windows hold as many rows as in training, in the order of the data, so that a stage that looks at a whole window
    gives the same for any number of ranks.
    """
    whole, lengths = Tally(), row_lengths(rows)
    with run.randomness.aside("evaluation"), eval_mode(run.model), torch.no_grad():
        for start in range(0, len(rows), run.global_rows):
            if run.interrupted():
                return None
            indices = range(start, min(start + run.global_rows, len(rows)))
            mine = share(indices, lengths, run.rank, run.world_size)
            round = run.hooks.prepare_batch([rows[index] for index in mine])
            whole.add_means(run.reduce_means(round.metrics))
            for window in round.windows:
                whole.add(_evaluate_window(run, window))
    values = whole.values()
    if not whole.terms:
        raise TrainingError(f"nothing was evaluated: none of the {len(rows)} rows has a target")
    return values


def _evaluate_window(run: Run, window: object) -> Tally:
    config = run.config.train
    cut = cut_window(window, run.backend, rows=config.per_device_eval_batch_size, tokens=config.micro_batch_tokens)  # type: ignore[arg-type]
    tally = WindowTally(run.forward.router.totals(cut))
    for part in cut.parts:
        tally.add(part, run.forward.router.around(run.hooks.evaluate_batch, part.batch))
    return tally.finish(run.backend)[0]


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and each of its modules back to what it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
