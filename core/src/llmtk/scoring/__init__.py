"""Scoring: the log-prob of every target token under a causal language model, forward and backward, or a head's values.

Stages see `Scores` and tensors alone. There are two ways to make them: `packed`, which is fast and is proven on each
model before it is used, and `padded`, which is right for every model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmtk.errors import PluginError
from llmtk.scoring.memory import Memory
from llmtk.scoring.scores import ALSO, Scores

if TYPE_CHECKING:
    from torch import Tensor, nn

    from llmtk.batch import Batch

__all__ = ["ALSO", "Memory", "Scorer", "Scores", "choose", "prepare"]

Root = Callable[..., Any]


@dataclass(frozen=True)
class Scorer:
    """How a model is scored, and why not packed, if it is not. Where it has two heads, both are, or neither."""

    packed: bool
    why_padded: str = ""
    has_logits: bool = True
    """Whether it has a language model's head."""
    has_values: bool = False
    """Whether it has a head of one value a token."""

    def score(self, root: Root, batch: Batch, also: Iterable[str] = (), temperature: float = 1.0) -> Scores:
        """Score every target token of the batch; `root` is the wrapped one. PluginError for a head that it lacks."""
        self.require_logits("score")
        also = frozenset(also)
        if "values" in also:
            self.require_values()
        scores: Scores = self._way.score(root, batch, also, temperature)
        return scores

    def map_logits(self, root: Root, batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor] = ()) -> Tensor:
        """Return `fn(logits (rows, vocabulary), *columns (rows, ...))` of all targets, with the exact gradient.

        `fn` sees float32 logits of some targets at a time, with the same rows of each column, and gives (rows, ...).
        ValueError where it gives something else, or a column has not one row for each target.
        """
        self.require_logits("map_logits")
        targets = len(batch.host.target_tokens)
        for index, column in enumerate(columns):
            if column.shape[:1] != (targets,):
                given = len(column) if column.ndim else "one number, and no"
                raise ValueError(f"map_logits: column {index} has {given} values for {targets} targets")

        def checked(logits: Tensor, *parts: Tensor) -> Tensor:
            answer = fn(logits, *parts)
            if answer.shape[:1] != logits.shape[:1]:
                raise ValueError(f"map_logits: fn gave shape {tuple(answer.shape)} for {len(logits)} targets")
            return answer

        result: Tensor = self._way.map_logits(root, batch, checked, columns)
        return result

    def values(self, root: Root, batch: Batch) -> Tensor:
        """Return the value (targets,), float32, at the position that predicts each target; `root` is the wrapped one.

        PluginError for a model without a head of one value.
        """
        from llmtk.scoring import values

        self.require_values()
        return values.packed(root, batch) if self.packed else values.padded(root, batch)

    def require_logits(self, what: str) -> None:
        """Raise a PluginError that names who asked, if the model gives values and no logits."""
        if not self.has_logits:
            raise PluginError(f"run.{what} needs a language model, and this one's head gives one value, no logits")

    def require_values(self) -> None:
        """Raise a PluginError if the model has no head of one value."""
        if not self.has_values:
            raise PluginError("run.values needs a model with a head of one value a token, and this one has none")

    @property
    def _way(self) -> Any:
        from llmtk.scoring import packed, padded

        return packed if self.packed else padded


def choose(root: nn.Module, gather: Callable[[Any], list[Any]], why_padded: str = "") -> Scorer:
    """Patch a model for packed scoring where that is proven right, on all ranks; else leave it as it was.

    `why_padded` forces the plain way. ModelLoadError for a head of one value that does not stand at the last token.
    """
    from llmtk.scoring import proof

    has_logits, has_values = prepare(root)
    if not why_padded:
        ways = [proof.LOGPS] * has_logits + [proof.VALUES] * has_values
        reasons = gather(next(filter(None, (proof.why_not_packed(root, ways=way) for way in ways)), None))
        why_padded = next(filter(None, reasons), "")
    return Scorer(not why_padded, why_padded, has_logits, has_values)


def prepare(root: nn.Module) -> tuple[bool, bool]:
    """Make a root ready for the plain way; say whether it gives log-probs, and whether it gives values.

    ModelLoadError for a head of one value that does not stand at the last token.
    """
    from llmtk.scoring import proof, value_head, values

    model = value_head.find(root)
    if model is None:
        return True, False
    with proof.evaluating(model):
        values.patch(model)
        if model.get_output_embeddings() is None:
            values.check(model)
    return value_head.has_language_head(root), True
