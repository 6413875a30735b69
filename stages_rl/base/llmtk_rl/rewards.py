"""Rewards of completions: what a configuration asks for, loaded and checked, and run on a batch.

    rewards = Rewards(["numeric", {"file": "reward.py", "function": "score", "weight": 0.5}], section="grpo")
    rewards(samples)                          # (samples, 2)

Functions, those that come with llmtk too, run in processes of their own (`reward_process`); reward models in this one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import decode_source
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from llmtk import ConfigurationError, DatasetError, LlmtkError, Section, TrainingError
from llmtk.config.problems import explain, shown
from llmtk.host import discovery
from llmtk_rl.reward_models import ModelReward
from llmtk_rl.reward_process import RewardFailure, RewardProcess

RewardSpec = str | dict[str, Any]
"""A reward as it stands in a configuration: a name, or keys and values that begin with name, file or model."""
OnError = Literal["stop", "drop"]

_HOPELESS = 3
"""Where this many rows in a row time out, the rest of the batch is not tried one by one."""


@dataclass(frozen=True)
class Sample:
    """A completion to be rewarded, and the row that it answers."""

    prompt: str | list[dict[str, Any]]
    """As in the row: text, or messages."""
    completion: str
    """Decoded, without special tokens."""
    prompt_ids: list[int]
    completion_ids: list[int]
    """The stop token included."""
    columns: Mapping[str, Any]
    """Every other column of the row."""
    place: str
    """Where a person finds the row: `rows.jsonl:12`."""

    @property
    def answer(self) -> str | list[dict[str, Any]]:
        """The completion in the form of the prompt: text, or a list of one message."""
        if isinstance(self.prompt, str):
            return self.completion
        return [{"role": "assistant", "content": self.completion}]


class RewardOptions(Section):
    """What completions are rewarded for."""

    rewards: list[str | dict[str, Any]] | str = Field(default_factory=list)
    """One reward or several: a name (`exact_match`), a name with options (`{name: format, pattern: ..., weight: 0.5}`),
    a function in a Python file of yours (`{file: reward.py, function: score}`), a reward model (`{model: runs/rm}`).
    Each may have weight (1), timeout (60, seconds for a batch) and on_error."""
    on_reward_error: OnError = "stop"
    """What happens to a row for which a reward fails: raises, hangs, or gives no number. The run ends with an error
    that names it, or it is left out and counted."""


class Rewards:
    """Rewards as functions of samples, ready to be called; `close` ends their processes.

    Args:
        specs: One name, or the rewards in their order.
        section: The section of the configuration that they stand in, for errors.
        on_error: What happens to rows for which one fails, where it does not say so itself.
        may_be_none: None may be given, which is refused with the first row that would need one.

    Raises:
        ConfigurationError: None is given, or one cannot be used: it is unknown, its file is missing or fails on import,
            an option is not its own, its model is none.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec] | str,
        *,
        section: str,
        on_error: OnError = "stop",
        may_be_none: bool = False,
    ) -> None:
        given = [specs] if isinstance(specs, str) else list(specs)
        self._section = section
        if not given and not may_be_none:
            raise ConfigurationError(_none_given(section))
        self.left_out: list[str] = []
        """Of the last call, why rows were left out."""
        self._rewards: list[_Reward] = []
        try:
            for index, spec in enumerate(given):
                self._rewards.append(_reward(spec, f"{section}.rewards.{index}", on_error))
            self._needs = [reward.needs() for reward in self._rewards]  # all are started by now, and load side by side
        except BaseException:
            self.close()
            raise
        self.names = _unique([reward.name for reward in self._rewards])
        self.weights = [reward.weight for reward in self._rewards]

    def __call__(self, samples: Sequence[Sample]) -> Tensor:
        """Return (samples, rewards) in float64, NaN where a row was left out.

        Raises:
            TrainingError: A reward failed for a row, and such rows are not left out.
            DatasetError: A row lacks a column that a reward needs.
        """
        for sample in samples:
            self.check_columns(sample.columns, sample.place)
        self.left_out = []
        found = [reward(samples, self.left_out) for reward in self._rewards]
        return torch.tensor(found, dtype=torch.float64).T

    def check_columns(self, columns: Collection[str], place: str) -> None:
        """Check that a row has what the rewards need. DatasetError names the column and the row.

        ConfigurationError where there is no reward at all.
        """
        if not self._rewards:
            raise ConfigurationError(_none_given(self._section))
        for reward, needs in zip(self._rewards, self._needs, strict=True):
            if lacking := [name for name in needs if name not in columns]:
                there = f"It has {', '.join(columns)}" if columns else "It has none but the prompt"
                raise DatasetError(
                    f"{place}: the reward {reward.name} ({reward.where}) needs the column "
                    f"{' and '.join(map(repr, lacking))}, which this row lacks. {there}"
                )

    def files(self) -> dict[str, str]:
        """Return the SHA-256 of each file that holds a reward, as it was read, by its path as given."""
        return dict(reward.file for reward in self._rewards if reward.file)

    def close(self) -> None:
        """End the processes, and let go of models."""
        for reward in self._rewards:
            reward.source.close()


def changed_files(before: Mapping[str, str], now: Mapping[str, str], *, override: str) -> str | None:
    """Say how the reward files of a checkpoint (`Rewards.files`) differ from those of now; None where they do not.

    `override` is the setting that accepts the difference, as a user writes it.
    """
    changes = [
        f"{path} {'has changed' if path in before and path in now else 'is new' if path in now else 'is used no more'}"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path)
    ]
    if not changes:
        return None
    return (
        f"Reward files are not what they were when the checkpoint was written: {'; '.join(changes)}. The rest of the "
        f"run would be rewarded for something else. Put them back as they were, or accept the change: {override}"
    )


# Reading


class _Given(Section):
    """What is said of a reward. Keys that are none of these are its own options."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    file: str | None = None
    function: str | None = None
    model: str | None = None
    weight: float = Field(1.0, strict=True)
    timeout: float = Field(60.0, gt=0, strict=True)
    on_error: OnError | None = None

    @model_validator(mode="after")
    def _belongs_together(self) -> _Given:
        if sum(origin is not None for origin in (self.name, self.file, self.model)) != 1:
            raise ValueError("give one of name (an installed reward), file (and function) and model (a folder)")
        if (self.file is None) != (self.function is None):
            raise ValueError("file and function belong together: {file: reward.py, function: score}")
        if self.model is not None and (unused := [*self.options, *self.model_fields_set & {"timeout"}]):
            raise ValueError(f"a reward model does not use {', '.join(unused)}")
        return self

    @property
    def options(self) -> dict[str, Any]:
        return self.model_extra or {}


def _read(spec: RewardSpec, where: str) -> _Given:
    settings = {"name": spec} if isinstance(spec, str) else spec
    try:
        return _Given.model_validate(settings)
    except ValidationError as error:
        keys = ", ".join(_Given.model_fields)
        problem = explain(error, settings, _Given, f"A reward is a name, or has the keys {keys}, and its own options.")
        raise ConfigurationError(f"{where}: {problem}") from error


def _reward(spec: RewardSpec, where: str, on_error: OnError) -> _Reward:
    """Return a reward that is being loaded. ConfigurationError says where it stands."""
    given = _read(spec, where)
    try:
        name, source, file = _source(given)
    except LlmtkError as error:
        raise ConfigurationError(f"{where}: {error}") from error
    return _Reward(name, where, source, given.weight, given.on_error or on_error, file)


def _source(given: _Given) -> tuple[str, _Source, tuple[str, str] | None]:
    """Return a reward's name, what gives it, and the file that it comes from (path, SHA-256)."""
    if given.model is not None:
        return Path(given.model).name, ModelReward(given.model), None
    if given.file is not None and given.function is not None:
        target, file = _from_file(given.file, given.function)
        return given.function, _FunctionReward(target | {"options": given.options}, given.timeout), file
    offer = discovery.find(discovery.REWARDS, str(given.name))
    target = {"offer": asdict(offer), "options": given.options}
    return offer.name, _FunctionReward(target, given.timeout), None


def _from_file(path: str, function: str) -> tuple[dict[str, Any], tuple[str, str]]:
    """Return what a process is to load, and the path with the digest of what was read."""
    file = Path(path).expanduser().absolute()
    try:
        content = file.read_bytes()
        source = decode_source(content)
    except OSError as error:
        raise ConfigurationError(f"the reward file {path} cannot be read: {error.strerror} ({file})") from error
    except (SyntaxError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the reward file {path} is no Python file: {error}. Save it as UTF-8") from error
    # The text travels, so that a process that starts anew in the middle of the run has what was read at its start.
    return {"path": str(file), "source": source, "function": function}, (path, hashlib.sha256(content).hexdigest())


def _none_given(section: str) -> str:
    known = ", ".join(offer.name for offer in discovery.offers(discovery.REWARDS))
    return (
        f"{section}.rewards: no reward is given. Name one ({known}), or give a function of yours, "
        f"{{file: reward.py, function: score}}, or a reward model, {{model: runs/rm}}"
    )


def _unique(names: Sequence[str]) -> list[str]:
    """Number the names that come again: format, format_2."""
    return [name if (n := list(names[:i]).count(name)) == 0 else f"{name}_{n + 1}" for i, name in enumerate(names)]


# Running


class _Source(Protocol):
    """What gives rewards: a function in its process, or a reward model."""

    def needs(self) -> list[str]:
        """Return the columns that it needs. Waits until it is loaded; RewardFailure where it cannot be."""

    def __call__(self, samples: Sequence[Sample]) -> list[float | RewardFailure]:
        """Return the reward of each sample, or why it has none. RewardFailure where it fails as a whole."""

    def close(self) -> None:
        """Let go of what it holds."""


class _FunctionReward:
    """A function in a process of its own, which is given the arguments that TRL would give it."""

    def __init__(self, target: Mapping[str, Any], timeout: float) -> None:
        self._process = RewardProcess(target, timeout)
        self._process.start()

    def needs(self) -> list[str]:
        self._signature = self._process.load()
        return self._signature.needs

    def __call__(self, samples: Sequence[Sample]) -> list[float | RewardFailure]:
        arguments = {name: values for name, values in _arguments(samples).items() if self._signature.wants(name)}
        found = self._process(arguments)
        if len(found) != len(samples):
            raise RewardFailure(f"returned {len(found)} rewards for {len(samples)} completions")
        return [
            RewardFailure(f"returned {value} in place of a finite number") if isinstance(value, str) else value
            for value in found
        ]

    def close(self) -> None:
        self._process.close()


def _arguments(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Return everything that a function may ask for, as lists (samples,); a column that a row lacks is None there."""
    names = dict.fromkeys(name for sample in samples for name in sample.columns)
    return {name: [sample.columns.get(name) for sample in samples] for name in names} | {
        "prompts": [sample.prompt for sample in samples],
        "completions": [sample.answer for sample in samples],
        "prompt_ids": [sample.prompt_ids for sample in samples],
        "completion_ids": [sample.completion_ids for sample in samples],
    }


@dataclass(frozen=True)
class _Reward:
    name: str
    where: str
    """Where it stands in the configuration: `grpo.rewards.0`."""
    source: _Source
    weight: float
    on_error: OnError
    file: tuple[str, str] | None
    """Path and SHA-256 of the file that it came from."""

    def needs(self) -> list[str]:
        """Return the columns that it needs. ConfigurationError where it cannot be loaded."""
        try:
            return self.source.needs()
        except RewardFailure as failure:
            label = f"{self.file[0]}:{self.name}" if self.file else self.name
            raise ConfigurationError(f"{self.where} ({label}): {failure}") from failure

    def __call__(self, samples: Sequence[Sample], left_out: list[str]) -> list[float]:
        """Return (samples,) rewards, NaN for rows that are left out; why is added to `left_out`. Else TrainingError."""
        if not samples:
            return []
        try:
            found = self.source(samples)
        except RewardFailure as failure:
            found = self._row_by_row(samples, failure)
        rewards = []
        for sample, value in zip(samples, found, strict=True):
            if isinstance(value, RewardFailure):
                self._refuse(sample, value)
                left_out.append(self._told(sample, value))
            rewards.append(math.nan if isinstance(value, RewardFailure) else value)
        return rewards

    def _row_by_row(self, samples: Sequence[Sample], failure: RewardFailure) -> list[float | RewardFailure]:
        """Find the rows for which a batch failed, and ask for the others again.

        For all of them at once, since what a function gives to a row may depend on its neighbours.
        """
        if len(samples) == 1:
            return [failure]
        culprits: dict[int, RewardFailure] = {}
        for index, sample in enumerate(samples):
            if failed := self._alone(sample):
                self._refuse(sample, failed)
                culprits[index] = failed
            recent = [culprits.get(before) for before in range(index - _HOPELESS + 1, index + 1)]
            if all(failed and failed.timed_out for failed in recent):
                culprits |= dict.fromkeys(range(index + 1, len(samples)), culprits[index])
                break
        others = [sample for index, sample in enumerate(samples) if index not in culprits]
        rest = iter(self._together(others, None if culprits else failure))
        return [culprits[index] if index in culprits else next(rest) for index in range(len(samples))]

    def _alone(self, sample: Sample) -> RewardFailure | None:
        """Return why a sample has no reward, if that is so."""
        try:
            (value,) = self.source([sample])
        except RewardFailure as failure:
            return failure
        return value if isinstance(value, RewardFailure) else None

    def _together(self, samples: Sequence[Sample], failure: RewardFailure | None) -> list[float | RewardFailure]:
        """Ask for samples of which each by itself has a reward, unless that is known to fail."""
        if not samples:
            return []
        try:
            if failure is None:
                return self.source(samples)
        except RewardFailure as again:
            failure = again
        batch = f"the {len(samples)} completions of {samples[0].place} to {samples[-1].place}"
        return [RewardFailure(f"{failure} when asked for {batch}, though for each alone it did not")] * len(samples)

    def _refuse(self, sample: Sample, failure: RewardFailure) -> None:
        """Raise TrainingError unless such rows are left out."""
        if self.on_error == "stop":
            section = self.where.partition(".rewards.")[0]
            raise TrainingError(
                f"{self._told(sample, failure)}\nMend the reward, or have such rows left out: "
                f"{section}.on_reward_error: drop (on_error: drop beside this reward, for it alone)"
            ) from failure

    def _told(self, sample: Sample, failure: RewardFailure) -> str:
        of = f"The completion is {shown(sample.completion)}"
        return f"{sample.place}: the reward {self.name} ({self.where}) {failure}. {of}"
