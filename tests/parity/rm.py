"""The loss of rm beside TRL 1.16.0's reward trainer, on the same rewards of answers.

    python tests/parity/rm.py

TRL's own `compute_loss` makes its loss of what a model answers, in the environment that the benchmarks use (.venv-trl,
made on the first call; without it the comparison is skipped). Compared, to 1e-6: the mean loss over the pairs, its
gradient by the reward of each answer, the accuracy and the margin; with margins and centred rewards, and without.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from peer import answered, ask, difference

PAIRS = 32
TOLERANCE = 1e-6


def main() -> None:
    """Compare, print a table, and end with an error if anything differs."""
    if answered(trl_side):
        return
    data, wanted = rewards(), cases()
    theirs = ask(__file__, {"data": data, "cases": wanted})
    worst = 0.0
    for case, answer in zip(wanted, theirs, strict=True):
        ours = llmtk_side(data, case)
        apart = difference(ours, answer)
        print(f"{json.dumps(case):64} {ours['loss']:12.6f} {apart:11.1e}")
        worst = max(worst, apart)
    if not worst <= TOLERANCE:
        sys.exit(f"llmtk and TRL differ by {worst:.1e}, more than {TOLERANCE}")
    print(f"llmtk and TRL agree to {worst:.1e}")


def cases() -> list[dict[str, Any]]:
    """Return what is compared: whether pairs have margins, and how strongly rewards are held around 0."""
    return [{"margins": m, "center": c} for m, c in itertools.product((False, True), (None, 0.01, 1.0))]


def rewards() -> dict[str, list[float]]:
    """Return the rewards of the pairs' answers, chosen and rejected, and margins."""
    from random import Random

    random = Random(0)
    names = ("chosen", "rejected", "margin")
    return {name: [random.gauss(0, 2) for _ in range(PAIRS)] for name in names}


def llmtk_side(data: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Return what the stage makes of the rewards."""
    import torch
    from llmtk_stage_rm import RewardModeling, _group

    from llmtk import Batch

    stage = RewardModeling(RewardModeling.Options(center_rewards_coefficient=case["center"]))
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "place": ""}
    margins = data["margin"] if case["margins"] else [None] * PAIRS
    batch = Batch.collate([_group(row | {"margin": margin}) for margin in margins])
    chosen, rejected = (torch.tensor(data[name], requires_grad=True) for name in ("chosen", "rejected"))
    run: Any = SimpleNamespace(values=lambda batch: torch.stack([chosen, rejected], 1).flatten())
    output = stage.compute_loss(run, batch)
    loss = sum(term.coefficient * term.sum / PAIRS for term in output.terms.values())
    return answer_of(loss, chosen, rejected) | {
        name: float(output.metrics[name].sum) / float(output.metrics[name].count) for name in ("accuracy", "margin")
    }


def trl_side(question: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what TRL's trainer makes of the rewards."""
    return [trl_loss(question["data"], case) for case in question["cases"]]


def trl_loss(data: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's loss of one micro-batch, by a model that answers with the given rewards."""
    import torch
    from trl import RewardTrainer

    chosen, rejected = (torch.tensor(data[name], requires_grad=True) for name in ("chosen", "rejected"))
    metrics: Any = {"train": defaultdict(list)}
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=case["center"]),
        accelerator=SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value),
        _metrics=metrics,
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(2 * PAIRS, 2)}
    if case["margins"]:
        inputs["margin"] = torch.tensor(data["margin"])
    model = lambda **_: SimpleNamespace(logits=torch.cat([chosen, rejected])[:, None])  # noqa: E731
    loss = RewardTrainer.compute_loss(trainer, model, inputs)
    return answer_of(loss, chosen, rejected) | {name: metrics["train"][name][0] for name in ("accuracy", "margin")}


def answer_of(loss: Any, chosen: Any, rejected: Any) -> dict[str, Any]:
    """Return a loss, and its gradients by the rewards."""
    import torch

    gradients = torch.autograd.grad(loss, (chosen, rejected))
    return {"loss": loss.item(), "gradients": [gradient.tolist() for gradient in gradients]}


if __name__ == "__main__":
    main()
