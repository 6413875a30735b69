"""The losses and advantages of grpo beside those of TRL 1.16.0, on the same log-probs of tokens and the same rewards.

    python tests/parity/grpo.py

The stage makes its loss as in a run, only that the log-probs are given; TRL's own `_compute_loss` makes its, in the
environment that the benchmarks use (.venv-trl, made on the first call; without it the comparison is skipped). Compared,
to 1e-6: the loss of a window, its gradient by the log-prob of each token, and what both report of it.

Where llmtk differs by choice, which is shown at the end:
- `bnpo` divides by the window's tokens, TRL's by those of a micro-batch, whose losses it averages. With one
  micro-batch they are one, as is the entropy bonus, a mean over tokens too.
- Completions that were cut off and are masked leave the denominators; in TRL's of grpo, sapo, luspo and dr_grpo they
  count as completions without a loss.
- `kl_correction` multiplies a token's KL by the token's ratio, whatever the loss; TRL's use_bias_correction_kl by the
  completion's, where ratios are those of completions. So it is compared for token ratios alone.
- The `kl` that is reported is that of k3, never multiplied by a ratio; where ratios are those of completions, clipped
  ones are counted by their tokens, not by completions: neither is compared there.
- `cispo` caps ratios at 5 unless told otherwise, TRL's at 1 + epsilon's default, 0.2: compared at 5.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from peer import answered, ask, difference

GROUPS, SIZE, ROOM = 8, 4, 12
TOLERANCE = 1e-6
"""Of a number's size, or of 1 where that is smaller; float32 on both sides."""
ENTROPY = -1.5
"""A token's entropy here is this times its log-prob, so that the bonus has a gradient."""

Case = tuple[dict[str, Any], dict[str, Any]]
"""The stage's options; TRL's settings."""

LOSSES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
}
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo")


def cases() -> list[Case]:
    """Return what is compared."""
    found: list[Case] = []
    for loss, theirs in LOSSES.items():
        found += [({"loss": loss}, theirs), ({"loss": loss, "beta": 0.2}, theirs | {"beta": 0.2})]
        found.append(({"loss": loss, "entropy_coef": 0.01}, theirs | {"entropy_coef": 0.01}))
        if "importance_sampling_level" not in theirs:
            corrected = {"beta": 0.2, "use_bias_correction_kl": True}
            found.append(({"loss": loss, "beta": 0.2, "kl_correction": True}, theirs | corrected))
        if loss in CLIPPED:
            limits = {"epsilon": 0.1, "epsilon_high": 0.28, "delta": 1.5}
            found.append(({"loss": loss, **limits}, theirs | limits))
    temperatures = {"sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0}
    return [*found, ({"loss": "sapo", **temperatures}, LOSSES["sapo"] | temperatures)]


def main() -> None:
    """Compare, print a table, and end with an error if anything differs."""
    if answered(trl_side):
        return
    data, wanted = numbers(), cases()
    question = {"data": data, "cases": [theirs for _, theirs in wanted]}
    answers = ask(__file__, question)

    print(f"{'options':84} {'loss':>12} {'difference':>11} {'of gradients':>13} {'of metrics':>11}")
    worst = 0.0
    for (options, _), theirs in zip(wanted, answers["cases"], strict=True):
        ours = llmtk_side(data, options)
        apart = [difference(ours[key], theirs[key]) for key in ("loss", "gradient", "metrics")]
        print(f"{json.dumps(options):84} {ours['loss']:12.6f} {apart[0]:11.1e} {apart[1]:13.1e} {apart[2]:11.1e}")
        worst = max(worst, *apart)
    for scale, theirs in answers["advantages"].items():
        apart_by_scale = difference(advantages(data, scale), theirs)
        print(f"{'advantages, scale_rewards: ' + scale:84} {'':12} {apart_by_scale:11.1e}")
        worst = max(worst, apart_by_scale)
    worst = max(worst, by_choice(data, answers))
    if not worst <= TOLERANCE:
        sys.exit(f"llmtk and TRL differ by {worst:.1e}, more than {TOLERANCE}")
    print(f"llmtk and TRL agree to {worst:.1e}")


def numbers() -> dict[str, Any]:
    """Return log-probs of completions' tokens by the policy, the policy that wrote them and the reference, and rewards.

    They are multiples of 1/1024, of which float32 holds every sum exactly: what differs, differs in the losses. The
    rewards of one group are all equal, and so are those of another but for one.
    """
    from random import Random

    random = Random(0)
    lengths = [random.randint(1, ROOM) for _ in range(GROUPS * SIZE)]

    def moved(rows: list[list[float]], by: int) -> list[list[float]]:
        return [[min(-1 / 1024, value + random.randint(-by, by) / 1024) for value in row] for row in rows]

    policy = [[random.randint(-4096, -64) / 1024 for _ in range(length)] for length in lengths]
    rewards = [random.choice([0.0, 0.1, 0.3, 1.0, -0.5]) for _ in lengths]
    rewards[:SIZE] = [0.1 * 3] * SIZE
    rewards[SIZE : 2 * SIZE] = [1.0] + [0.0] * (SIZE - 1)
    return {"policy": policy, "old": moved(policy, 500), "reference": moved(policy, 900), "rewards": rewards}


def by_choice(data: dict[str, Any], answers: dict[str, Any]) -> float:
    """Show what is different by choice, each as the arithmetic that explains it. Return how far that is off."""
    halves = [len(data["policy"]) // 2, len(data["policy"])]
    tokens = [sum(map(len, data["policy"][: halves[0]])), sum(map(len, data["policy"][halves[0] :]))]
    ours = llmtk_side(data, {"loss": "bnpo"})["loss"]
    first, second = answers["halves"]
    weighed = (tokens[0] * first + tokens[1] * second) / sum(tokens)
    print(f"bnpo in two micro-batches: llmtk {ours:.6f}, as in one; TRL {(first + second) / 2:.6f}, the mean of both")
    worst = difference(ours, weighed)

    count, masked = len(data["policy"]), 3
    for loss, theirs in answers["masked"].items():
        ours = llmtk_side(data | {"masked": masked}, {"loss": loss, "mask_truncated_completions": True})["loss"]
        told = f"{loss} with {masked} of {count} completions masked: llmtk {ours:.6f}, TRL {theirs:.6f}"
        shared = loss in ("dapo", "bnpo", "cispo")
        print(told + (", no difference" if shared else f", {count - masked}/{count} of it"))
        worst = max(worst, difference(ours if shared else ours * (count - masked) / count, theirs))
    return worst


# llmtk's side


def stage_of(options: dict[str, Any]) -> Any:
    """Return the stage with these options."""
    from llmtk_stage_grpo import GroupRelativePolicyOptimization as Grpo

    settings = {"rewards": "exact_match", "num_iterations": 2, "max_completion_length": ROOM, **options}
    return Grpo(Grpo.Options(**settings))


def window(data: dict[str, Any], stage: Any) -> Any:
    """Return a stage's window of all completions, laid out as of rows that bring theirs."""
    import torch
    from llmtk_rl.rollouts import Rollout, batch_of

    from llmtk import Completion
    from llmtk.generation import Segment

    rollouts = []
    for start in range(0, GROUPS * SIZE, SIZE):
        mine = range(start, start + SIZE)
        ended = ["length" if index < data.get("masked", 0) else "stop" for index in mine]
        written = [
            Completion((Segment([2] * len(data["old"][i]), data["old"][i]),), stopped)
            for i, stopped in zip(mine, ended, strict=True)
        ]
        reward = torch.tensor([data["rewards"][i] for i in mine], dtype=torch.float64)
        row = {"prompt_ids": [1], "place": f"row {start}"}
        rollouts.append(Rollout(str(start), row, written, [""] * SIZE, reward[:, None], reward))
    return batch_of(rollouts, stage.options)


def advantages(data: dict[str, Any], scale: str) -> list[float]:
    """Return the advantages (completions,) that the stage makes of the rewards."""
    run: Any = SimpleNamespace(sum_over_ranks=lambda values: values)
    stage = stage_of({"scale_rewards": scale})
    return list(stage.with_advantages(run, window(data, stage), {}).per_sequence["advantages"].tolist())


def llmtk_side(data: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the loss that the stage makes of the log-probs, its gradient by each token's, and the metrics."""
    import torch

    from llmtk.scoring import Scores

    stage = stage_of(options)
    run: Any = SimpleNamespace(sum_over_ranks=lambda values: values)
    batch = stage.with_advantages(run, window(data, stage), {})
    counts = [index >= data.get("masked", 0) for index in range(len(data["policy"]))]

    def flat(key: str) -> torch.Tensor:
        rows = zip(data[key], counts, strict=True)
        return torch.tensor([value for row, counted in rows if counted for value in row])

    batch = batch.with_columns(per_target={"old_logps": flat("old"), "reference_logps": flat("reference")})
    policy = flat("policy").requires_grad_()
    run.score = lambda batch, also, temperature: Scores(batch, policy, entropy=ENTROPY * policy)
    output = stage.compute_loss(run, batch)
    parts = [term.coefficient * term.sum / batch.weights[term.per].sum() for term in output.terms.values()]
    loss = torch.stack(parts).sum()
    (gradient,) = torch.autograd.grad(loss, policy)
    metrics = {name: float(mean.sum) / float(mean.count) for name, mean in output.metrics.items()}
    return {"loss": loss.item(), "gradient": gradient.tolist(), "metrics": comparable(metrics, options)}


def comparable(metrics: dict[str, float], options: dict[str, Any]) -> dict[str, float]:
    """Return what is called the same and means the same, by TRL's names."""
    different = [name for name in metrics if name.startswith("sampling/")]
    if options.get("kl_correction"):
        different.append("kl")
    if options.get("loss") in ("gspo", "luspo"):
        different += [name for name in metrics if name.startswith("clip_ratio/")]
    renamed = {"clip_ratio/high_mean": "cispo_clip_ratio"} if options.get("loss") == "cispo" else {}
    return {renamed.get(name, name): value for name, value in metrics.items() if name not in different}


# TRL's side: this file again, in its environment


def trl_side(question: dict[str, Any]) -> dict[str, Any]:
    """Return the losses, gradients and metrics of TRL's method, and its advantages."""
    data = question["data"]
    half = len(data["policy"]) // 2
    scaled = trl_advantages(data["rewards"])
    parts = [{name: rows[mine] for name, rows in data.items()} for mine in (slice(half), slice(half, None))]
    split = [scaled["group"][:half], scaled["group"][half:]]
    pairs = zip(parts, split, strict=True)
    return {
        "cases": [trl_loss(data, scaled["group"], settings) for settings in question["cases"]],
        "advantages": scaled,
        "halves": [trl_loss(part, mine, LOSSES["bnpo"])["loss"] for part, mine in pairs],
        "masked": {name: trl_loss(data, scaled["group"], LOSSES[name], masked=3)["loss"] for name in LOSSES},
    }


def trl_advantages(rewards: list[float]) -> dict[str, list[float]]:
    """Return rewards less their group's mean, over TRL's standard deviations, as its trainer divides."""
    import torch
    from trl.trainer.utils import nanstd

    values = torch.tensor(rewards)
    groups = values.view(-1, SIZE)
    centred = (groups - groups.nanmean(1, keepdim=True)).flatten()
    of_group = nanstd(groups, dim=1).repeat_interleave(SIZE)
    return {
        "group": (centred / (of_group + 1e-4)).tolist(),
        "batch": (centred / (nanstd(values) + 1e-4)).tolist(),
        "none": centred.tolist(),
    }


def trl_loss(
    data: dict[str, Any], advantages: list[float], settings: dict[str, Any], masked: int = 0
) -> dict[str, Any]:
    """Return TRL's loss of one micro-batch, by a model that answers with the given log-probs."""
    import torch
    from trl import GRPOTrainer

    def padded(key: str) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in data[key]], batch_first=True)

    lengths = torch.tensor([len(row) for row in data["policy"]])
    lengths[:masked] = 0
    policy = padded("policy").requires_grad_()
    mask = (torch.arange(policy.shape[1]) < lengths[:, None]).long()
    ids = torch.ones_like(mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor(advantages),
        "old_per_token_logps": padded("old"),
        "ref_per_token_logps": padded("reference"),
        "num_items_in_batch": mask.sum(),
    }
    metrics: Any = {"train": defaultdict(list)}
    trainer = stand_in(metrics, lambda: (policy, ENTROPY * policy, None), settings)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    (gradient,) = torch.autograd.grad(loss, policy)
    flat = [value for row, length in zip(gradient, lengths.tolist(), strict=True) for value in row[:length].tolist()]
    told = {name: values[0] for name, values in metrics["train"].items()}
    return {"loss": loss.item(), "gradient": flat, "metrics": told}


def stand_in(metrics: Any, scores: Any, settings: dict[str, Any]) -> Any:
    """Return what stands in for a trainer: its settings, one process, and one micro-batch to a step."""
    defaults: dict[str, Any] = {"epsilon": 0.2, "beta": 0.0, "delta": None, "use_bias_correction_kl": False}
    defaults |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05, "importance_sampling_level": "token"}
    s = defaults | settings
    accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda value: value, reduce=lambda value, reduction: value
    )
    return SimpleNamespace(
        accelerator=accelerator,
        args=SimpleNamespace(**s, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        _metrics=metrics,
        _get_per_token_logps_and_entropies=lambda *_, **__: scores(),
        loss_type=s.get("loss_type"),
        importance_sampling_level=s["importance_sampling_level"],
        beta=s["beta"],
        epsilon_low=s["epsilon"],
        epsilon_high=s.get("epsilon_high", s["epsilon"]),
        entropy_coef=s.get("entropy_coef", 0.0),
        _entropy_bonus_enabled="entropy_coef" in s,
        use_adaptive_entropy=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=ROOM,
    )


if __name__ == "__main__":
    main()
