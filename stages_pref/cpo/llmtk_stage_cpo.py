"""Contrastive preference optimisation (arXiv 2401.08417): pairs without a reference, and NLL on the chosen answers.

With l = log pi(y|x), summed over the answer's |y| tokens, for the P pairs (c, j) of the whole optimizer window, on all
ranks, and the N target tokens of their chosen answers:

    1/P  sum_pairs  -log sigmoid(beta (l_c - l_j))   +   cpo_alpha  1/N  sum_t  -log pi(c_t | c_<t, x)

The first term is the paper's equation 3, DPO's with a uniform reference; the second is its behaviour cloning, a mean
over tokens as in the authors' code and in TRL, where the paper's text sums over each answer. In the first summand's
place:

    hinge   max(0, 1 - beta (l_c - l_j))                    SLiC's margin, arXiv 2305.10425
    ipo     (l_c/|c| - l_j/|j| - 1/(2 beta))^2              equation 17 of arXiv 2310.12036 with a uniform reference

Departures from other code: the means are over the window, not over a micro-batch; AlphaPO's transformation is left out;
TRL's `simpo` is a stage of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from llmtk_pref import (
    PairOptions,
    PairStage,
    chosen_nll,
    logistic_loss,
    pair_batch,
    pair_demo,
    pair_metrics,
    sides,
)
from pydantic import Field
from torch import Tensor

from llmtk import Batch, Demo, LossOutput, Round, RunView, Term
from llmtk.config.unused import refuse_unused
from llmtk.contract import Row


class ContrastivePreferenceOptimization(PairStage):
    """Pairs, and no reference: what holds the policy is the likelihood of the chosen answers."""

    name = "cpo"
    summary = "Contrastive preference optimisation: pairs without a reference, and the chosen answers' likelihood"
    paper = "arXiv 2401.08417"
    citation = """
        @misc{xu2024contrastive,
            title = {{Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine
                     Translation}},
            author = {Haoran Xu and Amr Sharaf and Yunmo Chen and Weiting Tan and Lingfeng Shen and Benjamin Van
                      Durme and Kenton Murray and Young Jin Kim},
            year = {2024},
            eprint = {2401.08417},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    defaults = {"train": {"learning_rate": 5e-6}}

    class Options(PairOptions):
        """Which loss, and the weight of the likelihood."""

        loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
        """How answers are compared; `ipo` compares log-probs a token, the others their sums."""
        beta: float = Field(0.1, gt=0)
        """The scale of the comparison."""
        cpo_alpha: float = Field(1.0, ge=0)
        """Weight of the chosen answers' negative log-prob a token. 0: none."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """The share of labels that are wrong."""

    def check(self, run: RunView) -> None:
        refuse_unused("cpo", self.options, [self.options.loss], {"label_smoothing": ("sigmoid",)})

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round([pair_batch(rows)])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o = self.options
        scores = run.score(batch)
        logps = scores.mean() if o.loss == "ipo" else scores.sum()

        loss = LOSSES[o.loss](*sides(logps), o.beta, o.label_smoothing)
        terms = {o.loss: Term(loss.sum(), per="pairs")}
        if o.cpo_alpha:
            terms["nll"] = chosen_nll(scores, o.cpo_alpha)

        return LossOutput(terms, pair_metrics(logps, o.beta * logps), scores)

    def demo(self) -> Demo:
        return pair_demo(max_steps=60, learning_rate=1e-3)


# Each returns one loss a pair, (pairs,), of the answers' log-probs (pairs,).


def sigmoid(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Equation 3 of arXiv 2401.08417; with label smoothing, labels are wrong with that probability."""
    return logistic_loss(beta * (chosen - rejected), label_smoothing)


def hinge(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """SLiC's margin: arXiv 2305.10425, on scaled log-probs."""
    return (1 - beta * (chosen - rejected)).relu()


def ipo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Equation 17 of arXiv 2310.12036, of log-probs a token."""
    return (chosen - rejected - 1 / (2 * beta)).square()


LOSSES: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    loss.__name__: loss for loss in (sigmoid, hinge, ipo)
}
