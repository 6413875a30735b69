"""What preference stages share: a pair as one group of two answers behind their prompt, metrics, and the demo's pairs.

A pair's group holds the prompt once, as a prefix, and behind it the chosen answer, then the rejected one. Values per
sequence are therefore chosen, rejected, chosen, rejected, ... (`sides` takes them apart).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from llmtk import (
    Batch,
    DatasetError,
    Demo,
    Group,
    Mean,
    NothingLeft,
    RunView,
    Section,
    Stage,
    Term,
)
from llmtk import Sequence as Tokens
from llmtk.contract import Dataset, Row
from llmtk.data import Pair
from llmtk.data import Row as DataRow
from llmtk.demo import addition
from llmtk.demo.measure import exact_match
from llmtk.scoring import Scores

DEMO_TRAIN = {
    "per_device_train_batch_size": 32,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "logging_steps": 20,
    "bf16": False,
}
"""Settings of the shared sections that the demos have in common."""


class PairOptions(Section):
    """What every stage on pairs can be told."""

    identical_pairs: Literal["drop", "refuse"] = "drop"
    """What happens to pairs whose answers are equal, which prefer nothing: they are left out and counted, or the run
    ends with an error that names them."""


class PairStage(Stage):
    """A stage whose rows are pairs."""

    row_types = ("pair",)

    class Options(PairOptions):
        """What every stage on pairs can be told."""

    def encode_rows(self, run: RunView, rows: Sequence[DataRow]) -> Dataset:
        return super().encode_rows(run, without_identical(run, rows, self.options.identical_pairs))


def without_identical(run: RunView, rows: Sequence[DataRow], then: str) -> list[DataRow]:
    """Leave out pairs whose answers are equal, and say which; or refuse them."""
    identical = [row.place for row in rows if isinstance(row, Pair) and row.chosen == row.rejected]
    if identical:
        which = ", ".join(identical[:3]) + (", ..." if len(identical) > 3 else "")
        told = f"{len(identical)} of {len(rows)} pairs have equal answers ({which})"
        if then == "refuse":
            raise DatasetError(
                f"{told}. Take them out, or let them be left out: identical_pairs: drop in the stage's section"
            )
        if len(identical) == len(rows):
            raise NothingLeft(f"{told}, and no row is left")
        run.notify(f"{told} and are left out.")
    return [row for row in rows if not isinstance(row, Pair) or row.chosen != row.rejected]


def pair_batch(rows: Sequence[Row]) -> Batch:
    """Return encoded pairs as a batch, with the weights `pairs`, `tokens` (both answers) and `chosen_tokens`."""
    return Batch.collate([_group(row) for row in rows])


def _group(row: Row) -> Group:
    answers = [Tokens(row[f"{name}_ids"], row[f"{name}_targets"], 0) for name in ("chosen", "rejected")]
    chosen, rejected = (sum(row[f"{name}_targets"]) for name in ("chosen", "rejected"))
    weights = {"pairs": 1, "tokens": chosen + rejected, "chosen_tokens": chosen}
    return Group(answers, weights, [row["prompt_ids"]], place=row["place"])


def sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """Take values per sequence (2 pairs,) apart: those of the chosen answers (pairs,), and of the rejected ones."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return chosen, rejected


def chosen_targets(batch: Batch) -> Tensor:
    """(targets,) bool: which targets belong to a chosen answer."""
    return batch.target_sequence % 2 == 0


def logistic_loss(margins: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z) of margins z, any shape: labels are wrong with probability e."""
    if not label_smoothing:  # times 0, an infinite loss would be no number
        return -F.logsigmoid(margins)
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def chosen_nll(scores: Scores, coefficient: float) -> Term:
    """Return the negative log-prob of the chosen answers, a mean over all their tokens of the window."""
    return Term(-scores.logps[chosen_targets(scores.batch)].sum(), per="chosen_tokens", coefficient=coefficient)


def pair_metrics(logps: Tensor, rewards: Tensor | None = None) -> dict[str, Mean]:
    """Return metrics of a micro-batch as the field names them, each a mean over pairs.

    `logps` (2 pairs,) are the answers' log-probs as the stage sums or averages them; `rewards` (2 pairs,) what its loss
    compares. Equal rewards count as wrong, so that an untrained policy has accuracy 0.
    """
    named: dict[str, tuple[Tensor, ...]] = {"logps": sides(logps.detach())}
    metrics = {}
    if rewards is not None:
        chosen, rejected = named["rewards"] = sides(rewards.detach())
        metrics["rewards/margins"] = _mean(chosen - rejected)
        metrics["rewards/accuracies"] = _mean((chosen > rejected).float())
    for name, values in named.items():
        metrics |= {f"{name}/chosen": _mean(values[0]), f"{name}/rejected": _mean(values[1])}
    return metrics


def kl_metric(logps: Tensor, reference_logps: Tensor) -> dict[str, Mean]:
    """Return `kl`, the mean over target tokens (targets,) of the estimator k2 of KL(policy || reference).

    k2 = (log p/q)^2 / 2 (Schulman, "Approximating KL Divergence", 2020). The tokens are the data's, not the policy's
    own, so it says how far the policy has moved there; k3 would be ruled there by what the policy has unlearnt.
    """
    return {"kl": _mean((logps.detach() - reference_logps).square() / 2)}


def _mean(values: Tensor) -> Mean:
    return Mean(values.sum(), len(values))


# The demo: right and wrong sums


def demo_rows(split: addition.Split, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return pairs of the demo's task: the right sum, and one that is wrong in a digit."""
    random = Random(seed)
    return [
        {
            "prompt": [{"role": "user", "content": problem.prompt}],
            "chosen": [{"role": "assistant", "content": problem.answer}],
            "rejected": [{"role": "assistant", "content": wrong_answer(problem, random)}],
        }
        for problem in addition.problems(split, n, seed)
    ]


def wrong_answer(problem: addition.Problem, random: Random) -> str:
    """Return the right sum with one digit changed by one, as somebody does who forgets to carry."""
    digits = [int(digit) for digit in problem.answer]
    place = random.randrange(len(digits))
    nearby = [digits[place] + step for step in (-1, 1) if (place > 0) <= digits[place] + step <= 9]
    digits[place] = random.choice(nearby)
    return "".join(map(str, digits))


def pair_demo(*, options: Mapping[str, Mapping[str, Any]] | None = None, **train: Any) -> Demo:
    """Return the demo of a policy's stage on pairs: held-out preference accuracy, and exact match.

    `options` is the stage's own section, under its name.
    """
    held_out = demo_rows("held-out", 200, seed=1)
    problems = [addition.dialogue(problem) for problem in addition.problems("held-out", 200, 1)]
    return Demo(
        train=demo_rows("train", 4000),
        eval=held_out,
        config={"train": DEMO_TRAIN | train, **(options or {})},
        figure="preference accuracy",
        measure=preference_accuracy,
        also={"exact match": lambda run: exact_match(run, problems)},
    )


def preference_accuracy(run: RunView) -> float:
    """Return the share of held-out pairs whose chosen answer is likelier under the policy than the rejected one."""
    assert run.eval_rows is not None
    mine = range(run.rank, len(run.eval_rows), run.world_size)
    return share_preferred(run, pair_batch([run.eval_rows[index] for index in mine]))


def share_preferred(run: RunView, batch: Batch) -> float:
    """Return the share of the pairs of all ranks whose first sequence is likelier under the policy than its second."""
    chosen, rejected = sides(run.score_window(batch).sum())
    total = run.sum_over_ranks({"right": float((chosen > rejected).sum()), "pairs": len(chosen)})
    return total["right"] / total["pairs"]
