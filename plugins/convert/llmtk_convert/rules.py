"""What becomes of a key of another program: the words that the tables are written in.

A table maps a key to a rule. A rule is the dotted name of our key, where name and meaning carry over as they are, or
one of the classes below. `STAGE.` in our key stands for the section of the stage that is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]
"""The settings of another program, as they are given."""


@dataclass(frozen=True)
class Answer:
    """What becomes of a key that is given."""

    put: Mapping[str, Any] = field(default_factory=dict)
    """Our keys and their values."""
    note: str = ""
    """What is different in meaning; or why it is not carried over."""
    carried: bool = True
    lost: Mapping[str, str] = field(default_factory=dict)
    """Parts of the value that are not carried over, and why."""


def put(values: Mapping[str, Any], note: str = "", lost: Mapping[str, str] | None = None) -> Answer:
    """Carry a key over; with a note, by another meaning; without the parts that are lost."""
    return Answer(values, note, lost=lost or {})


def together(told: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return parts of a value -> why they are lost, of several sources; the same is told once."""
    found: dict[str, list[str]] = {}
    for part, why in told:
        if why not in found.setdefault(part, []):
            found[part].append(why)
    return {part: "; ".join(reasons) for part, reasons in found.items()}


def leave(why: str) -> Answer:
    """Carry a key over to nothing."""
    return Answer(note=why, carried=False)


NOTHING = Answer()
"""A value that asks for nothing."""


@dataclass(frozen=True)
class To:
    """Carried over to a key of ours, with another value, or by another meaning."""

    key: str
    value: Callable[[Any], Any] = lambda value: value
    note: str = ""

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.key,)

    def __call__(self, value: Any, settings: Settings) -> Answer:
        return put({self.key: self.value(value)}, self.note)


@dataclass(frozen=True)
class Leave:
    """Not carried over, and why. A value that only says that it is off asks for nothing."""

    why: str
    off: tuple[Any, ...] = (False, 0, "", "none", "no")
    targets: tuple[str, ...] = ()

    def __call__(self, value: Any, settings: Settings) -> Answer:
        return NOTHING if value in (*self.off, [], {}) else leave(self.why)


@dataclass(frozen=True)
class Done:
    """Needs no key of ours, since a run does so in any case, or since it changes nothing that is trained."""

    why: str = ""
    targets: tuple[str, ...] = ()

    def __call__(self, value: Any, settings: Settings) -> Answer:
        return Answer(note=self.why)


class By:
    """Depends on the value, or on other keys: a function, and the keys of ours that it may put."""

    def __init__(self, function: Callable[[Any, Settings], Answer], *targets: str) -> None:
        self.function = function
        self.targets = targets

    def __call__(self, value: Any, settings: Settings) -> Answer:
        return self.function(value, settings)


Rule = str | To | Leave | Done | By
Table = Mapping[str, Rule]


def same(section: str, *keys: str) -> dict[str, Rule]:
    """Return a table of keys that have the same name in a section of ours. Each text holds keys, with blanks."""
    return {key: f"{section}.{key}" for key in " ".join(keys).split()}


def left(why: str, *keys: str, off: tuple[Any, ...] = (False, 0, "", "none", "no")) -> dict[str, Rule]:
    """Return a table of keys that are left out for one reason. Each text holds keys with blanks between them."""
    return dict.fromkeys(" ".join(keys).split(), Leave(why, off))


ROWS_AS_TEXTS = "there each text is a row, here texts are joined to blocks of data.max_length: a batch holds more"


def joined(*keys: str) -> dict[str, Rule]:
    """Return a table of keys that ask for packing, for texts, which are packed in any case."""

    def rule(value: Any, settings: Settings) -> Answer:
        return NOTHING if value else leave(ROWS_AS_TEXTS)

    return dict.fromkeys(" ".join(keys).split(), By(rule))


def done(why: str, *keys: str) -> dict[str, Rule]:
    """Return a table of keys that need none of ours. Each text holds keys with blanks between them."""
    return dict.fromkeys(" ".join(keys).split(), Done(why))


def targets_of(rule: Rule) -> tuple[str, ...]:
    """Return the keys of ours that a rule may put."""
    return (rule,) if isinstance(rule, str) else rule.targets


def apply(rule: Rule, value: Any, settings: Settings) -> Answer:
    """Return what becomes of a key's value."""
    return put({rule: value}) if isinstance(rule, str) else rule(value, settings)


def as_list(value: Any) -> list[Any]:
    """Return a list, of the one value, or of what commas separate."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]


@dataclass(frozen=True)
class Method:
    """A method of another program."""

    stage: str
    """Our stage."""
    table: Table
    """The keys that it reads."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Our keys -> what the program takes where nothing is said. Written where it is not what the stage takes."""
    remarks: Callable[[Settings], list[str]] = lambda settings: []
    """What is different where a key is not given, and cannot be written down."""


@dataclass(frozen=True)
class Peer:
    """A program whose configurations are read."""

    name: str
    title: str
    version: str
    """The version that the tables were compared with."""
    methods: Mapping[str, Method]
    choose: Callable[[Settings, str | None], str]
    """(settings, the method asked for) -> one of `methods`. ConfigurationError where there is none."""
    prepare: Callable[[Settings], Settings] = lambda settings: settings
    """Brings the settings as they stand in a file into the form that the tables know."""

    @property
    def keys(self) -> frozenset[str]:
        """Every key that a table knows."""
        return frozenset(key for method in self.methods.values() for key in method.table)
