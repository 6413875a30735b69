"""What a sweep varies: settings, each with the values that it may take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtk.config.reading import parse_overrides
from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_RANGE = re.compile(r"(?P<low>[^.].*?)\.\.(?P<high>.+?)(?P<log>:log)?")


@dataclass(frozen=True)
class Choice:
    """One of several values, of any kind that a configuration has."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values by which it is checked whether the setting takes them all."""
        return self.values

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna knows it: texts, since a value may be a list."""
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution([json.dumps(value) for value in self.values])

    def value(self, drawn: Any) -> Any:
        """Return the value that stands for what Optuna drew."""
        return json.loads(drawn)


@dataclass(frozen=True)
class Range:
    """A number between two, both included; an integer if both are."""

    low: float
    high: float
    log: bool = False
    """Whether 1 to 10 is as likely as 10 to 100."""

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values by which it is checked whether the setting takes them all."""
        return self.low, self.high

    def distribution(self) -> BaseDistribution:
        """Return it as Optuna knows it."""
        from optuna.distributions import FloatDistribution, IntDistribution

        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return (IntDistribution if whole else FloatDistribution)(self.low, self.high, log=self.log)  # type: ignore[arg-type]

    def value(self, drawn: Any) -> Any:
        """Return the value that stands for what Optuna drew."""
        return drawn


Space = Mapping[str, Choice | Range]


def read_space(over: Sequence[str]) -> Space:
    """Read `KEY=a,b,c`, `KEY=low..high` and `KEY=low..high:log`. ConfigurationError for one that is neither."""
    space: dict[str, Choice | Range] = {}
    for spec in over:
        key, equals, values = spec.partition("=")
        if not equals or not key or not values:
            raise ConfigurationError(
                f"--over {spec}: write KEY=VALUES, such as train.learning_rate=1e-5..1e-3:log or peft.r=4,8,16"
            )
        if key in space:
            raise ConfigurationError(f"--over {key} stands twice; give all of its values at once")
        if key == "output_dir":
            raise ConfigurationError("--over output_dir: each trial has a folder of its own, below --output-dir")
        found = _RANGE.fullmatch(values)
        space[key] = _range(spec, **found.groupdict()) if found else _choice(spec, values)
    return space


def _range(spec: str, low: str, high: str, log: str | None) -> Range:
    numbers = [_value(spec, text) for text in (low, high)]
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in numbers):
        raise ConfigurationError(f"--over {spec}: a range is between two numbers, such as 1e-5..1e-3")
    if not numbers[0] < numbers[1]:
        raise ConfigurationError(f"--over {spec}: a range goes from the smaller number to the larger")
    if log and numbers[0] <= 0:
        raise ConfigurationError(f"--over {spec}: a logarithmic range begins above 0")
    return Range(numbers[0], numbers[1], log=bool(log))


def _choice(spec: str, values: str) -> Choice:
    listed = _value(spec, f"[{values}]")
    texts = [json.dumps(value) for value in listed]
    if len(set(texts)) < len(texts):
        raise ConfigurationError(f"--over {spec}: a value stands twice")
    return Choice(tuple(listed))


def _value(spec: str, text: str) -> Any:
    try:
        return parse_overrides([f"value={text}"])["value"]
    except ConfigurationError as error:
        raise ConfigurationError(f"--over {spec}: {error}") from error
