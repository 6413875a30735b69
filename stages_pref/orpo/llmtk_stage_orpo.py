"""Odds ratio preference optimisation (arXiv 2403.07691, equations 6 and 7): fine-tuning, and the odds of pairs.

With a = log pi(y|x) / |y|, the mean over the answer's |y| tokens, and its log odds a - log(1 - e^a), for the P pairs
(c, j) of the whole optimizer window, on all ranks, and its N tokens that are fine-tuned on:

    1/N  sum_t  -log pi(c_t | c_<t, x)   +   beta  1/P  sum_pairs  -log sigmoid(log odds_c - log odds_j)

beta is the paper's lambda. `nll_on: completion`, the paper's equation, fine-tunes on the chosen answer; `all` on its
prompt too, as the authors' code and TRL do. Departures from other code: means are over the window, not over a
micro-batch; log(1 - e^a) keeps finite gradients where a rounds to 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from llmtk_pref import PairOptions, PairStage, chosen_nll, pair_batch, pair_demo, pair_metrics, sides
from pydantic import Field
from torch import Tensor

from llmtk import Batch, Demo, Group, LossOutput, Mean, Round, RunView, Term
from llmtk import Sequence as Tokens
from llmtk.contract import Row


class OddsRatioPreferenceOptimization(PairStage):
    """Pairs, and no reference: it fine-tunes and prefers in one go, from a base model."""

    name = "orpo"
    summary = "Odds ratio preference optimisation: fine-tuning on the chosen answers, and the odds of pairs"
    paper = "arXiv 2403.07691"
    citation = """
        @misc{hong2024orpo,
            title = {{ORPO: Monolithic Preference Optimization without Reference Model}},
            author = {Jiwoo Hong and Noah Lee and James Thorne},
            year = {2024},
            eprint = {2403.07691},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    defaults = {"train": {"learning_rate": 8e-6}}

    class Options(PairOptions):
        """The weight of the preference, and what is fine-tuned on."""

        beta: float = Field(0.1, gt=0)
        """The paper's lambda: weight of the odds ratio."""
        nll_on: Literal["completion", "all"] = "completion"
        """Fine-tune on the chosen answer, or on its prompt as well, which then is computed twice for each pair."""

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round([whole_batch(rows) if self.options.nll_on == "all" else pair_batch(rows)])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        beta = self.options.beta
        scores = run.score(batch)
        is_answer = batch.per_target.get("is_answer", torch.ones_like(scores.logps))
        logps = batch.sum_by_sequence(scores.logps * is_answer) / batch.sum_by_sequence(is_answer.to(scores.logps))

        log_odds = log_odds_ratio(*sides(logps))
        ratio = F.logsigmoid(log_odds)
        terms = {"nll": chosen_nll(scores, 1.0), "odds_ratio": Term(-ratio.sum(), per="pairs", coefficient=beta)}

        metrics = pair_metrics(logps, beta * logps)
        metrics["log_odds_ratio"] = Mean(ratio.detach().sum(), len(ratio))
        metrics["log_odds_chosen"] = Mean(log_odds.detach().sum(), len(log_odds))
        return LossOutput(terms, metrics, scores)

    def demo(self) -> Demo:
        return pair_demo(max_steps=60, learning_rate=1e-3)


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(pairs,): log of odds_c/odds_j, odds = p/(1 - p), of log-probs a token (pairs,): arXiv 2403.07691, equation 4."""
    return (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0, any shape, exact at both ends: Maechler, "Accurately computing log(1 - exp(-|a|))", 2012.

    Nearer to 0 than the type's precision, where 1 - e^x is rounding alone, it is cut off. Each branch sees only what it
    is for: the other one's infinite gradient, though multiplied by 0, would be NaN.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    is_near = x > -math.log(2)
    near = (-torch.expm1(x.masked_fill(~is_near, -1.0))).log()
    far = torch.log1p(-x.masked_fill(is_near, -1.0).exp())
    return torch.where(is_near, near, far)


def whole_batch(rows: Sequence[Row]) -> Batch:
    """Return pairs as a batch in which each answer carries its own prompt: one behind which both stand has no targets.

    Targets are all tokens of the chosen sequence but its first, and the rejected answer's; `is_answer` (targets,) says
    which count in the odds. Weights as in `pair_batch`, with the prompt among `tokens` and `chosen_tokens`.
    """
    return Batch.collate([_group(row) for row in rows])


def _group(row: Row) -> Group:
    prompt = list(row["prompt_ids"])
    chosen, rejected = [*prompt, *row["chosen_ids"]], [*prompt, *row["rejected_ids"]]
    in_chosen = [*[False] * len(prompt), *row["chosen_targets"]]
    in_rejected = [*[False] * len(prompt), *row["rejected_targets"]]
    chosen_tokens, rejected_tokens = len(chosen) - 1, sum(in_rejected)
    return Group(
        [Tokens(chosen, [False, *[True] * chosen_tokens]), Tokens(rejected, in_rejected)],
        {"pairs": 1, "tokens": chosen_tokens + rejected_tokens, "chosen_tokens": chosen_tokens},
        per_target={"is_answer": [*in_chosen[1:], *[True] * rejected_tokens]},
        place=row["place"],
    )
