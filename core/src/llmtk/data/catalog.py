"""The user's own list of data sets: a YAML file of names, each with its path and how it is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from llmtk.config.problems import explain
from llmtk.config.reading import read_file
from llmtk.config.sections import SourceConfig
from llmtk.errors import ConfigurationError

Catalog = dict[str, SourceConfig]


def read_catalog(path: str | None) -> Catalog:
    """Return the data sets that a file names; none where there is no file.

    Raises :class:`ConfigurationError` for a file that cannot be read, and for an entry that is no source.
    """
    if path is None:
        return {}
    file = Path(path).expanduser()
    return {name: _entry(file, name, value) for name, value in read_file(file).items()}


def look_up(source: SourceConfig, catalog: Catalog) -> SourceConfig:
    """Return the source that a name stands for; what the run says of it goes over what the catalog says."""
    named = catalog.get(source.path)
    if named is None:
        return source
    given = {key: getattr(source, key) for key in source.model_fields_set - {"path"}}
    return named.model_copy(update=given)


def _entry(file: Path, name: str, value: Any) -> SourceConfig:
    settings = value if isinstance(value, Mapping) else {"path": value}
    try:
        source = SourceConfig.model_validate(settings)
    except ValidationError as error:
        mend = "An entry is NAME: PATH, or NAME: {path: ..., columns: ...}."
        raise ConfigurationError(f"{file}: {name}: {explain(error, settings, SourceConfig, mend)}") from None
    if "weight" in source.model_fields_set:
        raise ConfigurationError(f"{file}: {name}: weight belongs to a run: give it in data.train")
    beside = file.parent / Path(source.path).expanduser()
    return source.model_copy(update={"path": str(beside)}) if beside.exists() else source
