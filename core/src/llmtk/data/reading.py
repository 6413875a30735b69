"""From the configuration's sources to checked rows: read, recognise, convert, check, hold out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtk.data.formats import Format, recognise
from llmtk.data.rows import Labelled, Pair, Row, RowError, Text, convert
from llmtk.data.sources import Record, open_source
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from llmtk.config.sections import DataConfig

SHOWN = 10
"""Bad rows that an error names before it only counts."""


@dataclass(frozen=True)
class Splits:
    """The rows to train and to evaluate on, in the order of the data, and what should be said about them."""

    train: list[Row]
    eval: list[Row] | None
    notices: list[str] = field(default_factory=list)


@dataclass
class _Reading:
    """Reads sources into rows of the wanted types, and gathers what is wrong, so that one error tells all."""

    row_types: Sequence[str]
    total: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def rows(self, source: Any) -> list[Row]:
        return [row for name, records in open_source(source) for row in self._rows_of_file(name, records)]

    def refuse_bad(self) -> None:
        if not self.bad:
            return
        lines = [f"  {place}: {reason}" for place, reason in self.bad[:SHOWN]]
        if len(self.bad) > SHOWN:
            lines.append(f"  and {len(self.bad) - SHOWN} more")
        head = f"{len(self.bad)} of {self.total} rows cannot be used; mend them, or take them out:"
        raise DatasetError("\n".join([head, *lines]))

    def _rows_of_file(self, name: str, records: list[Record]) -> Iterator[Row]:
        """Yield the good rows of one file. All its records share one format, told by the columns of all of them."""
        self.total += len(records)
        form = self._format(name, records)
        for place, record in records:
            try:
                yield from self._row(place, record, form)
            except RowError as error:
                self.bad.append((place, str(error)))

    def _format(self, name: str, records: list[Record]) -> Format | None:
        found = (record for _, record in records if isinstance(record, dict))
        columns = {str(key) for record in found for key, value in record.items() if value is not None}
        if not columns:
            return None
        form = recognise(columns, self.row_types, name)
        unused = sorted(columns - form.needs - form.optional)
        if unused and not form.takes_all:
            self.notices.append(f"{name} is read as {form.name}; not used: {', '.join(unused)}.")
        return form

    def _row(self, place: str, record: dict[str, Any] | RowError, form: Format | None) -> Sequence[Row]:
        if isinstance(record, RowError):
            raise record
        if form is None:
            raise RowError("the row has no columns")
        return convert(form.row(record, place), self.row_types)


def read_splits(config: DataConfig, row_types: Sequence[str], *, seed: int) -> Splits:
    """Return the checked rows of ``config.train`` and ``config.eval``, each of one of ``row_types``.

    A row whose type is in ``row_types`` stays as it is; another becomes the first of them that it converts to. A share
    is held out by row, and is a pure function of the seed and the number of rows.

    Raises :class:`ConfigurationError` where no training data is named, and :class:`DatasetError` for data that cannot
    be read, naming every bad row (the first ten, then a count).
    """
    if config.train is None:
        raise ConfigurationError("data.train is missing: give a file, for example data.train=rows.jsonl.")
    reading = _Reading(row_types)
    train = reading.rows(config.train)
    held = None if config.eval is None or isinstance(config.eval, float) else reading.rows(config.eval)
    reading.refuse_bad()
    splits = _hold_out(train, config.eval, seed) if isinstance(config.eval, float) else Splits(train, held)
    return replace(splits, notices=reading.notices + splits.notices)


def read_rows(source: str | list[str] | list[dict[str, Any]], row_types: Sequence[str]) -> list[Row]:
    """Return the checked rows of a source, as :func:`read_splits` does."""
    reading = _Reading(row_types)
    rows = reading.rows(source)
    reading.refuse_bad()
    return rows


def _hold_out(rows: list[Row], share: float, seed: int) -> Splits:
    """Hold out a share of the rows; answers to one prompt stay on one side, or what is held out would be known."""
    units = _units(rows)
    count = round(len(units) * share)
    documents = [row for row in rows if isinstance(row, Text)]
    if count < 1 and len(documents) == len(rows):
        return _hold_out_tails(documents, share)
    if len(units) < 2:
        what = f"{len(rows)} row" if len(rows) < 2 else f"{len(rows)} rows of one prompt"
        raise DatasetError(
            f"data.eval={share} holds out a share of the training data, which has {what}. "
            "Give at least 2 rows, or a file as data.eval."
        )
    notices = []
    if count < 1:
        notices.append(f"data.eval={share} of {len(rows)} rows is less than one row: 1 row is held out.")
    drawn = _draw(len(units), min(max(count, 1), len(units) - 1), seed)
    held = {index for unit in drawn for index in units[unit]}
    train = [row for index, row in enumerate(rows) if index not in held]
    return Splits(train, [row for index, row in enumerate(rows) if index in held], notices)


def _units(rows: list[Row]) -> list[list[int]]:
    """Return the indices of rows that are held out together: pairs and labelled answers of one prompt."""
    units: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        key: Any = json.dumps(row.prompt) if isinstance(row, Pair | Labelled) and row.prompt else index
        units.setdefault(key, []).append(index)
    return list(units.values())


def _draw(rows: int, count: int, seed: int) -> set[int]:
    """Return ``count`` of the indices below ``rows``.

    Sorting the raw words of Philox is the same with every version of numpy, which ``Generator.permutation`` isn't
    promised to be.
    """
    words = np.random.Philox(seed % 2**64).random_raw(rows)
    return set(np.argsort(words, kind="stable")[:count].tolist())


def _hold_out_tails(documents: list[Text], share: float) -> Splits:
    """Cut each document in two, for where there are too few to hold a whole one out."""
    train: list[Row] = []
    held: list[Row] = []
    for row in documents:
        cut = len(row.text) - max(1, round(len(row.text) * share))
        train.append(replace(row, text=row.text[:cut]))
        held.append(replace(row, text=row.text[cut:], place=f"{row.place} from character {cut}"))
    _check_halves(train + held)
    characters = sum(len(row.text) for row in held if isinstance(row, Text))
    which = "the document" if len(documents) == 1 else f"each of the {len(documents)} documents"
    notice = f"data.eval={share} is less than one document: the end of {which} is held out, {characters} characters."
    return Splits(train, held, [notice])


def _check_halves(rows: list[Row]) -> None:
    try:
        for row in rows:
            row.check()
    except RowError as error:
        raise DatasetError("The text is too short to hold a share of it out: give a file as data.eval.") from error
