"""From the configuration's sources to checked rows: read, recognise, convert, check, hold out."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llmtk.config.sections import HELD_OUT, shares_of, sources_of
from llmtk.data.catalog import Catalog, read_catalog
from llmtk.data.columns import rename
from llmtk.data.files import Record
from llmtk.data.formats import Format, named, recognise, refuse_mixed
from llmtk.data.rows import Labelled, Pair, Row, RowError, Text, convert
from llmtk.data.sources import open_sources
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmtk.config.sections import DataConfig, SourceConfig

NO_DATA = "data.train is missing: give a file, for example data.train=rows.jsonl."
SHOWN = 10
"""Bad rows that an error names before it only counts."""


@dataclass(frozen=True)
class Splits:
    """The rows to train, to evaluate and to test on, in the order of the data, and what should be said about them."""

    train: list[Row]
    eval: list[Row] | None
    notices: list[str] = field(default_factory=list)
    test: list[Row] | None = None
    mixture: list[Share] = field(default_factory=list)
    """The sources of the training rows, in their order; empty where each row comes once an epoch."""


class Share(NamedTuple):
    """A source of a mixture: how many rows it has, how often each comes in an epoch, and its path."""

    rows: int
    weight: float
    path: str


def refuse_rows(problems: Sequence[str], total: int) -> None:
    """Raise :class:`DatasetError` if any of the rows cannot be used: where and why, the first ten, then a count."""
    if not problems:
        return
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more")
    head = f"{len(problems)} of {total} rows cannot be used; mend them, or take them out:"
    raise DatasetError("\n".join([head, *lines]))


@dataclass
class Reading:
    """Reads sources into rows of the wanted types, and gathers what is wrong, so that one error tells all."""

    row_types: Sequence[str]
    columns: Mapping[str, str | None] = field(default_factory=dict)
    """New names of columns, for sources without any of their own."""
    catalog: Catalog = field(default_factory=dict)
    total: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    """Place, and what is wrong there."""
    notices: list[str] = field(default_factory=list)

    def parts(self, given: Any) -> list[tuple[SourceConfig, list[Row]]]:
        """Return each source and its rows. Raises :class:`DatasetError` for one that cannot be read."""
        return [(source, self.read(source, records)[0]) for source, records in open_sources(given, self.catalog)]

    def rows(self, given: Any) -> list[Row]:
        """Return the rows of all sources."""
        return [row for _, rows in self.parts(given) for row in rows]

    def refuse_bad(self) -> None:
        """Raise :class:`DatasetError` if any row cannot be used: the first ten, then a count."""
        refuse_rows([f"{place}: {reason}" for place, reason in self.bad], self.total)

    def read(
        self, source: SourceConfig, records: Sequence[Record], form: Format | None = None
    ) -> tuple[list[Row], Format | None]:
        """Return the good rows of one source, and their format: the one given, or as all of their columns tell."""
        self.total += len(records)
        columns = self.columns if source.columns is None else source.columns
        records = rename(source.path, records, columns)
        form = form or self._format(source, records)
        rows: list[Row] = []
        for place, record in records:
            try:
                rows.extend(self._row(place, record, form))
            except RowError as error:
                self.bad.append((place, str(error)))
        return rows, form

    def _format(self, source: SourceConfig, records: Sequence[Record]) -> Format | None:
        kinds: dict[frozenset[str], str] = {}
        for place, record in records:
            if isinstance(record, dict):
                kinds.setdefault(frozenset(str(key) for key, value in record.items() if value is not None), place)
        columns = {name for kind in kinds for name in kind}
        if not columns:
            return None
        if source.format is not None:
            form = named(source.format, columns, self.row_types, source.path)
        else:
            try:
                form = recognise(columns, self.row_types, source.path)
            except DatasetError:
                refuse_mixed(kinds, self.row_types, source.path)
                raise
        unused = sorted(columns - form.needs - form.optional)
        if unused and not form.takes_all:
            self.notices.append(f"{source.path} is read as {form.name}; not used: {', '.join(unused)}.")
        return form

    def _row(self, place: str, record: dict[str, Any] | RowError, form: Format | None) -> Sequence[Row]:
        if isinstance(record, RowError):
            raise record
        if form is None:
            raise RowError("the row has no columns")
        return convert(form.row(record, place), self.row_types)


def reading_of(config: DataConfig, row_types: Sequence[str]) -> Reading:
    """Return what reads a configuration's sources. Raises :class:`ConfigurationError` for a catalog that is broken."""
    return Reading(row_types, config.columns, read_catalog(config.catalog))


def read_splits(config: DataConfig, row_types: Sequence[str], *, seed: int) -> Splits:
    """Return the checked rows of ``config.train``, ``config.eval`` and ``config.test``, each of one of ``row_types``.

    Of training data that are streamed there are none: they come later.

    A row whose type is in ``row_types`` stays as it is; another becomes the first of them that it converts to. A share
    is held out by row, and is a pure function of the seed and the number of rows.

    Raises :class:`ConfigurationError` where no training data is named, and :class:`DatasetError` for data that cannot
    be read, naming every bad row (the first ten, then a count).
    """
    reading = reading_of(config, row_types)
    parts, held = read_sources(config, reading)
    reading.refuse_bad()
    train = [_Tagged(number, row) for number, (_, rows) in enumerate(parts) for row in rows]
    notices, left = reading.notices, 1.0
    for name, share in shares_of(config).items():
        # Of what is left, as large a part as the share is of the whole.
        split = _hold_out(train, share / left, f"data.{name}={share}", seed)
        train, held[name], left = split.kept, [item.row for item in split.held], left - share
        notices, seed = notices + split.notices, seed + 1
    rows = [item.row for item in train]
    return Splits(rows, held.get("eval"), notices, held.get("test"), _mixture(train, [source for source, _ in parts]))


def read_sources(
    config: DataConfig, reading: Reading
) -> tuple[list[tuple[SourceConfig, list[Row]]], dict[str, list[Row]]]:
    """Return each training source and its rows, and the rows of each other split that has sources."""
    if config.train is None:
        raise ConfigurationError(NO_DATA)
    parts = [] if config.streaming else reading.parts(config.train)
    others = {name: given for name in HELD_OUT if (given := getattr(config, name)) is not None}
    return parts, {name: reading.rows(given) for name, given in others.items() if not isinstance(given, float)}


def check_sources(config: DataConfig, row_types: Sequence[str]) -> Reading:
    """Read every source as far as it goes; what is wrong with which is in ``bad`` of what is returned.

    Raises :class:`ConfigurationError` where no training data is named.
    """
    reading = reading_of(config, row_types)
    if config.train is None:
        raise ConfigurationError(NO_DATA)
    for name in ("train", *HELD_OUT):
        given = getattr(config, name)
        sources: Sequence[Any] = sources_of(given) or ([given] if isinstance(given, list) else [])
        for source in sources:
            try:
                reading.rows(source)
            except DatasetError as error:
                reading.bad.append(("", str(error)))
    return reading


def read_rows(source: Any, row_types: Sequence[str], config: DataConfig | None = None) -> list[Row]:
    """Return the checked rows of a source, as :func:`read_splits` does, with the columns and the catalog of a run."""
    reading = Reading(row_types) if config is None else reading_of(config, row_types)
    rows = reading.rows(source)
    reading.refuse_bad()
    return rows


class _Tagged(NamedTuple):
    """A training row, and the number of the source that it is from."""

    source: int
    row: Row


class _Split(NamedTuple):
    kept: list[_Tagged]
    held: list[_Tagged]
    notices: list[str]


def _mixture(rows: list[_Tagged], sources: list[SourceConfig]) -> list[Share]:
    """Return the sources that rows are left of; nothing where all weigh 1."""
    if all(source.weight == 1 for source in sources):
        return []
    counts = Counter(item.source for item in rows)
    return [Share(counts[n], source.weight, source.path) for n, source in enumerate(sources) if counts[n]]


def _hold_out(rows: list[_Tagged], share: float, key: str, seed: int) -> _Split:
    """Hold out a share of the rows; answers to one prompt stay on one side, or what is held out would be known."""
    units = _units([item.row for item in rows])
    count = round(len(units) * share)
    if count < 1 and all(isinstance(item.row, Text) for item in rows):
        return _hold_out_tails(rows, share, key)
    if len(units) < 2:
        what = f"{len(rows)} row" if len(rows) < 2 else f"{len(rows)} rows of one prompt"
        raise DatasetError(
            f"{key} holds out a share of the training data, which has {what}. "
            f"Give at least 2 rows, or a file as {key.partition('=')[0]}."
        )
    notices = []
    if count < 1:
        notices.append(f"{key} of {len(rows)} rows is less than one row: 1 row is held out.")
    drawn = _draw(len(units), min(max(count, 1), len(units) - 1), seed)
    held = {index for unit in drawn for index in units[unit]}
    kept = [item for index, item in enumerate(rows) if index not in held]
    return _Split(kept, [rows[index] for index in sorted(held)], notices)


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


def _hold_out_tails(documents: list[_Tagged], share: float, key: str) -> _Split:
    """Cut each document in two, for where there are too few to hold a whole one out."""
    train: list[_Tagged] = []
    held: list[_Tagged] = []
    characters = 0
    for source, row in documents:
        assert isinstance(row, Text)
        cut = len(row.text) - max(1, round(len(row.text) * share))
        train.append(_Tagged(source, replace(row, text=row.text[:cut])))
        held.append(_Tagged(source, replace(row, text=row.text[cut:], place=f"{row.place} from character {cut}")))
        characters += len(row.text) - cut
    _check_halves(train + held, key)
    which = "the document" if len(documents) == 1 else f"each of the {len(documents)} documents"
    notice = f"{key} is less than one document: the end of {which} is held out, {characters} characters."
    return _Split(train, held, [notice])


def _check_halves(rows: list[_Tagged], key: str) -> None:
    try:
        for item in rows:
            item.row.check()
    except RowError as error:
        name = key.partition("=")[0]
        raise DatasetError(f"The text is too short to hold a share of it out: give a file as {name}.") from error
