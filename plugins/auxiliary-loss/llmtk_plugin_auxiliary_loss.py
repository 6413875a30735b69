"""Auxiliary losses: terms beside a stage's own, made of the scores that the stage hands on.

With p_t the distribution that predicts target t, z_t its logits, and the N target tokens of the optimizer window, on
all ranks, the loss becomes

    loss  -  b / N  sum_t H(p_t)  +  c / N  sum_t log^2 Z_t        H(p) = - sum_v p_v log p_v,   Z = sum_v exp z_v

b, `entropy_bonus`, keeps predictions from becoming too sure (arXiv 1701.06548, section 3.1; below 0: surer). c,
`z_loss`, keeps Z near 1, so that logits do not drift (PaLM, arXiv 2204.02311, section 5, where it is 1e-4).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from pydantic import model_validator

from llmtk import Batch, ConfigurationError, LossOutput, PluginError, Round, RunView, Section, Term, hookimpl
from llmtk.contract import Data, Row
from llmtk.scoring import Scores

WEIGHT = "auxiliary_targets"
"""The weight that divides the terms: the target tokens of a group."""


class AuxiliaryLoss:
    """Adds an entropy bonus and the z-loss to whatever is trained."""

    class Options(Section):
        """What is added, and how much of it."""

        entropy_bonus: float = 0.0
        """This times the mean entropy of the predictions, in nats, is taken from the loss. Below 0 it is a penalty."""
        z_loss: float = 0.0
        """This times the mean square of the logarithm of the logits' normaliser is added to the loss. PaLM: 1e-4."""

        @model_validator(mode="after")
        def _adds_something(self) -> AuxiliaryLoss.Options:
            if not self.entropy_bonus and not self.z_loss:
                raise ValueError("give entropy_bonus or z_loss: without either it adds nothing")
            return self

    def __init__(self, options: Options) -> None:
        self.options = options
        asked = {"entropy": options.entropy_bonus, "logsumexp": options.z_loss}
        self.wanted = [name for name, coefficient in asked.items() if coefficient]

    @hookimpl(wrapper=True)
    def build_data(self, run: RunView) -> Generator[None, Data, Data]:
        if run.stage.head != "language":
            raise ConfigurationError(
                f"plugins.auxiliary-loss needs logits, and a model of stage {run.stage_name} has a head of one "
                "value, which gives none. Leave it out"
            )
        return (yield)

    @hookimpl
    def around_prepare_batch(self, run: RunView, rows: list[Row], inner: Callable[[list[Row]], Round]) -> Round:
        round = inner(rows)
        return replace(round, windows=[counted(window) for window in round.windows])

    @hookimpl
    def around_compute_loss(self, run: RunView, batch: Batch, inner: Callable[[Batch], LossOutput]) -> LossOutput:
        with run.scoring_also(*self.wanted):
            output = inner(batch)
        return replace(output, terms=output.terms | self._terms(output.scores))

    def _terms(self, scores: object) -> dict[str, Term]:
        """Return the terms, from the scores of a micro-batch. PluginError where the stage hands on none."""
        if not isinstance(scores, Scores) or any(getattr(scores, name) is None for name in self.wanted):
            raise PluginError(
                "auxiliary-loss: the stage hands on no scores. LossOutput(terms, metrics, scores) hands on what "
                "run.score gave"
            )
        terms = {}
        if scores.entropy is not None and self.options.entropy_bonus:
            terms["aux_entropy"] = Term(scores.entropy.sum(), WEIGHT, -self.options.entropy_bonus)
        if scores.logsumexp is not None and self.options.z_loss:
            terms["aux_z_loss"] = Term(scores.logsumexp.square().sum(), WEIGHT, self.options.z_loss)
        return terms


def counted(window: Batch) -> Batch:
    """Declare the target tokens of each group as a weight."""
    targets = torch.zeros(len(window), dtype=torch.float64)
    targets = targets.index_add(0, window.sequence_group, window.target_counts.double())
    return replace(window, weights=window.weights | {WEIGHT: targets})
