"""The loss against sums by hand in float64, what policies converge to against theory, and the stage on a real model."""

from __future__ import annotations

import json
import math
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmtk_stage_rloo import ReinforceLeaveOneOut as Rloo
from torch import Tensor

import llmtk
from llmtk import Batch, ConfigurationError, Group, Run, Sequence
from llmtk.scoring import Scores
from llmtk.training.tally import objective

LENGTHS = [[3, 1], [5, 0, 2]]
"""Target tokens of the answers to two prompts; the one without any is masked."""
ANSWERS = [length for group in LENGTHS for length in group]
REWARDS = [1.0, -0.5, 0.3, 2.0, 0.9]
EPS, BETA = 0.2, 0.3


def numbers(spread: float, seed: int) -> Tensor:
    return spread * torch.randn(sum(ANSWERS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGPS = -1 - numbers(0.5, 0).abs()
OLD, REFERENCE = LOGPS + numbers(0.4, 1), LOGPS + numbers(0.5, 2)


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def of_stage(options: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return the loss of a window, its gradient (targets,) by each token's log-prob, and the metrics."""
    stage = Rloo(Rloo.Options(rewards="exact_match", num_iterations=2, **options))
    groups = [
        Group(
            [Sequence([7] * (n or 2), [n > 0] * (n or 2), 0) for n in lengths],
            {"sequences": sum(n > 0 for n in lengths), "tokens": sum(lengths)},
            [[1, 2]],
        )
        for lengths in LENGTHS
    ]
    columns = {"old_logps": OLD, "reference_logps": REFERENCE, "sampled_logps": OLD}
    rewards = {"rewards": torch.tensor(REWARDS, dtype=torch.float64)}
    logps = LOGPS.clone().requires_grad_()
    run: Any = SimpleNamespace(
        score=lambda batch, also, temperature: Scores(batch, logps, entropy=-logps),
        sum_over_ranks=lambda values: values,
    )
    metrics: dict[str, Any] = {}
    window = stage.with_advantages(
        run, Batch.collate(groups).with_columns(per_target=columns, per_sequence=rewards), metrics
    )
    output = stage.compute_loss(run, window)
    loss = objective(output.terms, {name: float(w.sum()) for name, w in window.weights.items()}, 1)
    (found,) = torch.autograd.grad(loss, logps)
    told = {name: float(mean.sum) / float(mean.count) for name, mean in (metrics | output.metrics).items()}
    return loss.detach(), found, told


def by_hand(o: dict[str, Any]) -> tuple[Tensor, Tensor]:
    logps = LOGPS.clone().requires_grad_()
    ends = torch.tensor(ANSWERS).cumsum(0).tolist()
    spans = [slice(end - length, end) for end, length in zip(ends, ANSWERS, strict=True)]
    beta, in_reward = o.get("beta", 0.05), o.get("kl_in", "reward") == "reward"
    rewards = [
        r - (beta * float((OLD[span] - REFERENCE[span]).sum()) if in_reward else 0)
        for r, span in zip(REWARDS, spans, strict=True)
    ]
    advantages = []
    for group in ([0, 1], [2, 3, 4]):
        for i in group:
            others = [rewards[j] for j in group if j != i]
            advantages.append(rewards[i] - sum(others) / len(others))
    if o.get("normalize_advantages"):
        mean, std = statistics.mean(advantages), statistics.stdev(advantages)
        advantages = [(a - mean) / (std + 1e-4) for a in advantages]
    losses = []
    for a, span in zip(advantages, spans, strict=True):
        if span.start == span.stop:
            continue
        ratio = (logps[span].sum() - OLD[span].sum()).exp()
        loss = -a * (min(ratio, 1 + EPS) if a > 0 else max(ratio, 1 - EPS))
        if beta and not in_reward:
            for t in range(span.start, span.stop):
                apart = REFERENCE[t] - logps[t]
                loss = loss + beta * (logps[t] - OLD[t]).exp() * (apart.exp() - apart - 1)
        losses.append(loss)
    loss = sum(losses) / len(losses)
    assert isinstance(loss, Tensor)
    (found,) = torch.autograd.grad(loss, logps)
    return loss.detach(), found


CASES = [
    {"beta": 0.0},
    {"beta": BETA},
    {"beta": BETA, "kl_in": "loss"},
    {"beta": 0.0, "normalize_advantages": True},
    {"beta": BETA, "normalize_advantages": True},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_loss_is_its_formula_summed_by_hand(options: dict[str, Any]) -> None:
    loss, found, metrics = of_stage(options)
    wanted, by_token = by_hand(options)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    torch.testing.assert_close(found, by_token, rtol=1e-11, atol=1e-14)
    if options["beta"]:
        policy = OLD if options.get("kl_in") != "loss" else LOGPS
        assert metrics["kl"] == pytest.approx(float(((REFERENCE - policy).exp() - (REFERENCE - policy) - 1).mean()))


def test_every_option_changes_the_loss_here_and_a_limit_is_met() -> None:
    assert len({round(float(of_stage(options)[0]), 9) for options in CASES}) == len(CASES)
    assert 0 < of_stage(CASES[0])[2]["clip_ratio/region_mean"] < 1


PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_a_policy_converges_to_what_maximises_the_reward_less_the_kl(table: Any, kl_in: str) -> None:
    """pi proportional to pi_ref exp(r / beta), wherever the KL stands: total variation under 0.02."""
    settings = {"beta": 0.5, "kl_in": kl_in, "num_generations": 400, "max_completion_length": 1}
    run = table(Rloo(Rloo.Options(rewards="exact_match", **settings)), PRIOR.log(), REWARD)
    wanted = (PRIOR.log() + REWARD / 0.5).softmax(0)
    found = run.train(steps=60, learning_rate=1.0)
    assert float((found - wanted).abs().sum()) / 2 < 0.02


def test_in_the_first_pass_the_gradient_is_reinforces_with_the_others_as_baseline(make: Any) -> None:
    """1/N sum_i A_i grad log pi(y_i | x_i), by transformers alone in float64; the policy is its reference yet."""
    run = make("rloo", {"beta": 0.1})
    run.save(run.output_dir.with_name("start"))
    run.folder.path.mkdir()
    (window,) = run.hooks.prepare_batch([run.train_rows[index] for index in range(4)]).windows
    output = run.hooks.compute_loss(window)
    objective(output.terms, {name: float(w.sum()) for name, w in window.weights.items()}, 1).backward()
    assert float(output.metrics["clip_ratio/region_mean"].sum) == 0

    plain: Any = llmtk.load(str(run.output_dir.with_name("start")))[0].double().eval()
    rewards = window.per_sequence["rewards"].double().view(4, 4)
    advantages = rewards - (rewards.sum(1, keepdim=True) - rewards) / 3
    assert float(advantages.abs().max()) > 0.1
    total = torch.zeros((), dtype=torch.float64)
    tokens = window.target_tokens.split(window.target_counts.tolist())
    for index, (answer, a) in enumerate(zip(tokens, advantages.flatten(), strict=True)):
        prompt = torch.tensor(run.train_rows[index // 4]["prompt_ids"])
        logits = plain(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        total = total - a * logits.log_softmax(-1).gather(1, answer[:, None]).sum()
    (total / len(tokens)).backward()
    found, wanted = gradient(run.model), gradient(plain)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


@pytest.mark.parametrize("options", [{"kl_in": "loss"}, {"normalize_advantages": True}], ids=str)
def test_a_round_trains_the_same_however_it_is_cut(make: Any, options: dict[str, Any]) -> None:
    cuts = {
        "8x1": {"per_device_train_batch_size": 8},
        "2x4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "tokens": {"per_device_train_batch_size": 8, "micro_batch_tokens": 60},
    }
    options = {"num_iterations": 2, "mini_batches": 2, "mask_truncated_completions": True, **options}
    found = {}
    for name, cut in cuts.items():
        run = make("rloo", options, folder=name, max_steps=4, optim="sgd", learning_rate=0.05, **cut)
        run.train()
        found[name] = torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])
    assert all((other - found["8x1"]).norm() < 1e-6 * found["8x1"].norm() for other in found.values())


def test_metrics_of_a_run_with_the_kl_in_the_reward(make: Any) -> None:
    run = make("rloo", max_steps=3)
    run.train()
    first = lines(run)[0]
    assert first["kl"] == pytest.approx(0, abs=1e-9)
    assert lines(run)[2]["kl"] > 0
    assert math.isfinite(first["sampling/logp_difference_max"])
    assert first["reward"] > 0


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"beta": 0.0, "kl_in": "loss"}, r"rloo\.kl_in: there is no KL with rloo\.beta 0"),
        ({"num_generations": 1}, r"rloo\.num_generations: 1 leaves no other answer"),
        ({"epsilon": 1.0}, r"rloo\.epsilon"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(make: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make("rloo", options).train()
