"""The loss and advantages of rloo beside those of TRL 1.16.0, on the same log-probs of tokens and the same rewards.

    python tests/parity/rloo.py

The stage makes its loss as in a run, only that the log-probs are given; TRL's own `_compute_loss` makes its, in the
environment that the benchmarks use (.venv-trl, made on the first call; without it the comparison is skipped). TRL's
advantages stand in the midst of its generation and cannot be called: its arithmetic stands here, with its own
`nanstd`. Compared, to 1e-6: the loss of a window, its gradient by the log-prob of each token, the advantages, and the
share of clipped ratios.

`kl_in: loss` has no counterpart. The `kl` that is reported is k3's mean, TRL's that of the log-ratio, which can be
negative.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from grpo import ENTROPY, ROOM, SIZE, numbers, stand_in, window
from peer import answered, ask, difference

TOLERANCE = 1e-6

CASES: list[dict[str, Any]] = [
    {"beta": 0.0},
    {"beta": 0.0, "epsilon": 0.05},
    {"beta": 0.0, "normalize_advantages": True},
    {"beta": 0.05},
    {"beta": 0.5, "normalize_advantages": True},
]
"""The stage's options, which are called the same in TRL."""


def main() -> None:
    """Compare, print a table, and end with an error if anything differs."""
    if answered(trl_side):
        return
    data = numbers()
    theirs = ask(__file__, {"data": data, "cases": CASES})
    print(f"{'options':50} {'loss':>12} {'difference':>11} {'of gradients':>13} {'of advantages':>14} {'clipped':>8}")
    worst = 0.0
    for options, answer in zip(CASES, theirs, strict=True):
        ours = llmtk_side(data, options)
        apart = [difference(ours[key], answer[key]) for key in ("loss", "gradient", "advantages", "clipped")]
        print("{:50} {:12.6f} {:11.1e} {:13.1e} {:14.1e} {:8.1e}".format(json.dumps(options), ours["loss"], *apart))
        worst = max(worst, *apart)
    if not worst <= TOLERANCE:
        sys.exit(f"llmtk and TRL differ by {worst:.1e}, more than {TOLERANCE}")
    print(f"llmtk and TRL agree to {worst:.1e}")


def llmtk_side(data: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return what the stage makes of the log-probs and rewards."""
    import torch
    from llmtk_stage_rloo import ReinforceLeaveOneOut as Rloo

    from llmtk.scoring import Scores

    settings = {"rewards": "exact_match", "num_iterations": 2, "max_completion_length": ROOM, **options}
    stage = Rloo(Rloo.Options(**settings))

    def flat(key: str) -> torch.Tensor:
        return torch.tensor([value for row in data[key] for value in row])

    policy = flat("policy").requires_grad_()
    run: Any = SimpleNamespace(
        sum_over_ranks=lambda values: values,
        score=lambda batch, also, temperature: Scores(batch, policy, entropy=ENTROPY * policy),
    )
    columns = {"old_logps": flat("old"), "reference_logps": flat("reference")}
    batch = stage.with_advantages(run, window(data, stage).with_columns(per_target=columns), {})
    output = stage.compute_loss(run, batch)
    (term,) = output.terms.values()
    loss = term.sum / batch.weights[term.per].sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    clipped = output.metrics["clip_ratio/region_mean"]
    return {
        "loss": loss.item(),
        "gradient": gradient.tolist(),
        "advantages": batch.per_sequence["advantages"].tolist(),
        "clipped": float(clipped.sum) / float(clipped.count),
    }


def trl_side(question: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what TRL makes of them."""
    return [trl_loss(question["data"], options) for options in question["cases"]]


def trl_loss(data: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return TRL's loss of one micro-batch, by a model that answers with the given log-probs."""
    import torch
    from trl import RLOOTrainer

    def padded(key: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in data[key]], batch_first=True)

    lengths = torch.tensor([len(row) for row in data["policy"]])
    policy = padded("policy").requires_grad_()
    mask = (torch.arange(policy.shape[1]) < lengths[:, None]).long()
    old, reference = padded("old") * mask, padded("reference") * mask
    rewards = torch.tensor(data["rewards"]) - options["beta"] * (old - reference).sum(-1)
    advantages = trl_advantages(rewards, options.get("normalize_advantages", False))
    ids = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_logps": old.sum(-1),
    }
    metrics: Any = {"train": defaultdict(list)}
    trainer = stand_in(metrics, lambda: (policy, ENTROPY * policy, None), {"epsilon": options.get("epsilon", 0.2)})
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, policy)
    return {
        "loss": loss.item(),
        "gradient": gradient[mask.bool()].tolist(),
        "advantages": advantages.tolist(),
        "clipped": metrics["train"]["clip_ratio/region_mean"][0],
    }


def trl_advantages(rewards: Any, normalized: bool) -> Any:
    """Return rewards less the mean of the group's others, as its trainer reckons."""
    from trl.trainer.utils import nanstd

    groups = rewards.view(-1, SIZE)
    others = (groups.sum(1, keepdim=True) - groups) / (SIZE - 1)
    advantages = (groups - others).flatten()
    return (advantages - advantages.mean()) / (nanstd(advantages) + 1e-4) if normalized else advantages


if __name__ == "__main__":
    main()
