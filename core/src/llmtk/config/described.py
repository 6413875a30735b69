"""Every key of a stage's configuration in words, for `llmtk show`."""

from __future__ import annotations

import json
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel

from llmtk.config.problems import fields, section_of
from llmtk.config.run_config import OPTIONAL_KEYS, run_config_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pydantic.fields import FieldInfo

    from llmtk.contract import Stage

_WORDS: dict[Any, str] = {
    bool: "true | false",
    int: "whole number",
    float: "number",
    str: "text",
    NoneType: "null",
    Any: "anything",
    dict: "keys and values",
}


class Key(NamedTuple):
    """A key or a section of the configuration."""

    key: str
    type: str
    default: str | None
    """As in YAML; None where the key is required."""
    help: str
    is_section: bool


def described_keys(stage_name: str, stage_class: type[Stage]) -> list[Key]:
    """Return the keys of a stage's configuration that it honours, dotted; its own section first.

    Raises PluginError as `run_config_model` does.
    """
    unused = {"stage"} | {f"train.{key}" for key in OPTIONAL_KEYS - stage_class.honours}
    keys = [key for key in _keys(run_config_model(stage_name, stage_class)) if key.key not in unused]
    return sorted(keys, key=lambda key: key.key.split(".")[0] != stage_name)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    for name, field in fields(model).items():
        key, section = f"{prefix}{name}", section_of(field.annotation)
        help_text = " ".join((field.description or "").split())
        yield Key(key, _type(field.annotation), _default(field), help_text, section is field.annotation)
        if section:
            yield from _keys(section, f"{key}.")


def _type(annotation: Any) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(dict.fromkeys(map(_type, arguments)))
    if origin in (list, tuple, set, frozenset):
        return f"list of {_type(arguments[0])}" if arguments else "list"
    return _WORDS.get(origin or annotation, str(getattr(annotation, "__name__", annotation)))


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True, validated_data={})
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return json.dumps(plain, ensure_ascii=False, default=str)
