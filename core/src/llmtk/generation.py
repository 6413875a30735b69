"""Sampling from the policy, for demos, samples and reinforcement stages alike: the plain engine.

A draw depends on (seed, sequence, position) alone: one uniform number a token, turned into a token by the inverse of
the distribution's cumulative sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from llmtk.training.evaluation import eval_mode

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 takes the likeliest token; `stop_tokens` end a completion and belong to it."""

    n: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0
    batch_size: int = 64
    """Sequences sampled side by side, at most."""

    def __post_init__(self) -> None:
        from_one, from_zero = (self.n, self.max_new_tokens, self.batch_size), (self.temperature, self.top_k)
        if min(from_one) < 1 or min(from_zero) < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"n, max_new_tokens and batch_size start at 1, temperature and top_k at 0, 0 < top_p <= 1: {self}"
            )


@dataclass(frozen=True)
class Completion:
    """Sampled tokens, the log-prob of each under the sampling policy, and why it ended."""

    tokens: list[int]
    logps: list[float]
    stopped: Literal["stop", "length"]


@torch.no_grad()
def generate(model: nn.Module, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[Completion]]:
    """Sample `n` completions of each prompt: (prompts, n). The model's mode is left as it was.

    A completion that reaches the model's last position ends there. ValueError for a prompt without tokens, or one that
    leaves no room.
    """
    positions = _positions(model)
    for index, prompt in enumerate(prompts):
        if not 0 < len(prompt) < positions:
            raise ValueError(f"prompt {index} has {len(prompt)} tokens; 1 to {positions - 1:.0f} leave room to answer")
    jobs = [(prompt, index * sampling.n + copy) for index, prompt in enumerate(prompts) for copy in range(sampling.n)]
    by_length = sorted(range(len(jobs)), key=lambda job: len(jobs[job][0]))
    done: dict[int, Completion] = {}
    with eval_mode(model):
        for start in range(0, len(jobs), sampling.batch_size):
            chosen = by_length[start : start + sampling.batch_size]
            done |= zip(chosen, _sample(model, [jobs[job] for job in chosen], sampling), strict=True)
    return [[done[index * sampling.n + copy] for copy in range(sampling.n)] for index in range(len(prompts))]


def _sample(model: Any, jobs: Sequence[tuple[Sequence[int], int]], sampling: Sampling) -> list[Completion]:
    device = next(model.parameters()).device
    longest = max(len(prompt) for prompt, _ in jobs)
    ids = torch.zeros(len(jobs), longest, dtype=torch.int64, device=device)
    mask = torch.zeros(len(jobs), longest + sampling.max_new_tokens, dtype=torch.int64, device=device)
    for row, (prompt, _) in enumerate(jobs):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    uniform = torch.from_numpy(np.stack([_uniform(sampling, sequence) for _, sequence in jobs])).to(device)
    stops = torch.tensor(sampling.stop_tokens, dtype=torch.int64, device=device)

    tokens, logps = [], []
    room = [int(min(_positions(model) - len(prompt), sampling.max_new_tokens)) for prompt, _ in jobs]
    last_position = min(_positions(model), longest + sampling.max_new_tokens) - 1
    lasts = torch.tensor(room, device=device) - 1
    alive = torch.ones(len(jobs), dtype=torch.bool, device=device)
    cache = None
    for position in range(sampling.max_new_tokens):
        end = longest + position
        # A row that has come to its end goes on unseen until the others have; it needs a position that there is.
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0, max=last_position)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        token, logp = _choose(output.logits[:, -1].float(), uniform[:, position], sampling)
        tokens.append(token)
        logps.append(logp)
        alive &= ~torch.isin(token, stops) & (position < lasts)
        if not alive.any():
            break
        ids = token[:, None]
    return [
        _completion(token[:length], logp[:length], sampling)
        for token, logp, length in zip(
            torch.stack(tokens, 1).tolist(), torch.stack(logps, 1).tolist(), room, strict=True
        )
    ]


def _positions(model: Any) -> float:
    """Return how many positions the model has; infinity where its configuration sets no end."""
    return getattr(model.config, "max_position_embeddings", None) or math.inf


def _uniform(sampling: Sampling, sequence: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    generator = np.random.Generator(np.random.Philox(key=np.array([sampling.seed, sequence], dtype=np.uint64)))
    return generator.random(sampling.max_new_tokens)


def _choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Choose a token for each row: logits (rows, vocabulary), uniform (rows,) to tokens and log-probs (rows,)."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
    else:
        logits = _keep(logits / sampling.temperature, sampling)
        cumulative = logits.double().softmax(-1).cumsum(-1)
        token = torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True).squeeze(-1)
        token = token.clamp(max=logits.shape[-1] - 1)
    return token, logits.log_softmax(-1).gather(-1, token[:, None]).squeeze(-1)


def _keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """Put the logits outside top_k and top_p to minus infinity."""
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    return logits


def _completion(tokens: list[int], logps: list[float], sampling: Sampling) -> Completion:
    end = next((index for index, token in enumerate(tokens) if token in sampling.stop_tokens), None)
    if end is None:
        return Completion(tokens, logps, "length")
    return Completion(tokens[: end + 1], logps[: end + 1], "stop")
