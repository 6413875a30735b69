"""Columns that have other names in the data than in llmtk's formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llmtk.errors import DatasetError, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmtk.data.files import Record


def rename(name: str, records: Sequence[Record], columns: Mapping[str, str | None]) -> list[Record]:
    """Return the records of one source with their columns renamed; one whose new name is null is left out.

    ``a.b`` is the column ``b`` inside of the object ``a``. A source that has the new name and not the old one is as it
    should be. Raises :class:`DatasetError` for a column that is not there, and for a new name that is there already.
    """
    if columns:
        _check(name, [record for _, record in records if isinstance(record, dict)], columns)
    return [(place, _renamed(record, columns) if isinstance(record, dict) else record) for place, record in records]


def _check(name: str, records: Sequence[dict[str, Any]], columns: Mapping[str, str | None]) -> None:
    there = {str(key): None for record in records for key in record}
    filled = {str(key) for record in records for key, value in record.items() if value is not None}
    for old, new in columns.items():
        has_old = old in there or any(_value(record, old) is not None for record in records)
        has_new = new in filled and new not in columns
        if not has_old and not has_new:
            near = suggest(old, there)
            raise DatasetError(
                f"{name} has no column {old}, which data.columns names.{near} Its columns are {', '.join(there)}."
            )
        if has_old and has_new:
            raise DatasetError(
                f"{name} has a column {new} already, and data.columns gives this name to {old}. Leave out the one that "
                f"is not wanted: {new}: null."
            )


def _renamed(record: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    kept = {key: value for key, value in record.items() if key not in columns}
    renamed = {new: _value(record, old) for old, new in columns.items() if new is not None}
    return kept | {name: value for name, value in renamed.items() if value is not None}


def _value(record: dict[str, Any], column: str) -> Any:
    """Return what stands under a name, or under the path that it spells, or None."""
    if column in record:
        return record[column]
    outer, _, inner = column.partition(".")
    inside = record.get(outer)
    return _value(inside, inner) if inner and isinstance(inside, dict) else None
