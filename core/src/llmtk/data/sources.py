"""Where records come from: files, data sets of the `datasets` library, or Python objects."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmtk.config.sections import SourceConfig
from llmtk.data.catalog import Catalog, look_up
from llmtk.data.files import READERS, Record, columns_of, read_file
from llmtk.data.hub import is_hub_name, is_saved, read_hub, read_saved, refuse
from llmtk.errors import DatasetError, suggest

GIVEN = "The data given as a list"
"""What messages call rows that are Python objects."""


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
        yield SourceConfig(path=GIVEN), [(f"row {n}", columns_of(item)) for n, item in enumerate(items, start=1)]


def _read(source: SourceConfig, catalog: Catalog) -> list[Record]:
    path = Path(source.path).expanduser()
    if is_hub_name(source.path):
        records = read_hub(source)
    elif path.is_dir() and is_saved(path):
        records = read_saved(source)
    else:
        refuse(source, ("name", "split", "revision"), "is a file, and this is for data sets that `datasets` loads")
        _check_file(source.path, path, catalog)
        records = [unread() for unread in read_file(source.path, path)]
    if not records:
        raise DatasetError(f"{source.path} is empty: it holds no rows.")
    return records


def _check_file(name: str, path: Path, catalog: Catalog) -> None:
    if path.is_dir():
        files = sorted(item.name for item in path.iterdir() if item.suffix.lower() in READERS)
        inside = f", for example {path / files[0]}" if files else ""
        raise DatasetError(f"{name} is a folder: give a file, or a list of files{inside}.")
    refuse_missing(name, path, catalog)
    suffix = path.suffix.lower()
    if suffix not in READERS:
        ending = f"the suffix {suffix}" if suffix else "no suffix"
        raise DatasetError(f"{name} has {ending}; files that can be read end in {', '.join(sorted(READERS))}.")


def refuse_missing(name: str, path: Path, catalog: Iterable[str] = ()) -> None:
    """Raise :class:`DatasetError` where there is no such file, with the near ones that there are."""
    if path.exists():
        return
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = suggest(path.name, [*beside, *catalog])
    listed = f" data.catalog names {', '.join(catalog)}." if catalog else ""
    raise DatasetError(f"{name} does not exist.{near}{listed} A relative path starts at {Path.cwd()}.")
