"""Where another program's settings come from: a YAML file, or a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmtk import ConfigurationError
from llmtk.config.reading import read_as_written, read_value
from llmtk_convert.rules import Settings

_TRUTHS = {"yes": True, "Yes": True, "YES": True, "on": True, "On": True, "ON": True} | {
    "no": False, "No": False, "NO": False, "off": False, "Off": False, "OFF": False,
}  # fmt: skip


class Command(NamedTuple):
    """A command line of TRL's."""

    method: str
    settings: dict[str, Any]
    """Those of its file, and its flags over them."""


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return a file's settings. Raises ConfigurationError, with file and line, as our own configurations do.

    The other programs read YAML 1.1, where yes, no, on and off are true and false; but for a strategy `no` is a word.
    """
    settings = read_as_written(path)
    if not settings:
        raise ConfigurationError(f"{path}: holds no settings.")
    return {str(key): _truth(str(key), value) for key, value in settings.items()}


def _truth(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        return {inner: _truth(str(inner), item) for inner, item in value.items()}
    return _TRUTHS.get(value, value) if isinstance(value, str) and not key.endswith("strategy") else value


def is_command(words: Sequence[str]) -> bool:
    """Tell a command line from a file."""
    return len(words) > 1


def read_command(words: Sequence[str], known: frozenset[str]) -> Command:
    """Return the method and the settings of `trl sft --learning_rate 1e-5 ...`, or of `... sft.py --learning_rate ...`.

    Raises ConfigurationError for another command, and for a flag without a name.
    """
    at = next((index for index, word in enumerate(words) if _method(words, index)), None)
    if at is None:
        raise ConfigurationError(
            "give one file, or TRL's command line: llmtk convert trl sft --learning_rate 1e-5 ... "
            f"(got {' '.join(words[:4])}{' ...' if len(words) > 4 else ''})"
        )
    name = _method(words, at)
    flags = _flags(words[at + 1 :], known)
    file = flags.pop("config", None)
    return Command(name, ({} if file is None else read_settings(str(file))) | flags)


def _method(words: Sequence[str], index: int) -> str:
    """Return the method that a word names: it stands behind `trl`, or is a script."""
    word = Path(words[index])
    if index and Path(words[index - 1]).name == "trl":
        return word.name
    return word.stem if word.suffix == ".py" else ""


def _flags(words: Sequence[str], known: frozenset[str]) -> dict[str, Any]:
    """Read flags as transformers' HfArgumentParser does: one value, several, or none for true; `--no_x` for false."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = [value] if equals else []
        elif not name:
            raise ConfigurationError(f"{word}: a setting of TRL's is written --name value")
        else:
            found[name].append(word)
    return dict(_flag(name, values, known) for name, values in found.items())


def _flag(name: str, values: list[str], known: frozenset[str]) -> tuple[str, Any]:
    if not values:
        positive = name.removeprefix("no_")
        return (positive, False) if positive != name and positive in known and name not in known else (name, True)
    read = [_value(value) for value in values]
    return name, _truth(name, read[0]) if len(read) == 1 else read


def _value(text: str) -> Any:
    try:
        return json.loads(text) if text.startswith(("{", "[")) else read_value(text)
    except json.JSONDecodeError:
        return text


def catalog_of(settings: Settings) -> bool:
    """Tell whether a file is LLaMA-Factory's list of data sets, dataset_info.json."""
    names = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
    return all(isinstance(entry, dict) and any(name in entry for name in names) for entry in settings.values())
