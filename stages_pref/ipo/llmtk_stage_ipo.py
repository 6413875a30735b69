"""Identity preference optimisation (arXiv 2310.12036, equation 17): the log-ratio of a pair towards a fixed gap.

With r = log pi(y|x) - log pi_ref(y|x), summed over the answer's |y| tokens, for the P pairs (c, j) of the whole
optimizer window, on all ranks, and beta, which is the paper's tau:

    1/P  sum_pairs  ((r_c/|c| - r_j/|j|) - 1/(2 beta))^2

Where dpo drives the gap of a pair that is always preferred to infinity, this one stops at 1/(2 beta); where the answer
c is preferred with probability p, at (2p - 1)/(2 beta).

Implementations differ in the ratios: the paper writes the sum r; TRL, on its authors' word, takes the mean r/|y|, which
is the default here. `average_logps: false` is the sum, where the same beta asks for that gap of whole answers.
Departures from other code: `rewards/*` are beta times what the loss compares, so that margins tend to 1/2; TRL's are of
the sums.
"""

from __future__ import annotations

from llmtk_pref import PairOptions, PairStage, kl_metric, pair_batch, pair_demo, pair_metrics, sides
from pydantic import Field
from torch import Tensor

from llmtk import Batch, Demo, LossOutput, Round, RunView, Term
from llmtk.contract import Row


class IdentityPreferenceOptimization(PairStage):
    """Pairs; the reference is the policy as it is when the run starts, unless `model.reference` names another."""

    name = "ipo"
    summary = "Identity preference optimisation: the log-ratio of pairs towards a fixed gap over a reference"
    paper = "arXiv 2310.12036"
    citation = """
        @misc{azar2023general,
            title = {{A General Theoretical Paradigm to Understand Learning from Human Preferences}},
            author = {Mohammad Gheshlaghi Azar and Mark Rowland and Bilal Piot and Daniel Guo and Daniele
                      Calandriello and Michal Valko and Rémi Munos},
            year = {2023},
            eprint = {2310.12036},
            archivePrefix = {arXiv},
            primaryClass = {cs.AI},
        }
    """
    needs = frozenset({"reference"})
    honours = frozenset({"precompute_reference"})
    defaults = {"train": {"learning_rate": 5e-6}}

    class Options(PairOptions):
        """How far the policy may go, and what is compared."""

        beta: float = Field(0.1, gt=0)
        """The paper's tau: the gap that pairs are driven to is 1/(2 beta)."""
        average_logps: bool = True
        """Compare log-ratios a token. False: summed over the answer, as in the paper's text."""

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        batch = pair_batch(rows)
        reference_logps = run.score_window(batch, model="reference").logps
        return Round([batch.with_columns(per_target={"reference_logps": reference_logps})])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o = self.options
        scores = run.score(batch)
        reference_logps = batch.per_target["reference_logps"]
        lengths = batch.target_counts if o.average_logps else 1
        ratios = batch.sum_by_sequence(scores.logps - reference_logps) / lengths

        loss = ipo_loss(*sides(ratios), o.beta)

        metrics = pair_metrics(scores.sum() / lengths, o.beta * ratios) | kl_metric(scores.logps, reference_logps)
        return LossOutput({"loss": Term(loss.sum(), per="pairs")}, metrics, scores)

    def demo(self) -> Demo:
        return pair_demo(max_steps=60, learning_rate=2e-4, options={"ipo": {"beta": 1.0}})


def ipo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, beta: float) -> Tensor:
    """(pairs,): equation 17 of arXiv 2310.12036, of log-ratios (pairs,), averaged or summed."""
    return (chosen_ratios - rejected_ratios - 1 / (2 * beta)).square()
