"""How strongly a policy is held to its reference: by one coefficient, or by one that follows the KL."""

from __future__ import annotations

from dataclasses import dataclass

CLIP = 0.2
"""The error counts for no more than this, in either direction."""


@dataclass
class KLControl:
    """The coefficient of the KL, which `update` moves towards a target; without one it is fixed.

    e = clip(KL / target - 1, -0.2, 0.2);  coefficient <- coefficient (1 + e completions / horizon)

    arXiv 1909.08593, section 2.2, whose gain of 0.1 is the ratio of completions in a round to `horizon`.
    """

    coefficient: float
    target: float | None = None
    """The KL of a completion, in nats."""
    horizon: int = 10_000
    """Completions over which an error of 1 would double the coefficient, were it not clipped."""

    def update(self, kl: float, completions: float) -> None:
        """Take in the mean KL of a round's completions, over all ranks."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -CLIP), CLIP)
            self.coefficient *= 1 + error * completions / self.horizon
