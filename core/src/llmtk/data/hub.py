"""Data sets of the `datasets` library: saved to a folder, or on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, DatasetError
from llmtk.hub import why_unreachable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llmtk.config.sections import SourceConfig
    from llmtk.data.files import Record

_WITHOUT = "Without a network, give a file, or a folder that `datasets` has saved."
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_saved(path: Path) -> bool:
    """Whether `datasets` has saved something in this folder: one split, or several."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def is_hub_name(name: str) -> bool:
    """Whether a name is looked for on the hub: OWNER/NAME, where there is neither such a file nor such a folder."""
    path = Path(name).expanduser()
    return bool(_HUB_NAME.fullmatch(name)) and not path.exists() and not path.parent.is_dir()


def read_saved(source: SourceConfig) -> list[Record]:
    """Return the rows of a saved data set. Raises :class:`DatasetError` for one that is damaged, or lacks the split."""
    from datasets import load_from_disk

    refuse(source, ("name", "revision"), "is a folder here, and this is for data sets on the hub")
    try:
        loaded = load_from_disk(str(Path(source.path).expanduser()))
    except Exception as error:  # whatever `datasets`, pyarrow or json raise at a damaged file
        raise DatasetError(f"{source.path}: the saved data set cannot be read: {_first_line(error)}.") from error
    return _rows(source, _split(source, loaded))


def read_hub(source: SourceConfig) -> list[Record]:
    """Return the rows of a data set on the hub.

    Raises :class:`DatasetError` where it is not there, cannot be reached or read, or lacks the split.
    """
    from datasets import load_dataset

    _check_reachable(source.path)
    try:
        loaded = load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # of the network, of the hub's client, of whatever reads the files
        raise _unreachable(source, error) from error
    return _rows(source, _split(source, loaded) if source.split is None else loaded)


def stream_hub(source: SourceConfig) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of one split of a data set on the hub, as they arrive.

    Raises :class:`DatasetError` as :func:`read_hub` does, and for one of several splits of which none is named.
    """
    from datasets import load_dataset

    _check_reachable(source.path)
    try:
        loaded = load_dataset(source.path, source.name, split=source.split, revision=source.revision, streaming=True)
        rows = _split(source, loaded) if source.split is None else loaded
        yield from enumerate(rows, start=1)
    except DatasetError:
        raise
    except Exception as error:  # as above, and at any row
        raise _unreachable(source, error) from error


def refuse(source: SourceConfig, keys: tuple[str, ...], why: str) -> None:
    """Raise :class:`ConfigurationError` for settings that this kind of source has no use for."""
    for key in keys:
        if getattr(source, key) is not None:
            raise ConfigurationError(f"{source.path} {why}: leave {key} out.")


def _check_reachable(name: str) -> None:
    if reason := why_unreachable("dataset", name):
        raise DatasetError(f"{name} does not exist here, and {reason}. Check the name, or the network. {_WITHOUT}")


def _unreachable(source: SourceConfig, error: Exception) -> DatasetError:
    return DatasetError(
        f"{source.path} (no such file here, so it was looked for on the hub) cannot be loaded: {_first_line(error)}. "
        f"Check its name, configuration (name), split and the network. {_WITHOUT}"
    )


def _split(source: SourceConfig, loaded: Any) -> Any:
    """Return the split that is asked for, or the only one."""
    if not isinstance(loaded, dict):  # `datasets` keeps several splits in a kind of dict
        refuse(source, ("split",), "holds one split, as it is")
        return loaded
    if source.split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if source.split not in loaded:
        first = next(iter(loaded), "train")
        raise DatasetError(
            f"{source.path} has the splits {', '.join(loaded)}: give one, {{path: {source.path}, split: {first}}}."
        )
    return loaded[source.split]


def _rows(source: SourceConfig, rows: Any) -> list[Record]:
    return [(f"{source.path}: row {number}", row) for number, row in enumerate(rows, start=1)]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
