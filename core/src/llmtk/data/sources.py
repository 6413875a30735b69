"""Where records come from: files, read by their suffix, or Python objects.

A new kind of file is one function under :func:`reader`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtk.data.rows import RowError, kind
from llmtk.errors import DatasetError, suggest

Record = tuple[str, dict[str, Any] | RowError]
"""A record's place, and its columns or what is wrong with it. One bad record doesn't hide the next."""

Reader = Callable[[str, bytes], Iterator[Record]]
READERS: dict[str, Reader] = {}
"""Suffix -> what reads such a file, given its name and its bytes."""


def reader(*suffixes: str) -> Callable[[Reader], Reader]:
    """Register the decorated function for files with these suffixes (lower case, with the dot)."""

    def register(function: Reader) -> Reader:
        READERS.update(dict.fromkeys(suffixes, function))
        return function

    return register


def open_source(source: str | Sequence[str] | Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[Record]]]:
    """Yield (name, records) of each file, or of the one list of Python objects.

    Raises :class:`DatasetError` for a file that is missing, empty, a folder, not text, or of an unknown suffix.
    """
    if isinstance(source, str):
        yield source, _read_file(source)
    elif not source:
        raise DatasetError("The data is an empty list: give at least one file, or one row.")
    elif all(isinstance(item, str) for item in source):
        for name in source:
            yield str(name), _read_file(str(name))
    else:
        yield "The data given as a list", [(f"row {n}", _columns(item)) for n, item in enumerate(source, start=1)]


def _read_file(name: str) -> list[Record]:
    path = Path(name).expanduser()
    read = _reader_of(name, path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{name} cannot be read: {error.strerror or error}.") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DatasetError(f"{name} is UTF-16 text: save it as UTF-8.")
    if b"\0" in data[:8192]:
        raise DatasetError(f"{name} is not text: byte {data.index(0)} is 0. Give a text file in UTF-8.")
    data = data.removeprefix(b"\xef\xbb\xbf")
    records = [] if data.isspace() else list(read(name, data))
    if not records:
        raise DatasetError(f"{name} is empty: it holds no rows.")
    return records


def _reader_of(name: str, path: Path) -> Reader:
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS)
        inside = f", for example {path / files[0]}" if files else ""
        raise DatasetError(f"{name} is a folder: give a file, or a list of files{inside}.")
    if not path.exists():
        near = suggest(path.name, [item.name for item in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise DatasetError(f"{name} does not exist.{near} A relative path starts at {Path.cwd()}.")
    suffix = path.suffix.lower()
    if suffix not in READERS:
        ending = f"the suffix {suffix}" if suffix else "no suffix"
        raise DatasetError(f"{name} has {ending}; files that can be read end in {', '.join(sorted(READERS))}.")
    return READERS[suffix]


@reader(".jsonl", ".ndjson")
def _read_json_lines(name: str, data: bytes) -> Iterator[Record]:
    offset = 0
    # Not splitlines(): U+2028 and its like are no line ends in JSON.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if line.strip():
            yield f"{name}:{number}", _json_line(line, offset)
        offset += len(line) + 1


def _json_line(line: bytes, offset: int) -> dict[str, Any] | RowError:
    try:
        return _columns(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return RowError(f"invalid UTF-8 at byte {offset + error.start} of the file")
    except json.JSONDecodeError as error:
        return RowError(f"broken JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError(f"JSON that cannot be read: {error}")


@reader(".json")
def _read_json(name: str, data: bytes) -> Iterator[Record]:
    """Read an array of objects, or JSONL under the wrong suffix."""
    text = _decode(name, data)
    if text.lstrip().startswith("{") and not _is_one_object(text):
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


def _is_one_object(text: str) -> bool:
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
