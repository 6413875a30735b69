"""What generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Segment:
    """A part of a completion: tokens that the policy sampled, or that something else (a tool, a user) put in."""

    tokens: list[int]
    logps: list[float] = field(default_factory=list)
    """The log-prob of each token under the sampling policy; empty if they were not sampled."""
    sampled: bool = True
    version: int = 0
    """The optimizer steps that the sampling policy had taken."""


@dataclass(frozen=True)
class Completion:
    """What was written behind a prompt, in segments, and why it ended: at a stop token or string, or by its length."""

    segments: tuple[Segment, ...]
    stopped: Literal["stop", "length"]

    @property
    def tokens(self) -> list[int]:
        """All tokens."""
        return [token for segment in self.segments for token in segment.tokens]

    @property
    def mask(self) -> list[bool]:
        """Which tokens were sampled."""
        return [segment.sampled for segment in self.segments for _ in segment.tokens]

    @property
    def logps(self) -> list[float]:
        """The log-probs of the sampled tokens, under the sampling policy."""
        return [logp for segment in self.segments for logp in segment.logps]
