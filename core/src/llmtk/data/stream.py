"""Training data that is read as it goes, block by block, for what memory cannot hold.

A block is the next records of one source, so that a place in the data is a number of blocks, and those before it are
passed over unread: lines are counted and not parsed, row groups of Parquet files not opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.config.sections import SourceConfig, sources_of
from llmtk.data.catalog import look_up, read_catalog
from llmtk.data.files import STREAMED, Record, Unread, read_file
from llmtk.data.hub import is_hub_name, refuse, stream_hub
from llmtk.data.reading import Reading, reading_of
from llmtk.data.sources import refuse_missing
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from llmtk.config.sections import DataConfig
    from llmtk.data.rows import Row

BLOCK = 1024
"""Records of a block. Changing it changes the order of every stream."""


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
        for block in _blocks(source, reading, skip):
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
        _check(look_up(source, catalog))


def sizes(config: DataConfig) -> dict[str, int | None]:
    """Return the bytes of each source, by its path: all that is known of a stream before it is read. None: the hub."""
    catalog = read_catalog(config.catalog)
    paths = [look_up(source, catalog).path for source in sources_of(config.train)]
    return {path: None if is_hub_name(path) else Path(path).expanduser().stat().st_size for path in paths}


def _blocks(source: SourceConfig, reading: Reading, skip: int) -> Iterator[list[Row] | None]:
    """Yield the rows of each block, and None for those to be passed over."""
    form, pending = None, _open(source)
    for number in count():
        unread = islice(pending, BLOCK)
        if 0 < number < skip:
            if not sum(1 for _ in unread):
                break
            yield None
            continue
        records = [read() for read in unread]
        if not records:
            break
        rows, form = reading.read(source, records, form)
        yield None if number < skip else rows
    if form is None:
        raise _empty(source)


def _check(source: SourceConfig) -> None:
    """Refuse what cannot be streamed; of a file, the first record is read."""
    if is_hub_name(source.path):
        return
    path = Path(source.path).expanduser()
    refuse_missing(source.path, path)
    refuse(source, ("name", "split", "revision"), "is no data set on the hub, and this is for those")
    if path.suffix.lower() not in STREAMED:
        raise ConfigurationError(
            f"data.streaming reads {', '.join(sorted(STREAMED))} files and data sets on the hub, and {source.path} is "
            "neither. Leave it out, or write the rows as JSONL"
        )
    for read in _open(source):
        read()
        return
    raise _empty(source)


def _open(source: SourceConfig) -> Iterator[Unread]:
    if is_hub_name(source.path):
        return (partial(_hub_row, source.path, number, row) for number, row in stream_hub(source))
    return read_file(source.path, Path(source.path).expanduser())


def _hub_row(path: str, number: int, row: dict[str, Any]) -> Record:
    return f"{path}: row {number}", row


def _empty(source: SourceConfig) -> DatasetError:
    return DatasetError(f"{source.path} is empty: it holds no rows.")
