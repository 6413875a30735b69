"""What is wrong with a configuration, in plain words: pydantic's errors as one `ConfigurationError`.

Pydantic reports every branch of a union as an error of its own. Here each key gets one line, for the branch that the
value comes nearest to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from llmtk.config.other_names import NO_KEY, OTHER_NAMES
from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pydantic import ValidationError
    from pydantic.fields import FieldInfo
    from pydantic_core import ErrorDetails

_EXPECTED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_from_float": "a whole number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "keys and values",
    "mapping_type": "keys and values",
    "model_type": "keys and values",
    "model_attributes_type": "keys and values",
    "none_required": "nothing",
    "invalid_key": "text as a key",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "at most {le:g}",
}
_SHOWN = 20
"""Problems told at once."""
_LONGEST = 60
"""Characters of a wrong value that are shown."""

_FEW = 16
"""Keys of a section that are listed in place of a suggestion."""

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class _Problem:
    path: Path
    branch: tuple[Path, str] | None
    """The nearest union around it: where it stands, and which of its branches this is."""
    error: ErrorDetails


def explain(
    error: ValidationError, settings: Mapping[str, Any], model: type[BaseModel], mend: str
) -> ConfigurationError:
    """Return the ConfigurationError that tells, key by key, what pydantic refused in `settings`."""
    problems = _nearest([_placed(item, settings) for item in error.errors(include_url=False)])
    return failure(list(_lines(problems, model)), mend)


def failure(lines: Sequence[str], mend: str) -> ConfigurationError:
    """Return one error for one or several problems, which ends with what to do."""
    if len(lines) == 1:
        return ConfigurationError(f"{lines[0]}\n{mend}")
    rest = len(lines) - _SHOWN
    shown = [f"  {line}" for line in lines[:_SHOWN]] + ([f"  and {rest} more"] if rest > 0 else [])
    return ConfigurationError("\n".join([f"The configuration has {len(lines)} problems:", *shown, mend]))


def shown(value: Any) -> str:
    """Return a value as a user would write it, shortened."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    text = {"null": "nothing", '""': "empty text"}.get(text, text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a key's type is, or may be (`PeftConfig | None`)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the keys of a section as a user writes them."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Give every key of a configuration, dotted."""
    for name, field in fields(model).items():
        yield f"{prefix}{name}"
        if section := section_of(field.annotation):
            yield from known_keys(section, f"{prefix}{name}.")


def _placed(error: ErrorDetails, settings: Mapping[str, Any]) -> _Problem:
    """Tell the keys in an error's location from the names of a union's branches, which are no part of the settings."""
    path: Path = ()
    branch: tuple[Path, str] | None = None
    value: Any = settings
    *parents, last = error["loc"] or ("",)
    for part in parents:
        value, found = _item(value, part)
        if found:
            path = (*path, part)
        else:
            branch = path, str(part)
    if error["type"] in ("missing", "extra_forbidden", "invalid_key") or _item(value, last)[1]:
        path = (*path, last)
    elif last != "":
        branch = path, str(last)
    return _Problem(path, branch, error)


def _item(value: Any, part: str | int) -> tuple[Any, bool]:
    if isinstance(value, Mapping) and part in value:
        return value[part], True
    if isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
        return value[part], True
    return value, False


def _nearest(problems: list[_Problem]) -> list[_Problem]:
    """Keep, of each union's branches, those that took in the value itself and refused the least of what is in it."""
    counts: dict[tuple[Path, str], int] = {}
    for problem in problems:
        if problem.branch and len(problem.path) > len(problem.branch[0]):
            counts[problem.branch] = counts.get(problem.branch, 0) + 1
    least: dict[Path, int] = {}
    for (union, _), count in counts.items():
        least[union] = min(count, least.get(union, count))
    return [
        problem
        for problem in problems
        if not problem.branch
        or problem.branch[0] not in least
        or counts.get(problem.branch) == least[problem.branch[0]]
    ]


def _lines(problems: Iterable[_Problem], model: type[BaseModel]) -> Iterator[str]:
    expected: dict[Path, list[str]] = {}
    got: dict[Path, Any] = {}
    for problem in problems:
        if phrase := _phrase(problem.error):
            got[problem.path] = problem.error["input"]
            phrases = expected.setdefault(problem.path, [])
            phrases.extend([] if phrase in phrases else [phrase])
        else:
            yield _sentence(problem, model)
    for path, phrases in expected.items():
        yield f"{_dotted(path)}expected {' or '.join(phrases)}, got {shown(got[path])}{_quotes(phrases, got[path])}"


def _phrase(error: ErrorDetails) -> str | None:
    template = _EXPECTED.get(error["type"])
    return template.format(**error.get("ctx", {})) if template else None


def _quotes(phrases: Sequence[str], value: Any) -> str:
    if phrases != ["text"] or not isinstance(value, int | float):
        return ""
    return f'; quote it to make it text: "{shown(value)}"'


def _sentence(problem: _Problem, model: type[BaseModel]) -> str:
    match problem.error["type"]:
        case "extra_forbidden":
            return f"{_dotted(problem.path)}unknown key.{_suggestion(problem.path, model)}"
        case "missing":
            return f"{_dotted(problem.path)}required, and not given"
        case "value_error" | "assertion_error":
            return f"{_dotted(problem.path)}{problem.error['ctx']['error']}"
        case _:
            message = problem.error["msg"]
            return f"{_dotted(problem.path)}{message[:1].lower()}{message[1:]}, got {shown(problem.error['input'])}"


def _suggestion(path: Path, model: type[BaseModel]) -> str:
    """Name the key that was meant: as `meant` tells, else the nearest in this section, else anywhere."""
    prefix, key = "".join(f"{part}." for part in path[:-1]), str(path[-1])
    if key in NO_KEY:
        return f" {NO_KEY[key]}."
    known = list(known_keys(model))
    here = [name for name in known if name.rpartition(".")[0] == prefix.rstrip(".")]
    near = meant(key, model) or _close_leaf(key, here, cutoff=0.6) or _close_leaf(key, known, cutoff=0.75)
    return f" Did you mean {' or '.join(near)}?" if near else _choices(here, prefix)


def meant(key: str, model: type[BaseModel]) -> list[str]:
    """Return the keys, dotted, that are called so in any section, or that another program calls so."""
    key = key.replace("-", "_")
    same = [name for name in known_keys(model) if key in (name, name.rpartition(".")[2])]
    return same or ([OTHER_NAMES[key]] if key in OTHER_NAMES else [])


def _close_leaf(key: str, names: Iterable[str], *, cutoff: float) -> list[str]:
    leaves = {name.rpartition(".")[2]: name for name in names}
    return [leaves[leaf] for leaf in get_close_matches(key, leaves, n=1, cutoff=cutoff)]


def _choices(names: Sequence[str], prefix: str) -> str:
    if not names or len(names) > _FEW:
        return ""
    return f" The keys here are {', '.join(name.removeprefix(prefix) for name in names)}."


def _dotted(path: Path) -> str:
    return f"{'.'.join(map(str, path))}: " if path else ""
