"""Losses that stages share, as pure functions of tensors of any shape, and what is reported of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmtk import Mean


@dataclass(frozen=True)
class Clipping:
    """How far a ratio counts: between 1 - `low` and 1 + `high`, and never over `delta`, where it is given."""

    low: float
    high: float
    delta: float | None = None


def clipped(ratio: Tensor, advantages: Tensor, clipping: Clipping) -> Tensor:
    """Return -min(ratio A, clip(ratio) A), of any shape, advantages included (arXiv 1707.06347, equation 7)."""
    within = ratio.clamp(1 - clipping.low, 1 + clipping.high)
    if clipping.delta is not None:
        ratio = ratio.clamp(max=clipping.delta)
    return -torch.minimum(ratio * advantages, within * advantages)


def clip_ratios(ratio: Tensor, advantages: Tensor, clipping: Clipping) -> dict[str, Mean]:
    """Return the share of ratios (n,) whose gradient a limit takes away: below, above, and either."""
    low = (ratio < 1 - clipping.low) & (advantages < 0)
    high = (ratio > 1 + clipping.high) & (advantages > 0)
    shares = {"low_mean": low, "high_mean": high, "region_mean": low | high}
    return {f"clip_ratio/{name}": Mean(share.sum(), len(ratio)) for name, share in shares.items()}
