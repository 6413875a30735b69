"""Where another program's settings come from: a YAML file, or a command line."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmtk import ConfigurationError
from llmtk.config.reading import read_as_written, read_value

_TRUTHS = {"yes": True, "Yes": True, "YES": True, "on": True, "On": True, "ON": True} | {
    "no": False, "No": False, "NO": False, "off": False, "Off": False, "OFF": False,
}  # fmt: skip
_COUNTS = re.compile(r"--(num_processes|nproc[_-]per[_-]node|nnodes)[ =](\d+)")
"""How accelerate and torchrun are told in how many processes."""


class Command(NamedTuple):
    """A command line of TRL's."""

    method: str
    settings: dict[str, Any]
    """Those of its file, and its flags over them; and how many processes it was launched in, if that was said."""
    launcher: str = ""
    """The words that start it in several processes."""


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


def read_command(words: Sequence[str], known: frozenset[str], method: str | None = None) -> Command:
    """Return the method and the settings of `trl sft --learning_rate 1e-5 ...`, or of `... sft.py --learning_rate ...`.

    A method that is given goes before the script's name. Raises ConfigurationError for another command, and for a
    flag without a name.
    """
    at = next((index for index, word in enumerate(words) if _method(words, index)), None)
    if at is None and (other := _other_program(words)):
        file = next((word for word in words if word.endswith((".yaml", ".yml", ".json"))), "FILE.yaml")
        raise ConfigurationError(
            f"{other}'s settings are read from a file, not from a command line: llmtk convert {file}"
        )
    if at is None:
        raise ConfigurationError(
            "give one file, or TRL's command line: llmtk convert trl sft --learning_rate 1e-5 ... "
            f"(got {' '.join(words[:4])}{' ...' if len(words) > 4 else ''})"
        )
    flags = _flags(words[at + 1 :], known)
    file = flags.pop("config", None)
    settings = ({} if file is None else read_settings(str(file))) | flags
    launcher = _launcher(words[:at])
    return Command(method or _method(words, at), _processes(launcher) | settings, " ".join(launcher))


def _launcher(words: Sequence[str]) -> list[str]:
    """Return the words before a script or `trl`, unless they are Python alone."""
    before = [word for word in words if Path(word).name != "trl"]
    return [] if len(before) == 1 and Path(before[0]).name.startswith("python") else before


def _processes(launcher: Sequence[str]) -> dict[str, Any]:
    """Return the number of processes that accelerate or torchrun is told, as the setting of TRL's command."""
    told = {name.replace("-", "_"): int(count) for name, count in _COUNTS.findall(" ".join(launcher))}
    if "nproc_per_node" in told:
        return {"num_processes": told["nproc_per_node"] * told.get("nnodes", 1)}
    return {"num_processes": told["num_processes"]} if "num_processes" in told else {}


def _other_program(words: Sequence[str]) -> str:
    """Return whose command line this is, if it is LLaMA-Factory's or axolotl's."""
    names = {Path(word).name.partition(".")[0] for word in words}
    return "LLaMA-Factory" if names & {"llamafactory-cli", "lmf"} else "axolotl" if "axolotl" in names else ""


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
