"""Unlikelihood training (arXiv 1911.03860, section 2): learn good answers, and that bad ones are not to be said.

With p_t = pi(y_t | y_<t), and N+ and N- the tokens of the good and of the bad answers in the whole optimizer window:

    1/N+  sum_good  -log p_t   +   alpha / N-  sum_bad  -log(1 - p_t)

Departures from the paper: each sum is divided by its own tokens, so that alpha means the same whatever the share of bad
answers, and every token of a bad answer counts the same (its beta is 1).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from llmtk import Batch, Demo, Group, LossOutput, Mean, Round, RunView, Section, Sequence, Stage, Term
from llmtk.contract import Row
from llmtk.demo import addition
from llmtk.demo.measure import exact_match
from pydantic import Field
from torch import Tensor


def log_one_minus_exp(logps: Tensor) -> Tensor:
    """Return log(1 - p) of log p, any shape; that of p = 1 is finite."""
    return (-logps.expm1()).clamp(min=1e-6).log()


class Unlikelihood(Stage):
    """Answers that are labelled good or bad, each for itself."""

    summary = "Unlikelihood training: good answers become likely, and bad ones unlikely"
    paper = "arXiv 1911.03860"
    row_types = ("labelled",)
    defaults: ClassVar = {"train": {"learning_rate": 1e-5}}

    class Options(Section):
        """What bad answers count."""

        alpha: float = Field(0.1, ge=0)
        """How much bad answers count beside good ones. Much of it unlearns also what the two have in common."""

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        return Round.of([_group(row) for row in rows])

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        scores = run.score(batch)
        good = batch.per_sequence["good"][batch.target_sequence]  # (targets,)

        likelihood = torch.where(good, -scores.logps, 0.0).sum()
        unlikelihood = torch.where(good, 0.0, -log_one_minus_exp(scores.logps)).sum()

        terms = {
            "likelihood": Term(likelihood, per="good_tokens"),
            "unlikelihood": Term(unlikelihood, per="bad_tokens", coefficient=self.options.alpha),
        }
        p = scores.logps.detach().exp()
        metrics = {"p_good": Mean((p * good).sum(), good.sum()), "p_bad": Mean((p * ~good).sum(), (~good).sum())}
        return LossOutput(terms, metrics, scores)

    def demo(self) -> Demo:
        train = {"max_steps": 60, "per_device_train_batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 5}
        problems, held_out = addition.problems("train", 4000), addition.problems("held-out", 100)
        return Demo(
            train=[_answered(problem, right=index % 4 > 0) for index, problem in enumerate(problems)],
            eval=[_answered(problem, right) for problem in held_out for right in (True, False)],
            config={"train": train | {"lr_scheduler_type": "cosine", "logging_steps": 10, "bf16": False}},
            figure="exact match",
            measure=lambda run: exact_match(run, [addition.dialogue(problem) for problem in held_out]),
        )


def _group(row: Row) -> Group:
    """Return a row's prompt and answer as one sequence, and its label as a column."""
    tokens = [*row["prompt_ids"], *row["completion_ids"]]
    targets = [False] * len(row["prompt_ids"]) + row["completion_targets"]
    counted = {"good_tokens": sum(targets) * row["label"], "bad_tokens": sum(targets) * (not row["label"])}
    return Group([Sequence(tokens, targets)], counted, per_sequence={"good": [row["label"]]}, place=row["place"])


def _answered(problem: addition.Problem, right: bool) -> dict[str, Any]:
    """Return a problem with its answer, or with one that is wrong by one."""
    asked, answered = addition.dialogue(problem)["messages"]
    if not right:
        answered = answered | {"content": str(int(problem.answer) + 1)}
    return {"prompt": [asked], "completion": [answered], "label": right}
