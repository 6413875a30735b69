"""What a step follows from: its settings, and the content of all files that these name."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.config.secrets import concealed
from llmtk.errors import ConfigurationError
from llmtk.folder import INFO, RESULTS, flat, settings_of, sha256_of
from llmtk.pipeline.reading import texts

if TYPE_CHECKING:
    from llmtk.run import Run

UNSEEN = (
    "output_dir",
    "data.cache",
    "data.num_proc",
    "train.dataloader_",
    "train.log_level",
    "train.report_to",
    "train.run_name",
    "train.save_total_limit",
)
"""Settings that neither the model nor its records follow from. What they are is not compared."""
_WITHOUT_FILES = {"stage", "model", "data", "peft", "train", "fsdp", "deepspeed", "output_dir"}
"""Sections in which no text is a path, or that are looked into by key. Others are a stage's or a plugin's to read."""
_LOADED = frozenset({".safetensors", ".json", ".jinja", ".model", ".txt", ".py"})
"""Suffixes of what a model and its tokenizer are loaded from; a run's folder holds more."""


class Hashes:
    """SHA-256 of files. One whose size and time are as before is not read again."""

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.known = dict(known)
        """File -> size, time of its last change in ns, SHA-256."""

    def of(self, file: Path) -> str:
        """Return a file's SHA-256. ConfigurationError where it cannot be read."""
        try:
            stat = file.stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
            if (found := self.known.get(str(file))) is None or found[:2] != stamp:
                found = self.known[str(file)] = [*stamp, sha256_of(file)]
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error
        return str(found[2])

    def of_all(self, path: Path) -> dict[str, str]:
        """Return what `of` gives for a file, or for those of a folder that are loaded."""
        return {str(file): self.of(file) for file in _files(path)}


@dataclass(frozen=True)
class Inputs:
    """What a step follows from. What lies in the pipeline's own folder is named `step:...`."""

    settings: Mapping[str, Any]
    """The whole configuration, flat."""
    files: Mapping[str, str]
    """File -> SHA-256 of its content; of a stream, its size."""

    def changes(self, was: Inputs, given: Iterable[str]) -> dict[str, str]:
        """Return by key or file how these inputs differ from former ones, in words.

        A setting that was not there and is not `given` now is one that a newer version has added: no difference.
        """
        new, old = self.settings, was.settings
        keys = old.keys() | (new.keys() & set(given))
        changed = {key: f"{_shown(old.get(key))} -> {_shown(new.get(key))}" for key in sorted(keys)
                   if old.get(key) != new.get(key)}  # fmt: skip
        names = sorted(self.files.keys() | was.files.keys())
        return changed | {name: "its content" for name in names if self.files.get(name) != was.files.get(name)}


def inputs_of(run: Run, folder: Path, hashes: Hashes) -> Inputs:
    """Return what a run follows from that is made, and not set up. `folder` is the pipeline's."""
    settings = flat(_relative(settings_of(run), folder))
    kept = {key: value for key, value in settings.items() if not key.startswith(UNSEEN)}
    files: dict[str, str] = {}
    for path in _paths(run):
        files |= hashes.of_all(path)
    return Inputs(
        json.loads(concealed(json.dumps(kept, default=str))),
        {**{_relative(name, folder): found for name, found in files.items()}, **_streamed(run)},
    )


def _paths(run: Run) -> Iterator[Path]:
    """Yield the files and folders that a run's configuration names, but for streams."""
    from llmtk.models.checks import BUILTIN

    config = run.config
    model, data = config.model, config.data
    tokenizer = [model.tokenizer] if isinstance(model.tokenizer, str) else []
    own = [text for _, text in texts(config.model_dump(exclude=_WITHOUT_FILES))]
    splits = ("eval", "test") if data.streaming else ("train", "eval", "test")
    named = [model.name_or_path, model.reference, *tokenizer, data.template, data.catalog, *own, *_sources(run, splits)]
    for name in named:
        if name and name != BUILTIN and os.path.exists(path := os.path.expanduser(name)):
            yield Path(path)


def _sources(run: Run, splits: Iterable[str]) -> list[str]:
    from llmtk.config.sections import sources_of
    from llmtk.data.catalog import look_up, read_catalog

    catalog = read_catalog(run.config.data.catalog)
    return [look_up(source, catalog).path for split in splits for source in sources_of(getattr(run.config.data, split))]


def _streamed(run: Run) -> dict[str, str]:
    """Return the size of each file that is streamed: more than memory holds is not read once more to be hashed."""
    files = _sources(run, ["train"]) if run.config.data.streaming else []
    return {file: f"{os.path.getsize(path)} bytes" for file in files
            if os.path.isfile(path := os.path.expanduser(file))}  # fmt: skip


def _files(path: Path) -> list[Path]:
    """Return the file, or those of a folder: of a model what is loaded from it, else all."""
    if path.is_file():
        return [path]
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json", INFO)):
        beside = (file for file in path.iterdir() if file.suffix in _LOADED and file.name not in (INFO, RESULTS))
        return sorted(file for file in beside if file.is_file())
    inside = (
        file for file in path.rglob("*") if not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    return sorted(file for file in inside if file.is_file())


def _relative(value: Any, folder: Path) -> Any:
    """Name what lies in a pipeline's folder by its step, so that the folder may be moved."""
    if isinstance(value, Mapping):
        return {key: _relative(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_relative(item, folder) for item in value]
    if isinstance(value, str) and value.startswith(f"{folder}/"):
        return f"step:{value.removeprefix(f'{folder}/')}"
    return value


def _shown(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
