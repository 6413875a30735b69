"""What is to be written: every copy of every prompt is a job of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from llmtk.generation.sampling import Sampling, Stopping, uniform_numbers

Together = Callable[[bool], bool]
"""Whether any rank says yes. All ranks call it together."""
Hear = Callable[[int, list[int]], None]
"""Told of each token as it is written: the completion's number among all (prompt x n + copy), and its tokens so far."""


@dataclass(frozen=True, eq=False)
class Job:
    """A completion to write: `number` among all, of which prompt, its random numbers, and its tokens at most."""

    number: int
    prompt: int
    prompt_tokens: Sequence[int]
    uniform: np.ndarray[Any, np.dtype[np.float64]]
    room: int


@dataclass(frozen=True, eq=False)
class Jobs:
    """All jobs of a call, and what they have in common.

    `seeds` give each prompt random numbers of its own, whatever other prompts there are; without them, prompts are
    numbered. With `together`, all ranks run as many forwards, for models whose forward is collective.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    stopping: Stopping
    positions: float
    """Positions that the model has."""
    seeds: Sequence[int] | None = None
    version: int = 0
    together: Together | None = None
    hear: Hear | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and len(self.seeds) != len(self.prompts):
            raise ValueError(f"{len(self.seeds)} seeds for {len(self.prompts)} prompts; give one for each")
        for index, prompt in enumerate(self.prompts):
            if not 0 < len(prompt) < self.positions:
                most = "" if math.isinf(self.positions) else f" to {self.positions - 1:.0f}"
                raise ValueError(f"prompt {index} has {len(prompt)} tokens; 1{most} leave room to answer")

    @cached_property
    def all(self) -> list[Job]:
        """The jobs: copies of a prompt stand together, prompts in their order."""
        return [self._job(prompt, copy) for prompt in range(len(self.prompts)) for copy in range(self.sampling.n)]

    def anyone(self, goes_on: bool) -> bool:
        """Whether there is work left, here or on a rank that this one keeps step with."""
        return goes_on if self.together is None else self.together(goes_on)

    def before(self, written: Iterable[tuple[Job, Sequence[int]]]) -> list[list[int]]:
        """Return each completion's tokens so far, prompt included; nothing where no repetition is penalised."""
        if self.sampling.repetition_penalty == 1:
            return []
        return [[*job.prompt_tokens, *tokens] for job, tokens in written]

    def ending(self, job: Job, tokens: list[int]) -> Literal["stop", "length"] | None:
        """Return why a job's completion ends with its last token, or None if it goes on; tell who listens."""
        if self.hear is not None:
            self.hear(job.number, tokens)
        if self.stopping.ends(tokens):
            return "stop"
        return "length" if len(tokens) == job.room else None

    def _job(self, prompt: int, copy: int) -> Job:
        n, tokens = self.sampling.n, self.prompts[prompt]
        seed, sequence = (self.sampling.seed, prompt * n + copy) if self.seeds is None else (self.seeds[prompt], copy)
        room = int(min(self.positions - len(tokens), self.sampling.max_new_tokens))
        return Job(prompt * n + copy, prompt, tokens, uniform_numbers(self.sampling, seed, sequence), room)
