"""What any language model can be measured by, whatever stage trained it: perplexity and token accuracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtk.batch import Batch, Group, Sequence
from llmtk.data import encode, read_rows
from llmtk.data.rows import RowError, convert
from llmtk.errors import DatasetError
from llmtk.training.backend import add_up
from llmtk.training.order import row_lengths, share

if TYPE_CHECKING:
    from collections.abc import Sequence as SequenceOf

    from llmtk.contract import Dataset, Row
    from llmtk.data import Row as DataRow
    from llmtk.run import Run

    Source = str | list[str] | list[dict[str, Any]]

METRICS = ("perplexity", "token_accuracy")
ROW_TYPES = ("prompt_completion", "dialogue", "text")
"""Rows that have next tokens to tell. Of a pair it is the chosen answer."""


def evaluate_all(run: Run, data: Source | None = None) -> dict[str, float]:
    """Return the stage's metrics on data, or on the run's evaluation rows, and beside them what `METRICS` names.

    A stage that has these itself keeps its own. Data that the stage has no use for (a text, of a preference stage) has
    the others alone; prompts without an answer, and a model that writes no text, have the stage's alone.

    Raises:
        DatasetError: The data cannot be read, or is of use to neither.
    """
    own: dict[str, float] = {}
    refused: DatasetError | None = None
    try:
        own = run.evaluate(data)
    except DatasetError as error:
        refused = error
    rows = None if own.keys() >= set(METRICS) else _rows(run, data, readable=refused is None)
    if rows is None and refused is not None:
        raise refused
    if refused is not None:
        wanted = " or ".join(run.stage.row_types)
        run.notify(f"Stage {run.stage_name} measures rows of type {wanted}, which these are not: no metric of its own")
    return own if rows is None else {**_measured(run, rows), **own}


def _rows(run: Run, data: Source | None, *, readable: bool) -> Dataset | None:
    """Return encoded rows that have next tokens: the stage's own where they are of that kind, else converted ones."""
    if run.stage.head != "language":
        return None
    if readable:
        own = (
            run.eval_rows
            if data is None
            else run.stage.encode_rows(run, read_rows(data, run.stage.row_types, run.config.data))
        )
        if own is not None and "input_ids" in own[0]:
            return own
    converted = _converted(run, data)
    return encode(converted, run.tokenizer, run.config.data)[0] if converted else None


def _converted(run: Run, data: Source | None) -> list[DataRow] | None:
    try:
        if data is not None:
            return read_rows(data, ROW_TYPES, run.config.data)
        return [part for row in run.splits.eval or [] for part in convert(row, ROW_TYPES)]
    except (DatasetError, RowError):
        return None


def _measured(run: Run, rows: Dataset) -> dict[str, float]:
    """Return the exact global means over all targets. All ranks must call it together."""
    sums: dict[str, float] = {}
    lengths = row_lengths(rows)
    with run.randomness.aside("evaluation"):
        for start in range(0, len(rows), run.global_rows):
            indices = share(range(start, min(start + run.global_rows, len(rows))), lengths, run.rank, run.world_size)
            window = Batch.collate([group for index in indices for group in _groups(rows[index], run.max_length)])
            scores = run.score_window(window, also=["top1"])
            assert scores.top1 is not None
            nll, right = -scores.logps.double().sum(), scores.top1.sum()
            mine = {"nll": float(nll), "right": float(right), "targets": len(scores.logps)}
            sums = add_up([sums, run.sum_over_ranks(mine)])
    return {
        "perplexity": math.exp(sums["nll"] / sums["targets"]),
        "token_accuracy": sums["right"] / sums["targets"],
    }


def _groups(row: Row, length: int) -> list[Group]:
    """Return a row as sequences; a document, which has no targets of its own, in parts of at most `length` tokens."""
    if row.get("targets") is not None:
        return [_group(row["input_ids"], row["targets"], row["place"])]
    ids = row["input_ids"]
    # Of each part the first token is read and not told, as that of the document is.
    parts = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [_group(part, np.arange(len(part)) > 0, row["place"]) for part in parts if len(part) > 1]


def _group(ids: SequenceOf[int], targets: Any, place: str) -> Group:
    return Group([Sequence(ids, targets)], {"tokens": int(np.sum(targets))}, place=place)
