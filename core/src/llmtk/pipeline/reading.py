"""The file of a pipeline: its steps, and what one takes from another.

    train: {bf16: false}                      # sections at the top are for every step
    steps:
      sft: {model: {name_or_path: builtin}, data: {train: rows.jsonl}}
      dpo: {model: {name_or_path: step:sft}, data: {train: pairs.jsonl}}

A step's settings are those of a run. `stage` is by default the step's name, and the text `step:NAME` stands for the
folder of a step before it, wherever a path may stand; `step:NAME/FILE` for a file in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtk.config.reading import merge, parse_overrides, read_file, without_shorthands
from llmtk.errors import ConfigurationError, suggest

STEPS, OUTPUT, OLD = "steps", "output_dir", "old"
_NAME = re.compile(r"[A-Za-z][\w-]*")
_REFERENCE = re.compile(r"step:(?P<name>[\w-]+)(?P<rest>/.*)?")


@dataclass(frozen=True)
class Step:
    """One run of a pipeline."""

    name: str
    stage: str
    folder: Path
    """Where its run is written."""
    settings: Mapping[str, Any]
    """Its configuration, the folders of other steps filled in."""
    takes: Mapping[str, str]
    """Which settings name which steps: `model.name_or_path` -> `sft`."""


def read_steps(file: str | Path, overrides: Sequence[str] = ()) -> tuple[Path, list[Step]]:
    """Return the folder of a pipeline, and its steps in their order.

    `overrides` are `key=value`, over what the file has: `steps.NAME.train.max_steps=10` for one step,
    `train.max_steps=10` for all. Raises one ConfigurationError that lists what is wrong with the file.
    """
    layers = {str(file): read_file(file), "the command line": parse_overrides(overrides)}
    for place, layer in layers.items():
        _check_keys(layer, place)
    written, asked = (_by_name(layer, place) for place, layer in layers.items())
    if not written:
        raise ConfigurationError(
            f"{file}: a pipeline needs steps: {{NAME: {{stage: ..., model: ..., data: ...}}, ...}}"
        )
    folder = Path(str(merge(*layers.values()).get(OUTPUT) or f"runs/{Path(file).stem}"))
    shared, asked_of_all = (_without(layer, STEPS, OUTPUT) for layer in layers.values())
    # The command line lies over the file, and in each of them a step's own settings over those of all.
    settings = {
        name: merge(*map(without_shorthands, (shared, own, asked_of_all, asked.get(name, {}))))
        for name, own in written.items()
    }
    if problems := [*_misnamed(written, asked), *_misplaced(settings, folder)]:
        raise ConfigurationError("\n".join([f"{file}: this pipeline cannot be run:", *(f"  {p}" for p in problems)]))
    return folder, [_step(name, own, folder) for name, own in settings.items()]


def texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in nested settings, with its dotted key."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, str):
        yield key, value
    for name, item in items:
        yield from texts(item, f"{key}.{name}".lstrip("."))


def _check_keys(layer: Mapping[str, Any], place: str) -> None:
    from llmtk.config.run_config import RunConfig

    shared = [key for key in RunConfig.model_fields if key not in ("stage", "options", OUTPUT)]
    known = (STEPS, OUTPUT, *shared)
    for key in layer:
        if key not in known:
            raise ConfigurationError(
                f"{place}: {key} is no key of a pipeline: it has {STEPS}, {OUTPUT}, and sections for all steps "
                f"({', '.join(shared)}). What is for one step stands below it.{suggest(str(key), known)}"
            )


def _by_name(layer: Mapping[str, Any], place: str) -> dict[Any, Mapping[str, Any]]:
    steps = layer.get(STEPS) or {}
    if not isinstance(steps, Mapping):
        raise ConfigurationError(f"{place}: steps are names and their settings, {{sft: {{...}}, dpo: {{...}}}}")
    for name, settings in steps.items():
        if not isinstance(settings, Mapping | None):
            raise ConfigurationError(f"{place}: {STEPS}.{name} is {settings!r}; a step is keys and values, as of a run")
    return {name: settings or {} for name, settings in steps.items()}


def _misnamed(written: Mapping[Any, Any], asked: Mapping[Any, Any]) -> Iterator[str]:
    """Yield what is wrong with names: each names a folder, also where `A` and `a` are the same one."""
    folders: dict[str, str] = {}
    for name in written:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            yield f"steps: {name!r} is no name: a letter, and then letters, digits, - and _"
        elif name.lower() == OLD:
            yield f"steps: {name} is the folder of runs that were made anew; give the step another name"
        elif (other := folders.setdefault(name.lower(), name)) != name:
            yield f"steps: {other} and {name} would share a folder; give one another name"
    for name in asked:
        if name not in written:
            yield f"steps.{name}: there is no such step.{suggest(str(name), map(str, written))}"


def _misplaced(steps: Mapping[str, Mapping[str, Any]], folder: Path) -> Iterator[str]:
    """Yield what a step cannot have: a folder of its own, and what is not made before it."""
    names = list(steps)
    for index, (name, settings) in enumerate(steps.items()):
        if settings.get(OUTPUT) is not None:
            yield f"steps.{name}.{OUTPUT}: a step is written to {folder / str(name)}; leave it out"
        train = settings.get("train")
        if isinstance(train, Mapping) and train.get("resume_from_checkpoint"):
            yield f"steps.{name}.train.resume_from_checkpoint: a pipeline goes on by itself; leave it out"
        for key, text in texts(settings):
            if problem := _bad_reference(text, name, names[:index], names, folder):
                yield f"steps.{name}.{key}: {problem}"


def _bad_reference(text: str, name: str, before: list[str], names: list[str], folder: Path) -> str | None:
    if found := _REFERENCE.fullmatch(text):
        other = found["name"]
        if other == name:
            return f"{text} is the step itself; name one before it"
        if other in names and other not in before:
            return f"{text} comes after it; steps are run in the order of the file, so move {other} up"
        if other not in names:
            return f"{text}: there is no such step.{suggest(other, before)}"
    for other in names:
        if Path(text) in ((own := folder / str(other)), own.absolute()):
            return f"{text} is the folder of a step; write step:{other}"
    return None


def _step(name: str, settings: Mapping[str, Any], folder: Path) -> Step:
    takes = {key: found["name"] for key, text in texts(settings) if (found := _REFERENCE.fullmatch(text))}
    own = _filled(_without(settings, "stage", OUTPUT), folder)
    return Step(name, str(settings.get("stage") or name), folder / name, own, takes)


def _without(settings: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in keys}


def _filled(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, folder) for item in value]
    if isinstance(value, str) and (found := _REFERENCE.fullmatch(value)):
        return f"{folder / found['name']}{found['rest'] or ''}"
    return value
