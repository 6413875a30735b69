"""Scoring: the log-prob of every target token under a causal language model, forward and backward.

Stages see `Scores` alone. There are two ways to make them: `packed`, which is fast and is proven on each model before
it is used, and `padded`, which is right for every model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtk.scoring.scores import ALSO, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtk.batch import Batch

__all__ = ["ALSO", "Scorer", "Scores", "choose"]

Root = Callable[..., Any]


@dataclass(frozen=True)
class Scorer:
    """How a model is scored, and why not packed, if it is not."""

    packed: bool
    why_padded: str = ""

    def score(self, root: Root, batch: Batch, also: Iterable[str] = ()) -> Scores:
        """Score every target token of the batch; `root` is the wrapped one."""
        scores: Scores = self._way.score(root, batch, also)
        return scores

    def map_logits(self, root: Root, batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor] = ()) -> Tensor:
        """Return `fn(logits (rows, vocabulary), *columns (rows, ...))` of all targets, with the exact gradient.

        `fn` sees float32 logits of some targets at a time, with the same rows of each column, and gives (rows, ...).
        ValueError where it gives something else.
        """

        def checked(logits: Tensor, *parts: Tensor) -> Tensor:
            answer = fn(logits, *parts)
            if answer.shape[:1] != logits.shape[:1]:
                raise ValueError(f"map_logits: fn gave shape {tuple(answer.shape)} for {len(logits)} targets")
            return answer

        result: Tensor = self._way.map_logits(root, batch, checked, columns)
        return result

    @property
    def _way(self) -> Any:
        from llmtk.scoring import packed, padded

        return packed if self.packed else padded


def choose(root: nn.Module, gather: Callable[[Any], list[Any]]) -> Scorer:
    """Patch a model for packed scoring where that is proven right, on all ranks; else leave it as it was."""
    from llmtk.scoring import proof

    reasons = gather(why := proof.why_not_packed(root))
    why = next((reason for reason in reasons if reason), why)
    return Scorer(why is None, why or "")
