"""Reward models: a head of one value on the policy's trunk, trained on pairs.

The reward s(x, y) is what the head gives at the last token of answer y behind prompt x. Over the P pairs (c, j) of the
whole optimizer window, on all ranks, with m a pair's margin (0 where the rows have none):

    1/P  sum_pairs  -log sigmoid(s_c - s_j - m)  +  coefficient  1/P  sum_pairs  (s_c + s_j)^2

The first term is Bradley and Terry's model of the preference (arXiv 2203.02155, equation 1), its margin that of arXiv
2307.09288, equation 2; the second, `center_rewards_coefficient`, holds rewards around 0, which pairs alone leave open
(arXiv 2312.09244, section 2). A new head has weights from a normal distribution of variance 1 / (width + 1) (arXiv
2009.01325, appendix B.1) and no bias, drawn by `train.seed`: rewards begin with a variance near 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from llmtk_pref import DEMO_TRAIN, PairOptions, PairStage, demo_rows, sides
from pydantic import Field

from llmtk import Batch, Data, DatasetError, Demo, Group, LossOutput, Mean, Round, RunView, Term
from llmtk import Sequence as Tokens
from llmtk.contract import Dataset, Row
from llmtk.data import Pair
from llmtk.data import Row as DataRow


class RewardModeling(PairStage):
    """Pairs; the trained model is transformers' sequence classification with one label."""

    name = "rm"
    summary = "Reward model: a head of one value, which ranks the answers of pairs"
    paper = "arXiv 2203.02155, section 3.5"
    citation = """
        @misc{ouyang2022training,
            title = {{Training language models to follow instructions with human feedback}},
            author = {Long Ouyang and Jeff Wu and Xu Jiang and Diogo Almeida and Carroll L. Wainwright and
                      Pamela Mishkin and Chong Zhang and Sandhini Agarwal and Katarina Slama and Alex Ray
                      and John Schulman and Jacob Hilton and Fraser Kelton and Luke Miller and Maddie Simens
                      and Amanda Askell and Peter Welinder and Paul Christiano and Jan Leike and Ryan Lowe},
            year = {2022},
            eprint = {2203.02155},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    head = "value"
    defaults = {"train": {"learning_rate": 1e-5}}

    class Options(PairOptions):
        """What beside the pairs' order is learnt."""

        center_rewards_coefficient: float | None = Field(None, gt=0)
        """Add this times the mean of (chosen + rejected reward) squared; 0.01 holds rewards around 0 (arXiv
        2312.09244)."""

    def build_data(self, run: RunView) -> Data:
        data = super().build_data(run)
        if data.eval is not None and _has_margin(data.train) != _has_margin(data.eval):
            has, lacks = ("data.train", "data.eval") if _has_margin(data.train) else ("data.eval", "data.train")
            raise DatasetError(f"{has} has margins and {lacks} has none, so that their losses differ. Give both, or no")
        return data

    def encode_rows(self, run: RunView, rows: Sequence[DataRow]) -> Dataset:
        without = [row.place for row in rows if isinstance(row, Pair) and row.margin is None]
        if without and len(without) < len(rows):
            raise DatasetError(
                f"{without[0]} has no margin, as {len(without)} of {len(rows)} rows: give every row one (0 where "
                "nothing is known of it), or none"
            )
        return super().encode_rows(run, rows)

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round.of([_group(row) for row in rows])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        chosen, rejected = sides(run.values(batch))
        margins = batch.per_group["margin"]

        terms = {"preference": Term(-F.logsigmoid(chosen - rejected - margins).sum(), per="pairs")}
        if self.options.center_rewards_coefficient is not None:
            centre = (chosen + rejected).square().sum()
            terms["center"] = Term(centre, per="pairs", coefficient=self.options.center_rewards_coefficient)

        difference = (chosen - rejected).detach()
        pairs = len(batch)
        metrics = {
            "accuracy": Mean((difference > 0).sum(), pairs),
            "margin": Mean(difference.sum(), pairs),
            "rewards/chosen": Mean(chosen.detach().sum(), pairs),
            "rewards/rejected": Mean(rejected.detach().sum(), pairs),
        }
        return LossOutput(terms, metrics)

    def demo(self) -> Demo:
        train = {"max_steps": 100, "per_device_train_batch_size": 64, "learning_rate": 1e-3}
        return Demo(
            train=_with_other_sums(demo_rows("train", 8000)),
            eval=_with_other_sums(demo_rows("held-out", 400, seed=1)),
            config={"train": DEMO_TRAIN | train},
            figure="accuracy on pairs",
            measure=lambda run: run.evaluate()["accuracy"],
        )


def _group(row: Row) -> Group:
    """Return a pair as its two answers behind their prompt, each judged at its last token."""
    answers = [Tokens.ended(row[f"{name}_ids"], 0) for name in ("chosen", "rejected")]
    margin = float(row.get("margin") or 0.0)
    return Group(answers, {"pairs": 1}, [row["prompt_ids"]], per_group={"margin": margin}, place=row["place"])


def _with_other_sums(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put another question's right sum in place of each wrong one, which is off in a digit.

    A judge of four layers learns in a minute what sum is about right, not which is.
    """
    others = rows[1:] + rows[:1]
    pairs = [row | {"rejected": other["chosen"]} for row, other in zip(rows, others, strict=True)]
    return [pair for pair in pairs if pair["rejected"] != pair["chosen"]]


def _has_margin(rows: Dataset) -> bool:
    return rows[0].get("margin") is not None
