"""Each loss against sums written out token by token in float64, and what policies converge to against theory."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmtk_grpo_losses import PER
from llmtk_stage_grpo import GroupRelativePolicyOptimization as Grpo
from torch import Tensor

from llmtk import Batch, Group, Sequence
from llmtk.scoring import Scores

LENGTHS = [[3, 1], [5, 0, 2], [4, 4]]
"""Target tokens of the answers to three prompts. The one without any was cut off, and is masked."""
ANSWERS = [length for group in LENGTHS for length in group]
ADVANTAGES = [1.0, -1.0, 0.7, 0.2, -0.9, 0.0, 1.6]
ROOM = 8
EPS, HIGH, DELTA = 0.2, 0.28, 1.5


def numbers(spread: float, seed: int) -> Tensor:
    """(targets,): one number for each token."""
    return spread * torch.randn(sum(ANSWERS), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


LOGPS = -1 - numbers(0.5, 0).abs()
OLD, REFERENCE, ENTROPY = LOGPS + numbers(0.35, 1), LOGPS + numbers(0.5, 2), numbers(1.0, 3).abs()


def batch(old: Tensor | None) -> Batch:
    """The answers as a window, its columns as prepare_batch makes them."""
    groups = []
    for index, lengths in enumerate(LENGTHS):
        answers = [Sequence([7] * (n or 2), [n > 0] * (n or 2), 0) for n in lengths]
        counted = sum(length > 0 for length in lengths)
        weights = {"sequences": counted, "tokens": sum(lengths), "room": counted * ROOM}
        groups.append(Group(answers, weights, [[1, 2]], place=f"row {index}"))
    columns = {"reference_logps": REFERENCE, "sampled_logps": OLD.float()} | ({} if old is None else {"old_logps": old})
    advantages = torch.tensor(ADVANTAGES, dtype=torch.float64)
    return Batch.collate(groups).with_columns(per_target=columns, per_sequence={"advantages": advantages})


def of_stage(options: dict[str, Any], old: Tensor | None = OLD) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Return the loss, its gradient (targets,) by each token's log-prob, and the metrics, as the loop makes them."""
    stage = Grpo(Grpo.Options(rewards="exact_match", num_iterations=2, **options))
    window = batch(old)
    logps = LOGPS.clone().requires_grad_()
    # The entropy's own gradient is scoring's; here it counts through its sum.
    entropy = ENTROPY + 0 * logps
    run: Any = SimpleNamespace(score=lambda batch, also, temperature: Scores(batch, logps, entropy=entropy))
    output = stage.compute_loss(run, window)
    terms = output.terms.values()
    loss = sum(term.coefficient * term.sum / window.weights[term.per].sum() for term in terms)
    (gradient,) = torch.autograd.grad(loss, logps)
    metrics = {name: float(mean.sum) / float(mean.count) for name, mean in output.metrics.items()}
    return loss.detach(), gradient, metrics


def by_hand(o: dict[str, Any], old: Tensor = OLD) -> tuple[Tensor, Tensor]:
    """The same, sentence by sentence from the papers."""
    logps = LOGPS.clone().requires_grad_()
    kind, low, delta = o["loss"], o.get("epsilon", EPS), o.get("delta", math.inf)
    high = o.get("epsilon_high", 5.0 if kind == "cispo" else low)
    per_answer, start = [], 0
    for length, a in zip(ANSWERS, ADVANTAGES, strict=True):
        mine = slice(start, start + length)
        start += length
        if length == 0:
            continue
        token_ratios = [(logps[t] - old[t]).exp() for t in range(mine.start, mine.stop)]
        whole = ((logps[mine] - old[mine]).sum() / length).exp()
        ratios = [whole] * length if kind in ("gspo", "luspo") else token_ratios
        losses = []
        for ratio, token_ratio, t in zip(ratios, token_ratios, range(mine.start, mine.stop), strict=True):
            if kind == "cispo":
                loss = -min(ratio.item(), high) * a * logps[t]
            elif kind == "sapo":
                tau = o.get("sapo_temperature_pos", 1.0) if a > 0 else o.get("sapo_temperature_neg", 1.05)
                loss = -a * 4 / tau / (1 + (-tau * (ratio - 1)).exp())
            elif a >= 0:  # never more than 1 + high is to be gained, and never more than delta
                limit = min(1 + high, delta)
                loss = -a * (ratio if ratio < limit else limit)
            else:  # never less than 1 - low is to be gained, and not more than delta to be lost
                limited = ratio if ratio < delta else torch.tensor(delta)
                loss = -a * (limited if limited > 1 - low else 1 - low)
            if beta := o.get("beta", 0.0):
                difference = REFERENCE[t] - logps[t]
                kl = difference.exp() - difference - 1
                loss = loss + beta * kl * (token_ratio if o.get("kl_correction") else 1)
            losses.append(loss)
        per_answer.append((sum(losses), length))
    counted = len(per_answer)
    loss = {
        "grpo": lambda: sum(total / length for total, length in per_answer) / counted,
        "luspo": lambda: sum(total for total, _ in per_answer) / counted,
        "dr_grpo": lambda: sum(total for total, _ in per_answer) / (counted * ROOM),
        "dapo": lambda: sum(total for total, _ in per_answer) / sum(length for _, length in per_answer),
    }[{"gspo": "grpo", "sapo": "grpo", "bnpo": "dapo", "cispo": "dapo"}.get(kind, kind)]()
    loss = loss - o.get("entropy_coef", 0.0) * float(ENTROPY.mean())
    (gradient,) = torch.autograd.grad(loss, logps)
    return loss.detach(), gradient


CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo")
CASES = [
    *({"loss": loss} for loss in PER),
    *({"loss": loss, "epsilon": 0.1, "epsilon_high": HIGH} for loss in CLIPPED),
    *({"loss": loss, "epsilon_high": HIGH, "delta": DELTA} for loss in CLIPPED),
    *({"loss": loss, "beta": 0.3} for loss in PER),
    *({"loss": loss, "beta": 0.3, "kl_correction": True} for loss in PER),
    *({"loss": loss, "entropy_coef": 0.05} for loss in PER),
    {"loss": "cispo", "epsilon_high": 1.1},
    {"loss": "sapo", "sapo_temperature_pos": 0.7, "sapo_temperature_neg": 2.0},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_loss_is_its_formula_summed_by_hand(options: dict[str, Any]) -> None:
    loss, gradient, _ = of_stage(options)
    wanted, by_token = by_hand(options)
    assert float(loss) == pytest.approx(float(wanted), rel=1e-12)
    torch.testing.assert_close(gradient, by_token, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("loss", PER)
def test_every_limit_and_every_option_changes_the_loss_here(loss: str) -> None:
    """Else equality would say nothing: ratios lie beyond all limits, on both sides and for both signs."""
    cases = [options for options in CASES if options["loss"] == loss]
    assert len({round(float(of_stage(options)[0]), 9) for options in cases}) == len(cases)


@pytest.mark.parametrize("loss", PER)
def test_in_the_first_pass_the_gradient_is_that_of_reinforce(loss: str) -> None:
    """Ratio 1: -A grad log pi of each token, weighed as the loss weighs tokens."""
    _, gradient, metrics = of_stage({"loss": loss}, old=None)
    tokens, answers = sum(ANSWERS), sum(length > 0 for length in ANSWERS)
    share = {
        **dict.fromkeys(("grpo", "sapo"), lambda length: 1 / length / answers),
        **dict.fromkeys(("bnpo", "dapo", "cispo"), lambda length: 1 / tokens),
        "dr_grpo": lambda length: 1 / (answers * ROOM),
        # One ratio for an answer: its gradient is the mean over the tokens, and luspo's loss has it once for each.
        "gspo": lambda length: 1 / length / answers,
        "luspo": lambda length: 1 / answers,
    }[loss]
    wanted = [-a * share(n) for a, n in zip(ADVANTAGES, ANSWERS, strict=True) for _ in range(n)]
    assert gradient.tolist() == pytest.approx(wanted, rel=1e-12)
    assert all(value == 0 for name, value in metrics.items() if name.startswith("clip_ratio"))


def test_metrics_count_the_tokens_whose_gradient_a_limit_takes_away() -> None:
    options = {"loss": "dapo", "epsilon": 0.1, "epsilon_high": HIGH}
    ratios = (LOGPS - OLD).exp().tolist()
    advantages = [a for a, n in zip(ADVANTAGES, ANSWERS, strict=True) for _ in range(n)]
    low = sum(r < 0.9 and a < 0 for r, a in zip(ratios, advantages, strict=True))
    high = sum(r > 1 + HIGH and a > 0 for r, a in zip(ratios, advantages, strict=True))
    assert low > 0
    assert high > 0
    _, gradient, metrics = of_stage(options)
    count = len(ratios)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(low / count)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(high / count)
    assert metrics["clip_ratio/region_mean"] == pytest.approx((low + high) / count)
    without = sum(g == 0 and a != 0 for g, a in zip(gradient.tolist(), advantages, strict=True))
    assert without == low + high


def test_the_kl_that_is_reported_is_the_mean_of_k3_without_a_ratio() -> None:
    wanted = float(((REFERENCE - LOGPS).exp() - (REFERENCE - LOGPS) - 1).mean())
    for corrected in (False, True):
        _, _, metrics = of_stage({"beta": 0.1, "kl_correction": corrected})
        assert metrics["kl"] == pytest.approx(wanted, rel=1e-12)
        assert metrics["entropy"] == pytest.approx(float(ENTROPY.mean()), rel=1e-12)


# A language of three tokens: what the policy converges to

PRIOR = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
REWARD = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
GROUP = 400


def tilted(beta: float) -> Tensor:
    """pi proportional to pi_ref exp(r / beta): what maximises E r - beta KL(pi || pi_ref)."""
    return (PRIOR.log() + REWARD / beta).softmax(0)


def mass_covering(beta: float) -> Tensor:
    """pi = beta pi_ref / (lambda - r): what maximises E r - beta KL(pi_ref || pi). Lambda by bisection."""
    low, high = float(REWARD.max()), float(REWARD.max()) + beta
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if float((beta * PRIOR / (middle - REWARD)).sum()) > 1 else (low, middle)
    return beta * PRIOR / (high - REWARD)


def self_scaled(beta: float) -> Tensor:
    """pi proportional to pi_ref exp(r / (beta s)), where s is the standard deviation of r under that pi."""
    spread = 0.4
    for _ in range(200):
        pi = tilted(beta * spread)
        spread = (spread + float((pi * (REWARD - (pi * REWARD).sum()).square()).sum().sqrt())) / 2
    return pi


THEORIES = {"the KL": tilted, "the KL the other way round": mass_covering, "a beta times the deviation": self_scaled}
CONVERGES = [
    ("the KL", 0.5, {"scale_rewards": "none", "kl_correction": True}),
    ("the KL the other way round", 0.5, {"scale_rewards": "none"}),
    ("a beta times the deviation", 2.0, {"scale_rewards": "group", "kl_correction": True}),
    ("a beta times the deviation", 0.5, {"scale_rewards": "group", "kl_correction": True}),
]


@pytest.mark.parametrize(("theory", "beta", "options"), CONVERGES)
def test_what_a_policy_converges_to(table: Any, theory: str, beta: float, options: dict[str, Any]) -> None:
    """Total variation under 0.02 from what one theory says, and far from what the others say."""
    settings = {"beta": beta, "num_generations": GROUP, "max_completion_length": 1, **options}
    run = table(Grpo(Grpo.Options(rewards="exact_match", **settings)), PRIOR.log(), REWARD)
    found = run.train(steps=60, learning_rate=1.5 if beta < 1 else 0.5)
    apart = {name: float((found - wanted(beta)).abs().sum()) / 2 for name, wanted in THEORIES.items()}
    assert apart.pop(theory) < 0.02
    assert all(distance > 0.05 for distance in apart.values())


def test_where_the_hold_is_weak_the_deviation_takes_it_away() -> None:
    """The surer the policy, the weaker the hold: of these rewards and beta 0.5, no answer but the best is left."""
    assert float(self_scaled(0.5)[2]) > 0.999
    assert float(self_scaled(2.0)[2]) < 0.5


def test_the_entropy_bonus_is_the_entropys(table: Any) -> None:
    """E r + c H is greatest where pi is proportional to exp(r / c)."""
    settings = {"entropy_coef": 0.5, "scale_rewards": "none", "num_generations": GROUP, "max_completion_length": 1}
    run = table(Grpo(Grpo.Options(rewards="exact_match", **settings)), PRIOR.log(), REWARD)
    found = run.train(steps=60, learning_rate=1.5)
    assert float((found - (REWARD / 0.5).softmax(0)).abs().sum()) / 2 < 0.02


def test_passes_and_limits_lead_to_the_same_policy(table: Any) -> None:
    """Three passes over each round, in small steps: ratios that are not 1, and a limit that is rarely met."""
    settings = {"beta": 0.5, "num_generations": GROUP, "max_completion_length": 1, "num_iterations": 3}
    options = Grpo.Options(rewards="exact_match", scale_rewards="none", kl_correction=True, **settings)
    found = table(Grpo(options), PRIOR.log(), REWARD).train(steps=60, learning_rate=0.5)
    assert float((found - tilted(0.5)).abs().sum()) / 2 < 0.02
