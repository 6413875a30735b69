"""Where settings come from: a YAML file, `key=value` overrides, environment variables.

YAML is read by the core schema of YAML 1.2, in which `5e-7` is a number, `no` is text (a value of `eval_strategy`) and
`2025-01-01` is not a date. Nothing but text, numbers, booleans, null, lists and mappings can come out of a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_CORE_SCHEMA = {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
    "merge": r"<<",
}
# `$${` stands for a literal `${`.
_VARIABLE = re.compile(r"\$\$\{|\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


class Resolver(yaml.resolver.BaseResolver):
    """Tells the type of a plain scalar by the core schema of YAML 1.2."""


for _tag, _pattern in _CORE_SCHEMA.items():
    Resolver.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), None)


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer,
              yaml.constructor.SafeConstructor, Resolver):  # fmt: skip
    """PyYAML's safe loader with other types of scalars, and an error where a key stands twice."""

    def __init__(self, text: str) -> None:
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        yaml.constructor.SafeConstructor.__init__(self)
        Resolver.__init__(self)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        _refuse_duplicates(node)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


_Loader.yaml_constructors = {
    tag: _Loader.yaml_constructors[tag]
    for tag in (None, *(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")))
}
# PyYAML reads 010 as octal and 1:30 as base 60.
_Loader.yaml_constructors["tag:yaml.org,2002:int"] = _Loader.construct_decimal


def read_file(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file, its `${VAR}` and `${VAR:-default}` filled in.

    Raises ConfigurationError, with file and line, for a file that is missing or unreadable, broken YAML, a key that
    stands twice, a tag that asks for a Python object, a file that is not a mapping, and a variable that is not set.
    """
    return _fill(read_as_written(path), str(path))


def read_as_written(path: str | Path) -> dict[str, Any]:
    """Return the settings in a YAML file as they stand, its `${VAR}` too: for who shows them. Raises as `read_file`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: there is no such configuration file. Check the path.") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    settings = _load(text, str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{path}: a configuration is keys and values, such as `train: {{learning_rate: 5e-7}}`; "
            f"this file holds {_kind(settings)}."
        )
    return settings


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Return the settings that `train.learning_rate=1e-4` and the like spell; a later one wins.

    Raises ConfigurationError for one without `=`, without a key, with a value that is broken YAML, or that reaches
    into a value given before.
    """
    settings: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigurationError(f"{override}: an override is written KEY=VALUE, such as train.learning_rate=1e-4.")
        parts = key.strip().split(".")
        if not all(parts):
            raise ConfigurationError(f"{override}: the key is incomplete; one looks like train.learning_rate.")
        value = _load(text, override)
        put(settings, parts, value, override)
    return _fill(settings, "the command line")


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Return one mapping in which later layers go over earlier ones, key by key. Lists replace lists."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                below = merged.get(key)
                merged[key] = merge(below if isinstance(below, Mapping) else {}, value)
            else:
                merged[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
    return merged


def without_shorthands(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Spell out `model="name"` and `data="file"` or `data=[rows]`."""
    layer = dict(layer)
    if isinstance(layer.get("model"), str | Path):
        layer["model"] = {"name_or_path": str(layer["model"])}
    if isinstance(layer.get("data"), str | Path | list):
        data = layer["data"]
        layer["data"] = {"train": data if isinstance(data, list) else str(data)}
    return layer


def to_yaml(settings: Mapping[str, Any]) -> str:
    """Return YAML that `read_file` reads back as equal settings.

    Raises ConfigurationError for a value that YAML has no words for.
    """
    try:
        return yaml.dump(
            _escape(settings), Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120
        )
    except yaml.YAMLError as error:
        raise ConfigurationError(f"A value of the configuration cannot be written as YAML: {error}.") from None


class _Dumper(yaml.emitter.Emitter, yaml.serializer.Serializer, yaml.representer.SafeRepresenter, Resolver):
    """PyYAML's safe dumper, which quotes what the loader above would take for a number."""

    def __init__(self, stream: Any, **options: Any) -> None:
        writing = {name: options[name] for name in ("width", "allow_unicode")}
        representing = {name: options[name] for name in ("default_flow_style", "sort_keys")}
        yaml.emitter.Emitter.__init__(self, stream, **writing)
        yaml.serializer.Serializer.__init__(self)
        yaml.representer.SafeRepresenter.__init__(self, **representing)
        Resolver.__init__(self)

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # PyYAML writes these as they are, and reads them back as line breaks.
        style = '"' if re.search("[\x85\u2028\u2029]", text) else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _Dumper.represent_text)


def _load(text: str, place: str) -> Any:
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        raise ConfigurationError(f"{place}{_line(error)}: {_explain(error)}.") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{place}: is not YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise ConfigurationError(f"{place}: is nested too deeply.") from None
    except ValueError as error:  # a number of more digits than Python converts
        raise ConfigurationError(f"{place}: holds a value that cannot be read: {error}.") from None


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f", line {mark.line + 1}" if mark else ""


def _explain(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "broken YAML"
    if "could not determine a constructor" in problem:
        tag = problem.rsplit(" ", 1)[-1].strip("'").replace("tag:yaml.org,2002:", "!!")
        return f"the tag {tag} is refused: a configuration holds plain values only"
    return problem if isinstance(error, _Twice) else f"is not YAML: {problem}"


class _Twice(yaml.constructor.ConstructorError):
    """A key that stands twice in one mapping."""


def _refuse_duplicates(node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
            continue
        if key.value in lines:
            problem = f"the key {key.value!r} stands twice (first in line {lines[key.value]}). Remove one"
            raise _Twice(None, None, problem, key.start_mark)
        lines[key.value] = key.start_mark.line + 1


def put(settings: dict[str, Any], parts: Sequence[str], value: Any, override: str) -> None:
    """Put a value into nested settings. ConfigurationError, which names `override`, where a text is in the way."""
    for depth, part in enumerate(parts[:-1], start=1):
        below = settings.setdefault(part, {})
        if not isinstance(below, dict):
            raise ConfigurationError(f"{override}: {'.'.join(parts[:depth])} was given a value of its own before.")
        settings = below
    settings[parts[-1]] = value


def _fill(settings: dict[str, Any], place: str) -> dict[str, Any]:
    try:
        filled: dict[str, Any] = _filled(settings, (), place)
    except RecursionError:
        raise ConfigurationError(f"{place}: holds an anchor that contains itself.") from None
    return filled


def _filled(value: Any, path: tuple[str, ...], place: str) -> Any:
    if isinstance(value, dict):
        return {key: _filled(item, (*path, str(key)), place) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, (*path, str(index)), place) for index, item in enumerate(value)]
    return _substitute(value, ".".join(path), place) if isinstance(value, str) else value


def _substitute(text: str, key: str, place: str) -> Any:
    """Fill in the variables of a text; a text that is one variable and nothing else becomes a number, true, ..."""

    def replacement(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "${"
        value, default = os.environ.get(match["name"]), match["default"]
        if value is None and default is None:
            raise ConfigurationError(
                f"{place}: {key} uses the environment variable {match['name']}, which is not set. "
                f"Set it, or give a default: ${{{match['name']}:-value}}."
            )
        return value or default or ""  # as in a shell, a default also stands in for an empty variable

    whole = _VARIABLE.fullmatch(text)
    filled = _VARIABLE.sub(replacement, text)
    return _scalar(filled) if whole and whole["name"] else filled


def read_value(text: str) -> Any:
    """Return the number, truth or text that a plain value of a file would be."""
    return _scalar(text)


def _scalar(text: str) -> Any:
    loader = _Loader("")
    tag: str = loader.resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
    return text if tag.endswith(":merge") else loader.construct_object(yaml.ScalarNode(tag, text))


def _escape(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _escape(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_escape(item) for item in value]
    return value.replace("${", "$${") if isinstance(value, str) else value


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"only the value {value!r}"


def dotted(settings: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    """Give every key of nested settings as `train.learning_rate`, and the sections themselves."""
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from dotted(value, f"{prefix}{key}.")
