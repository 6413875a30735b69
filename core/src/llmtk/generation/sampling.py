"""How a token is drawn: one uniform number for each (seed, sequence, position), turned into a token by the inverse of
the distribution's cumulative sum. So a draw depends on its sequence and position alone, not on the batch around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 128
"""Tokens of a vocabulary that are added up before the sum is searched: two short searches in place of a long one."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 takes the likeliest token; `stop_tokens` end a completion and belong to it.

    Of the distribution, `repetition_penalty` (arXiv 1909.05858) is applied first, then `temperature`, `top_k`, `top_p`
    and `min_p` (arXiv 2407.01082), each to what the one before it has left. `stop_strings` end a completion with the
    token that completes one of them.
    """

    n: int = 1
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 64
    """Sequences sampled side by side, at most."""

    def __post_init__(self) -> None:
        from_one, from_zero = (self.n, self.max_new_tokens, self.batch_size), (self.temperature, self.top_k)
        if min(from_one) < 1 or min(from_zero) < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"n, max_new_tokens and batch_size start at 1, temperature and top_k at 0, 0 < top_p <= 1: {self}"
            )
        if not 0 <= self.min_p <= 1 or self.repetition_penalty <= 0:
            raise ValueError(f"0 <= min_p <= 1, and repetition_penalty is over 0: {self}")
        if isinstance(self.stop_strings, str) or not all(self.stop_strings):
            raise ValueError(f"stop_strings are texts, none of them empty: {self}")

    @property
    def is_whole(self) -> bool:
        """Whether tokens are drawn from the model's whole distribution, at this temperature."""
        cuts = (self.top_k, 1 - self.top_p, self.min_p, 1 - self.repetition_penalty)
        return self.temperature > 0 and not any(cuts)


def uniform_numbers(sampling: Sampling, seed: int, sequence: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the numbers (max_new_tokens,) in [0, 1) that decide a sequence's tokens. A seed is taken modulo 2**64."""
    generator = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, sequence], dtype=np.uint64)))
    return generator.random(sampling.max_new_tokens)


def choose(
    logits: Tensor, uniform: Tensor, sampling: Sampling, before: Sequence[Sequence[int]] = ()
) -> tuple[Tensor, Tensor]:
    """Choose a token for each row: logits (rows, vocabulary), uniform (rows,) to tokens and log-probs (rows,).

    `before` are each row's tokens so far, prompt included, for the repetition penalty. Log-probs, in float32, are those
    of the distribution that is drawn from; at temperature 0, of the model's at temperature 1. Logits that are NaN give
    some token and a log-prob of NaN: one rank must not stop alone, and a step on such log-probs is refused by all.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        logits = _penalised(logits, before, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        return token, logits.gather(-1, token[:, None]).squeeze(-1) - logits.logsumexp(-1)
    logits = _kept(logits if sampling.temperature == 1 else logits / sampling.temperature, sampling)
    logps = logits.log_softmax(-1)
    token = _inverse(logps.exp(), uniform)
    return token, logps.gather(-1, token[:, None]).squeeze(-1)


def _inverse(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Return for each row the first token whose cumulative probability exceeds `uniform`: (rows, vocabulary), (rows,).

    Sums are in float64; a token of probability 0 is never chosen.
    """
    rows, vocabulary = probabilities.shape
    if spare := -vocabulary % CHUNK:
        probabilities = torch.nn.functional.pad(probabilities, (0, spare))
    chunks = probabilities.view(rows, -1, CHUNK)
    sums = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniform[:, None] * sums[:, -1:]
    chunk = _first_over(sums, wanted)
    before = torch.where(chunk > 0, sums.gather(-1, (chunk - 1).clamp(min=0)), 0.0)
    within = chunks[torch.arange(rows, device=chunk.device), chunk[:, 0]].double().cumsum(-1)
    return (chunk * CHUNK + _first_over(within, wanted - before)).squeeze(-1).clamp(max=vocabulary - 1)


def _first_over(cumulative: Tensor, wanted: Tensor) -> Tensor:
    """Return the index (rows, 1) of the first sum over `wanted` (rows, 1), or of the last that rises where none is.

    Of sums that are NaN it is the last: an index behind the end would bring a GPU's process down.
    """
    below = torch.nextafter(cumulative[:, -1:], torch.zeros_like(wanted))
    found = torch.searchsorted(cumulative, torch.minimum(wanted, below), right=True)
    return found.clamp(max=cumulative.shape[-1] - 1)


def _penalised(logits: Tensor, before: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Divide the positive logits of tokens that were there before by the penalty, and multiply the negative ones."""
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, tokens in zip(seen, before, strict=True):
        row[torch.as_tensor(tokens, dtype=torch.int64, device=row.device)] = True
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _kept(logits: Tensor, sampling: Sampling) -> Tensor:
    """Put the logits outside top_k, top_p and min_p to minus infinity."""
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= sampling.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    if sampling.min_p > 0:
        largest = logits.max(-1, keepdim=True).values
        logits = logits.masked_fill(logits < largest + math.log(sampling.min_p), -torch.inf)
    return logits


Decode = Callable[[list[int]], str]
"""Tokens to text."""


@dataclass(frozen=True)
class Stopping:
    """Says when a completion has come to its end."""

    sampling: Sampling
    decode: Decode | None = None

    def __post_init__(self) -> None:
        if self.sampling.stop_strings and self.decode is None:
            raise ValueError("stop_strings need a tokenizer: give `decode`, which turns tokens into text")

    def ends(self, tokens: list[int]) -> bool:
        """Whether the last of a completion's tokens ends it."""
        if tokens[-1] in self.sampling.stop_tokens:
            return True
        if not self.sampling.stop_strings:
            return False
        assert self.decode is not None
        # A token has a byte or more, so the string lies within as many tokens as it has bytes.
        longest = max(len(string.encode()) for string in self.sampling.stop_strings)
        text = self.decode(tokens[-longest - 1 :])
        if "\N{REPLACEMENT CHARACTER}" in text:  # cut within a character, for which some tokenizers drop its neighbours
            text = self.decode(tokens)
        return any(string in text for string in self.sampling.stop_strings)
