"""Training data that is read as it goes, block by block, for what memory cannot hold.

A block is the next records of one source, so that a place in the data is a number of blocks, and those before it are
passed over unread: lines are counted and not parsed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.config.sections import SourceConfig, sources_of
from llmtk.data.catalog import look_up, read_catalog
from llmtk.data.hub import is_hub_name, stream_hub
from llmtk.data.reading import Reading, reading_of
from llmtk.data.sources import Record, read_line, refuse_missing
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from llmtk.config.sections import DataConfig
    from llmtk.data.rows import Row

BLOCK = 1024
"""Records of a block. Changing it changes the order of every stream."""

Units = tuple[Iterable[Any], Callable[[Any], Record]]
"""What a source gives one after the other, and what makes a record of it."""


def stream_blocks(
    config: DataConfig, row_types: Sequence[str], say: Callable[[str], None], skip: int = 0
) -> Iterator[list[Row]]:
    """Yield the checked rows of the training data, a block at a time, from block number ``skip`` on.

    The columns of a source's first block tell its format, and ``say`` is told of those that are not used. Raises
    :class:`DatasetError` for a source that cannot be read, and for bad rows when their block comes.
    """
    reading = reading_of(config, row_types)
    for given in sources_of(config.train):
        source = look_up(given, reading.catalog)
        units, record = _open(source)
        for block in _blocks(source, units, record, reading, skip):
            skip = max(skip - 1, 0)
            if block is not None:
                reading.refuse_bad()
                for notice in reading.notices:
                    say(notice)
                reading.notices.clear()
                yield block


def check_stream(config: DataConfig) -> None:
    """Raise :class:`ConfigurationError` or :class:`DatasetError` where the training data cannot be streamed."""
    sources = sources_of(config.train)
    if not sources:
        raise ConfigurationError("data.streaming: give files or data sets as data.train, in place of rows")
    catalog = read_catalog(config.catalog)
    for source in sources:
        _open(look_up(source, catalog))


def sizes(config: DataConfig) -> dict[str, int | None]:
    """Return the bytes of each source, by its path: all that is known of a stream before it is read. None: the hub."""
    catalog = read_catalog(config.catalog)
    paths = [look_up(source, catalog).path for source in sources_of(config.train)]
    return {path: None if is_hub_name(path) else Path(path).expanduser().stat().st_size for path in paths}


def _blocks(
    source: SourceConfig, units: Iterable[Any], record: Callable[[Any], Record], reading: Reading, skip: int
) -> Iterator[list[Row] | None]:
    """Yield the rows of each block, and None for those to be passed over."""
    form, pending = None, iter(units)
    for number, block in enumerate(iter(lambda: list(islice(pending, BLOCK)), [])):
        if number < skip and number > 0:
            yield None
            continue
        rows, form = reading.read(source, [record(unit) for unit in block], form)
        yield None if number < skip else rows
    if form is None:
        raise DatasetError(f"{source.path} is empty: it holds no rows.")


def _open(source: SourceConfig) -> Units:
    if is_hub_name(source.path):
        return stream_hub(source), lambda unit: (f"{source.path}: row {unit[0]}", unit[1])
    path = Path(source.path).expanduser()
    refuse_missing(source.path, path)
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigurationError(
            f"data.streaming reads .jsonl files and data sets on the hub, and {source.path} is neither. Leave it out, "
            "or write the rows as JSONL"
        )
    return _lines(path), lambda unit: (f"{source.path}:{unit[0]}", read_line(unit[2], unit[1]))


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number, offset, line) of the lines that hold anything."""
    offset = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, offset, line
                offset += len(line)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}.") from error
