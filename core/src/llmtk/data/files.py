"""What stands in a file, record after record, by the file's suffix.

A new kind of file is one function under :func:`reader`: a generator of what makes a record each, when it is called.
Whoever passes over records does not call them, and so pays for none.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from llmtk.data.rows import Cell, RowError, kind
from llmtk.errors import DatasetError

Record = tuple[str, dict[str, Any] | RowError]
"""A record's place, and its columns or what is wrong with it. One bad record doesn't hide the next."""
Unread = Callable[[], Record]
"""What makes a record of what was read. It is called before the next one is taken, or never."""

Reader = Callable[[str, BinaryIO], Iterator[Unread]]
READERS: dict[str, Reader] = {}
"""Suffix -> what reads such a file, given its name and the file, opened at its first byte behind a byte order mark."""
STREAMED: set[str] = set()
"""Suffixes of files of which no more than a part need be in memory."""
_BINARY: set[str] = set()
"""Suffixes of files that are not text."""

_ROWS = 1024
"""Rows of a Parquet file that are in memory at a time."""
_LONGEST_CELL = 2**26
"""Characters of a table's cell: where a quote is never closed, all that follows is one."""


def reader(*suffixes: str, is_text: bool = True, streams: bool = True) -> Callable[[Reader], Reader]:
    """Register the decorated function for files with these suffixes (lower case, with the dot)."""

    def register(function: Reader) -> Reader:
        READERS.update(dict.fromkeys(suffixes, function))
        STREAMED.update(suffixes if streams else ())
        _BINARY.update(() if is_text else suffixes)
        return function

    return register


def read_file(name: str, path: Path) -> Iterator[Unread]:
    """Yield what makes the records of a file with a known suffix. Raises :class:`DatasetError` where it is broken."""
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            if suffix not in _BINARY:
                _check_text(name, file)
            yield from READERS[suffix](name, file)
    except OSError as error:
        raise DatasetError(f"{name} cannot be read: {error.strerror or error}.") from error


def columns_of(item: object) -> dict[str, Any] | RowError:
    """Return an object as the columns of a record."""
    return item if isinstance(item, dict) else RowError(f"the row is {kind(item)}; an object is expected")


def _check_text(name: str, file: BinaryIO) -> None:
    """Refuse what is no text in UTF-8 at first sight, and go behind a byte order mark."""
    head = file.read(8192)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DatasetError(f"{name} is UTF-16 text: save it as UTF-8.")
    if b"\0" in head:
        raise DatasetError(f"{name} is not text: byte {head.index(0)} is 0. Give a text file in UTF-8.")
    file.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)


@reader(".jsonl", ".ndjson")
def _read_json_lines(name: str, file: BinaryIO) -> Iterator[Unread]:
    offset = file.tell()
    if _is_one_array(file):
        raise DatasetError(f"{name} holds one array, and not an object in each line: name the file .json.")
    file.seek(offset)
    # Lines of bytes end with \n alone: U+2028 and its like are no line ends in JSON.
    for number, line in enumerate(file, start=1):
        if line.strip():
            yield partial(_json_line, f"{name}:{number}", line.removesuffix(b"\n"), offset)
        offset += len(line)


def _is_one_array(file: BinaryIO) -> bool:
    """Say whether lines of JSON are a single array: the first one is all there is, or no JSON by itself."""
    lines = filter(bytes.strip, file)
    first = next(lines, b"")
    return first.lstrip().startswith(b"[") and (next(lines, None) is None or not _is_json(first))


def _json_line(place: str, line: bytes, offset: int) -> Record:
    """Return what a line of JSONL holds, or what is wrong with it. It begins at byte ``offset`` of the file."""
    try:
        return place, columns_of(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return place, RowError(f"invalid UTF-8 at byte {offset + error.start} of the file: save it as UTF-8")
    except json.JSONDecodeError as error:
        return place, RowError(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return place, RowError(f"JSON that cannot be read: {error}")


@reader(".json", streams=False)
def _read_json(name: str, file: BinaryIO) -> Iterator[Unread]:
    """Read an array of objects, or JSONL under the wrong suffix."""
    data = file.read()
    text = _decode(name, data)
    if not text.strip():
        return
    if text.lstrip().startswith("{") and not _is_json(text):
        yield from _read_json_lines(name, io.BytesIO(data))
        return
    value = _parse(name, text)
    if isinstance(value, dict) and "\n" not in text.strip():
        value = [value]
    if not isinstance(value, list):
        found = kind(value)
        raise DatasetError(f"{name} holds {found} as a whole: put the rows into an array, [{{...}}, {{...}}].")
    for number, item in enumerate(value, start=1):
        yield partial(_record, f"{name}: row {number}", item)


def _record(place: str, item: object) -> Record:
    return place, columns_of(item)


def _is_json(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{name}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}.") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{name}: JSON that cannot be read: {error}.") from error


_MARKS = {",": "comma", ";": "semicolon", "\t": "tab"}
"""What parts the cells of people's tables, and its name."""


@reader(".csv", ".tsv")
def _read_table(name: str, file: BinaryIO) -> Iterator[Unread]:
    """Read a table whose first line names the columns. A cell is text or nothing, if quoted with line breaks in it."""
    delimiter = "\t" if Path(name).suffix.lower() == ".tsv" else ","
    csv.field_size_limit(_LONGEST_CELL)
    lines = csv.reader(_text_lines(name, file), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(filter(None, lines), [])
        _check_header(name, header, delimiter)
        line = lines.line_num + 1
        for cells in lines:
            if cells:
                yield partial(_cells, f"{name}:{line}", header, cells)
            line = lines.line_num + 1
    except csv.Error as error:
        if str(error) == "unexpected end of data":
            raise DatasetError(f"{name}:{line}: broken CSV: a quotation mark in this row is not closed.") from error
        raise DatasetError(f"{name}:{lines.line_num}: broken CSV: {error}.") from error


def _check_header(name: str, header: list[str], delimiter: str) -> None:
    """Refuse a column that stands twice, and a table of one column whose name shows that another mark parts cells."""
    other = next((mark for mark in _MARKS if len(header) == 1 and mark in header[0]), None)
    if other:
        raise DatasetError(
            f"{name}:1: cells are parted by {_MARKS[other]}s; a {Path(name).suffix} file parts them by "
            f"{_MARKS[delimiter]}s. Save it so."
        )
    if twice := [column for column in header if header.count(column) > 1]:
        raise DatasetError(f"{name}:1: the column {twice[0]!r} stands twice in the first line, which names them.")


def _text_lines(name: str, file: BinaryIO) -> Iterator[str]:
    """Yield lines with their ends, be these \\n, \\r or both."""
    offset = file.tell()
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise _invalid(name, number, offset + error.start) from error
        yield from io.StringIO(text, newline="")
        offset += len(line)


def _cells(place: str, header: list[str], cells: list[str]) -> Record:
    if len(cells) != len(header):
        return place, RowError(f"it has {len(cells)} cells, and the first line names {len(header)} columns")
    return place, dict(zip(header, (Cell(cell) if cell else None for cell in cells), strict=True))


@reader(".parquet", is_text=False)
def _read_parquet(name: str, file: BinaryIO) -> Iterator[Unread]:
    """Read row group after row group, a part at a time; those of which no record is wanted stay unread."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _no_parquet(name, error) from error
    number = 0
    for group, size in enumerate(sizes):
        rows = _RowGroup(name, table, group)
        for index in range(size):
            number += 1
            yield partial(rows.record, f"{name}: row {number}", index)


class _RowGroup:
    """A part of a Parquet file, from which rows are taken in their order."""

    def __init__(self, name: str, table: Any, group: int) -> None:
        self._name = name
        self._read = partial(table.iter_batches, _ROWS, row_groups=[group])
        self._parts: Iterator[Any] | None = None
        self._rows: list[dict[str, Any]] = []
        self._end = 0
        """The number of the group's rows up to the last one of `_rows`."""

    def record(self, place: str, index: int) -> Record:
        """Return a row, by its index in the group. Raises :class:`DatasetError` where the group cannot be read."""
        import pyarrow as pa

        try:
            if index >= self._end:
                self._advance(index)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise _no_parquet(self._name, error) from error
        return place, self._rows[index - self._end]

    def _advance(self, index: int) -> None:
        self._parts = self._parts or self._read()
        for part in self._parts:
            self._end += len(part)
            if index < self._end:
                self._rows = part.to_pylist()
                return
        raise ValueError("it ends before its last row")


@reader(".txt", streams=False)
def _read_text(name: str, file: BinaryIO) -> Iterator[Unread]:
    """Read the whole file as one document."""
    text = _decode(name, file.read())
    if text.strip():
        yield partial(_record, name, {"text": text})


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _invalid(name, data.count(b"\n", 0, error.start) + 1, error.start) from error


def _invalid(name: str, line: int, byte: int) -> DatasetError:
    return DatasetError(f"{name}:{line}: invalid UTF-8 at byte {byte} of the file: save it as UTF-8.")


def _no_parquet(name: str, error: Exception) -> DatasetError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return DatasetError(f"{name} is no Parquet file that can be read: {reason}.")
