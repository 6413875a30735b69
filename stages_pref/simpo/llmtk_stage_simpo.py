"""Simple preference optimisation (arXiv 2405.14734, equation 6): log-probs a token, a target margin, no reference.

With a = log pi(y|x) / |y|, the mean over the answer's |y| tokens, for the P pairs (c, j) of the whole optimizer window,
on all ranks:

    z    =  beta (a_c - a_j) - gamma

    1/P  sum_pairs  -log sigmoid(z)                                 (loss: sigmoid)
    1/P  sum_pairs  max(0, 1 - z)                                   (loss: hinge)

`gamma` is the paper's: a margin between rewards beta a, subtracted as it is. The authors' code takes it as
gamma_beta_ratio = gamma/beta and subtracts that before it multiplies by beta, and TRL divides its simpo_gamma by beta
for the same: z is equal in all three. The defaults are beta 2.0 and gamma 1.0, a ratio of 0.5; TRL's are 0.1 and 0.5, a
ratio of 5. Pure unless `nll_alpha` adds the chosen answers' negative log-prob a token, as TRL's cpo_alpha does by
default.
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


class SimplePreferenceOptimization(PairStage):
    """Pairs, and no reference: a small learning rate is all that holds the policy."""

    name = "simpo"
    summary = "Simple preference optimisation: length-averaged log-probs of pairs, a target margin, no reference"
    paper = "arXiv 2405.14734"
    citation = """
        @misc{meng2024simpo,
            title = {{SimPO: Simple Preference Optimization with a Reference-Free Reward}},
            author = {Yu Meng and Mengzhou Xia and Danqi Chen},
            year = {2024},
            eprint = {2405.14734},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    defaults = {"train": {"learning_rate": 1e-6}}

    class Options(PairOptions):
        """The loss, its scale and its margin."""

        loss: Literal["sigmoid", "hinge"] = "sigmoid"
        """How answers are compared."""
        beta: float = Field(2.0, gt=0)
        """The scale of the comparison."""
        gamma: float = Field(1.0, ge=0)
        """The margin of rewards that is aimed at, beta (a_c - a_j); the paper's code gives it as gamma/beta."""
        label_smoothing: float = Field(0.0, ge=0, lt=0.5)
        """The share of labels that are wrong."""
        nll_alpha: float = Field(0.0, ge=0)
        """Weight of the chosen answers' negative log-prob a token. 0: none."""

    def check(self, run: RunView) -> None:
        refuse_unused("simpo", self.options, [self.options.loss], {"label_smoothing": ("sigmoid",)})

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round([pair_batch(rows)])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o = self.options
        scores = run.score(batch)
        chosen, rejected = sides(scores.mean())

        loss = LOSSES[o.loss](o.beta * (chosen - rejected) - o.gamma, o.label_smoothing)
        terms = {o.loss: Term(loss.sum(), per="pairs")}
        if o.nll_alpha:
            terms["nll"] = chosen_nll(scores, o.nll_alpha)

        return LossOutput(terms, pair_metrics(scores.mean(), o.beta * scores.mean()), scores)

    def demo(self) -> Demo:
        # Alone, and at a rate that shows in a minute, it unlearns about as many answers as it learns.
        return pair_demo(max_steps=60, learning_rate=5e-4, options={"simpo": {"nll_alpha": 1.0}})


# Each returns one loss a pair, (pairs,), of the margins z (pairs,).


def sigmoid(margins: Tensor, label_smoothing: float) -> Tensor:
    """Equation 6 of arXiv 2405.14734; with label smoothing, labels are wrong with that probability."""
    return logistic_loss(margins, label_smoothing)


def hinge(margins: Tensor, label_smoothing: float) -> Tensor:
    """SLiC's margin, as in the authors' code."""
    return (1 - margins).relu()


LOSSES: dict[str, Callable[[Tensor, float], Tensor]] = {loss.__name__: loss for loss in (sigmoid, hinge)}
