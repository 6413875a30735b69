"""What the tests of generation share: models made ready to write packed, what they wrote, and how scoring sees it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtk import Batch, Group
from llmtk import Sequence as Tokens
from llmtk.generation import Completion, Sampling, generate
from llmtk.scoring import choose, padded
from llmtk.scoring.packed import TASK

sys.path.insert(0, str(Path(__file__).parents[1]))  # architectures of the tests of scoring, and tiny runs
from scoring.kit import PACKED, VOCABULARY, WINDOW, adapted, build
from training.kit import make as make_run

__all__ = ["PACKED", "VOCABULARY", "WINDOW", "adapted", "build", "make_run"]

PROMPTS = [[40, 50, 60], [70], [80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 60, 61], [90, 91], [70, 71, 72, 73]]
"""Of different lengths; one is longer than the windows."""

WRAPPED: dict[str, Callable[[], Any]] = {
    "llama": lambda: build("llama"),
    "lora": lambda: adapted(build("llama")),
    "gemma2": lambda: build("gemma2"),
}
"""Models that two ranks write with."""


@dataclass(frozen=True)
class Share:
    """Which of the prompts each of two ranks has, and how they are answered."""

    owners: list[int]
    settings: dict[str, Any]
    prompts: list[list[int]] = field(default_factory=lambda: PROMPTS)

    @property
    def seeds(self) -> list[int]:
        return [100 + len(prompt) for prompt in self.prompts]

    def of_rank(self, rank: int) -> tuple[list[list[int]], list[int]]:
        """Return a rank's prompts and their seeds."""
        mine = [prompt for prompt, owner in enumerate(self.owners) if owner == rank]
        return [self.prompts[prompt] for prompt in mine], [self.seeds[prompt] for prompt in mine]


_SETTINGS = {"n": 3, "max_new_tokens": 12, "batch_size": 4, "stop_tokens": tuple(range(0, VOCABULARY, 9))}
SHARES = {
    "two and three": Share([0, 1, 1, 0, 1], _SETTINGS),
    "one and four": Share([1, 1, 0, 1, 1], _SETTINGS | {"batch_size": 2}),
    "one rank has none": Share([0, 0, 0, 0, 0], _SETTINGS),
}


def patched(root: Any) -> Any:
    """Patch a model for packed rows, and return it."""
    scorer = choose(root, lambda reason: [reason])
    assert scorer.packed, scorer.why_padded
    return root


def write(
    root: Any, prompts: Sequence[Sequence[int]] = PROMPTS, seeds: Sequence[int] | None = None, **settings: Any
) -> list[list[Completion]]:
    """Generate packed."""
    return generate(root, prompts, Sampling(**settings), seeds, packed=True)


def told(answers: list[list[Completion]]) -> list[list[tuple[list[int], str]]]:
    """Return tokens and why they ended, which must be equal where log-probs may differ by rounding."""
    return [[(answer.tokens, answer.stopped) for answer in copies] for copies in answers]


def flat(answers: list[list[Completion]]) -> list[Completion]:
    """Return all completions, one after the other."""
    return [answer for copies in answers for answer in copies]


def logps_of(answers: list[list[Completion]]) -> Tensor:
    """Return all log-probs in one row."""
    return torch.tensor([logp for answer in flat(answers) for logp in answer.logps])


def batch_of(prompts: Sequence[Sequence[int]], answers: list[list[Completion]]) -> Batch:
    """Return completions as what is scored: all tokens of them are targets, in their order."""
    groups = [
        Group([Tokens(answer.tokens, [True] * len(answer.tokens), 0) for answer in copies], {}, [prompt])
        for prompt, copies in zip(prompts, answers, strict=True)
    ]
    return Batch.collate(groups)


def rescored(root: Any, prompts: Sequence[Sequence[int]], answers: list[list[Completion]]) -> Tensor:
    """Return what the plain way of scoring says of the same tokens, in the same order."""
    with torch.no_grad():
        return padded.score(root, batch_of(prompts, answers)).logps


@contextlib.contextmanager
def forwards(root: nn.Module) -> Iterator[list[Any]]:
    """Note the layouts of packed rows that go through a model."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if TASK in kwargs:
            seen.append(kwargs[TASK].layout)

    hook = root.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
