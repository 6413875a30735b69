"""Sampling from the policy, for demos, samples and reinforcement stages alike.

There are two ways to write: `packed`, which is fast and works for models that are scored packed, and `plain`, which is
right for every causal model of transformers. Another engine is a distribution with an entry point in
`llmtk.generators`: what is called with a run and `generation.options`, and gives an `Engine`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmtk.generation.completions import Completion, Segment
from llmtk.generation.jobs import Hear, Jobs, Together
from llmtk.generation.sampling import Decode, Sampling, Stopping
from llmtk.scoring.proof import evaluating

if TYPE_CHECKING:
    from torch import nn

    from llmtk.generation.graphs import Record

__all__ = ["Completion", "Engine", "Sampling", "Segment", "generate"]


class Engine(Protocol):
    """What writes completions with the policy as it is at each call."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions of each prompt, (prompts, n); `seeds` (prompts,) as `Jobs` takes them.

        All ranks call it together, each with prompts of its own, perhaps none.
        """


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    *,
    packed: bool = False,
    record: Record | None = None,
    decode: Decode | None = None,
    version: int = 0,
    together: Together | None = None,
    hear: Hear | None = None,
) -> list[list[Completion]]:
    """Sample `n` completions of each prompt: (prompts, n). The model's mode is left as it was.

    `seeds` (prompts,) give each prompt its own random numbers; without them, prompts are numbered under
    `sampling.seed`. `packed` is for models patched for packed scoring (`llmtk.scoring.choose`); `record` records its
    steps, to replay them (`llmtk.generation.graphs`). `decode` is needed for stop strings; `version` is noted in the
    completions; `together` is for models whose forward is collective. `hear` is told of each token as it is written;
    what it raises ends the call.

    A completion that reaches the model's last position ends there. ValueError for a prompt without tokens, or one that
    leaves no room.
    """
    from llmtk.generation import packed as packed_way
    from llmtk.generation import plain

    jobs = Jobs(prompts, sampling, Stopping(sampling, decode), positions_of(model), seeds, version, together, hear)
    with evaluating(model):
        done = packed_way.Writer(model, jobs, record).write() if packed else plain.write(model, jobs)
    n = sampling.n
    return [[done[index * n + copy] for copy in range(n)] for index in range(len(prompts))]


def positions_of(model: Any) -> float:
    """Return how many positions the model has; infinity where its configuration sets no end."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf
