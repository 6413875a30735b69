"""Where records come from: files, read by their suffix, data sets of the `datasets` library, or Python objects.

A new kind of file is one function under :func:`reader`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtk.config.sections import SourceConfig
from llmtk.data.catalog import Catalog, look_up
from llmtk.data.hub import is_hub_name, is_saved, read_hub, read_saved, refuse
from llmtk.data.rows import Cell, RowError, kind
from llmtk.errors import DatasetError, suggest

Record = tuple[str, dict[str, Any] | RowError]
"""A record's place, and its columns or what is wrong with it. One bad record doesn't hide the next."""

Reader = Callable[[str, bytes], Iterator[Record]]
READERS: dict[str, Reader] = {}
"""Suffix -> what reads such a file, given its name and its bytes."""
_BINARY: set[str] = set()
"""Suffixes of files that are not text."""

GIVEN = "The data given as a list"
"""What messages call rows that are Python objects."""


def reader(*suffixes: str, is_text: bool = True) -> Callable[[Reader], Reader]:
    """Register the decorated function for files with these suffixes (lower case, with the dot)."""

    def register(function: Reader) -> Reader:
        READERS.update(dict.fromkeys(suffixes, function))
        _BINARY.update(() if is_text else suffixes)
        return function

    return register


def open_sources(
    given: str | SourceConfig | Sequence[str | SourceConfig] | Sequence[dict[str, Any]], catalog: Catalog
) -> Iterator[tuple[SourceConfig, list[Record]]]:
    """Yield each source, as the catalog knows it, with its records. A list of Python objects is one source.

    Raises :class:`DatasetError` for a file that is missing, empty, a folder, not what its suffix says, or of an unknown
    suffix, and for a data set of `datasets` that cannot be loaded.
    """
    if not given:
        raise DatasetError("The data is an empty list: give at least one file, or one row.")
    items = given if isinstance(given, list | tuple) else [given]
    if any(isinstance(item, str | SourceConfig) for item in items):
        for item in items:
            source = look_up(item if isinstance(item, SourceConfig) else SourceConfig(path=str(item)), catalog)
            yield source, _read(source, catalog)
    else:
        yield SourceConfig(path=GIVEN), [(f"row {n}", _columns(item)) for n, item in enumerate(items, start=1)]


def _read(source: SourceConfig, catalog: Catalog) -> list[Record]:
    path = Path(source.path).expanduser()
    if is_hub_name(source.path):
        records = read_hub(source)
    elif path.is_dir() and is_saved(path):
        records = read_saved(source)
    else:
        refuse(source, ("name", "split", "revision"), "is a file, and this is for data sets that `datasets` loads")
        records = _read_file(source.path, path, catalog)
    if not records:
        raise DatasetError(f"{source.path} is empty: it holds no rows.")
    return records


def _read_file(name: str, path: Path, catalog: Catalog) -> list[Record]:
    read = _reader_of(name, path, catalog)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{name} cannot be read: {error.strerror or error}.") from error
    if path.suffix.lower() in _BINARY:
        return list(read(name, data))
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DatasetError(f"{name} is UTF-16 text: save it as UTF-8.")
    if b"\0" in data[:8192]:
        raise DatasetError(f"{name} is not text: byte {data.index(0)} is 0. Give a text file in UTF-8.")
    data = data.removeprefix(b"\xef\xbb\xbf")
    return list(read(name, data)) if data.strip() else []


def _reader_of(name: str, path: Path, catalog: Catalog) -> Reader:
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS)
        inside = f", for example {path / files[0]}" if files else ""
        raise DatasetError(f"{name} is a folder: give a file, or a list of files{inside}.")
    refuse_missing(name, path, catalog)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        ending = f"the suffix {suffix}" if suffix else "no suffix"
        raise DatasetError(f"{name} has {ending}; files that can be read end in {', '.join(sorted(READERS))}.")
    return READERS[suffix]


def refuse_missing(name: str, path: Path, catalog: Iterable[str] = ()) -> None:
    """Raise :class:`DatasetError` where there is no such file, with the near ones that there are."""
    if path.exists():
        return
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = suggest(path.name, [*beside, *catalog])
    listed = f" data.catalog names {', '.join(catalog)}." if catalog else ""
    raise DatasetError(f"{name} does not exist.{near}{listed} A relative path starts at {Path.cwd()}.")


@reader(".jsonl", ".ndjson")
def _read_json_lines(name: str, data: bytes) -> Iterator[Record]:
    if data.lstrip().startswith(b"[") and _is_json(data):
        raise DatasetError(f"{name} holds one array, and not an object in each line: name the file .json.")
    offset = 0
    # Not splitlines(): U+2028 and its like are no line ends in JSON.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{name}:{number}", read_line(line, offset)
        offset += len(line) + 1


def read_line(line: bytes, offset: int) -> dict[str, Any] | RowError:
    """Return what a line of JSONL holds, or what is wrong with it. It begins at byte ``offset`` of the file."""
    try:
        return _columns(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8 at byte {offset + error.start} of the file: save it as UTF-8")
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError(f"JSON that cannot be read: {error}")


@reader(".json")
def _read_json(name: str, data: bytes) -> Iterator[Record]:
    """Read an array of objects, or JSONL under the wrong suffix."""
    text = _decode(name, data)
    if text.lstrip().startswith("{") and not _is_json(text):
        yield from _read_json_lines(name, data)
        return
    value = _parse(name, text)
    if isinstance(value, dict) and "\n" not in text.strip():
        value = [value]
    if not isinstance(value, list):
        found = kind(value)
        raise DatasetError(f"{name} holds {found} as a whole: put the rows into an array, [{{...}}, {{...}}].")
    for number, item in enumerate(value, start=1):
        yield f"{name}: row {number}", _columns(item)


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
def _read_table(name: str, data: bytes) -> Iterator[Record]:
    """Read a table whose first line names the columns. A cell is text or nothing, if quoted with line breaks in it."""
    delimiter = "\t" if Path(name).suffix.lower() == ".tsv" else ","
    csv.field_size_limit(max(csv.field_size_limit(), len(data)))
    lines = csv.reader(io.StringIO(_decode(name, data), newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(lines)
        _check_header(name, header, delimiter)
        line = lines.line_num + 1
        for cells in lines:
            if cells:
                yield f"{name}:{line}", _cells(header, cells)
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


def _cells(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError(f"it has {len(cells)} cells, and the first line names {len(header)} columns")
    return dict(zip(header, (Cell(cell) if cell else None for cell in cells), strict=True))


@reader(".parquet", is_text=False)
def _read_parquet(name: str, data: bytes) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise DatasetError(f"{name} is no Parquet file that can be read: {reason}.") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}: row {number}", row


@reader(".txt")
def _read_text(name: str, data: bytes) -> Iterator[Record]:
    """Read the whole file as one document."""
    yield name, {"text": _decode(name, data)}


def _decode(name: str, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{name}:{line}: invalid UTF-8 at byte {error.start} of the file: save it as UTF-8."
        ) from error


def _columns(item: object) -> dict[str, Any] | RowError:
    return item if isinstance(item, dict) else RowError(f"the row is {kind(item)}; an object is expected")
