"""The router loss of a mixture-of-experts policy, as a term beside those of the stage, which need not know of it.

It is a product of means over one forward's tokens, so it is no sum over a window. Each micro-batch has its own, and
counts by its share of the window's tokens:

    sum over micro-batches m of  n_m / n * loss_m        n_m: tokens of m, shared prefixes once; n: of the window

So, alone among the terms, it depends on how the window is cut. As one product over the window it would need the choices
of all tokens before the first backward pass, and so every forward twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtk.batch import LossOutput, Mean, Term
from llmtk.errors import TrainingError
from llmtk.scoring import router

if TYPE_CHECKING:
    from torch import nn

    from llmtk.batch import Batch
    from llmtk.training.micro_batches import Cut

TERM = "router_loss"
WEIGHT = "llmtk_tokens"
"""The weight that divides it, which the core declares itself."""


class RouterLoss:
    """Hears the policy's forwards while a loss is computed, and adds their router loss to it."""

    def __init__(self, model: nn.Module, notify: Callable[[str], None]) -> None:
        self.coefficient = router.coefficient(model)
        self._notify = notify
        self._heard: list[tuple[Tensor, int]] | None = None
        self._with_gradient = False
        if self.coefficient is None and router.is_asked_for(model):
            self._say_there_is_none()

    def totals(self, cut: Cut) -> Mapping[str, float]:
        """Return the weights of a window, with the one that divides the router loss."""
        return cut.totals if self.coefficient is None else {**cut.totals, WEIGHT: float(cut.tokens)}

    def around(self, compute: Callable[[Batch], LossOutput], batch: Batch) -> LossOutput:
        """Compute a loss, and add the router loss. However often the policy saw the micro-batch, it counts once."""
        if self.coefficient is None:
            return compute(batch)
        self._heard, self._with_gradient = [], torch.is_grad_enabled()
        try:
            output = compute(batch)
            heard = self._heard
        finally:
            self._heard = None
        if not heard:
            return output
        if TERM in output.terms:
            raise TrainingError(f"the loss has a term {TERM!r} of its own; the core adds the router's under that name")
        tokens = len(batch.tokens)
        summed = sum((loss * count for loss, count in heard), torch.zeros(())) * (tokens / sum(n for _, n in heard))
        return replace(
            output,
            terms={**output.terms, TERM: Term(summed, WEIGHT, self.coefficient)},
            metrics={**output.metrics, TERM: Mean(summed.detach(), tokens)},
        )

    def hear(self, output: Any, batch: Batch) -> None:
        """Take the router loss from a forward of the policy.

        What is scored without gradient while training, such as a target, is no part of the loss. A forward that gives
        values alone has none: where a policy has a value head, its log-probs bring the router loss.
        """
        if self._heard is None or torch.is_grad_enabled() != self._with_gradient or isinstance(output, Tensor):
            return
        loss = router.loss_in(output)
        if loss is None:
            self._say_there_is_none()
        else:
            self._heard.append((loss, len(batch.tokens)))

    def _say_there_is_none(self) -> None:
        self._notify("The model's configuration has output_router_logits, but the model has no router loss: none added")
