"""The loss against closed forms in float64, at known points, on a tabular policy, and however a window is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_stage_ipo import IdentityPreferenceOptimization as Ipo
from llmtk_stage_ipo import ipo_loss

from llmtk import ConfigurationError, Run


@pytest.mark.parametrize("average", [True, False])
def test_loss_and_gradient_have_their_closed_form(make: Any, window: Any, average: bool) -> None:
    at = window(make(Ipo, {"beta": 0.3, "average_logps": average}))
    # The reference is the policy itself: another one in its place.
    reference = torch.randn(len(at.batch.target_tokens), generator=torch.Generator().manual_seed(0)) - 4
    at.batch = at.batch.with_columns(per_target={"reference_logps": reference})
    parts = iter(torch.split(reference.double(), at.batch.target_counts.tolist()))

    losses = []
    for chosen, rejected in zip(at.exact_answers("chosen"), at.exact_answers("rejected"), strict=True):
        r = [(logps - next(parts)).sum() / (len(logps) if average else 1) for logps in (chosen, rejected)]
        gap = r[0] - r[1]
        losses.append(gap**2 - gap / 0.3 + 1 / (4 * 0.3**2))
    at.assert_is(torch.stack(losses).mean())

    _, _, output = at.output()
    assert {name: (term.per, term.coefficient) for name, term in output.terms.items()} == {"loss": ("pairs", 1.0)}


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_an_untrained_policy_has_the_squared_gap_to_go_and_no_rewards(make: Any, beta: float) -> None:
    values = make(Ipo, {"beta": beta}).evaluate()
    assert values["loss"] == pytest.approx((1 / (2 * beta)) ** 2, rel=1e-6)
    zero = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
    assert all(values[name] == 0 for name in zero)


def test_the_gradient_is_exact_in_float64() -> None:
    ratios = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ipo_loss(x[0], x[1], 0.2), ratios)
    chosen, rejected = ratios.detach()
    (found,) = torch.autograd.grad(ipo_loss(ratios[0], ratios[1], 0.2).sum(), ratios)
    assert torch.allclose(found[0], 2 * (chosen - rejected) - 5)
    assert torch.equal(found[0], -found[1])


@pytest.mark.parametrize(("p", "beta"), [(0.5, 0.1), (0.8, 0.1), (0.8, 1.0), (1.0, 0.5)])
def test_a_tabular_policy_ends_at_the_gap_that_the_preference_asks_for(p: float, beta: float) -> None:
    """Two answers, of which the first is preferred with probability p: the gap is (2p - 1)/(2 beta)."""
    reference = torch.tensor([0.3, -1.1], dtype=torch.float64).log_softmax(0)
    logits = torch.tensor([0.3, -1.1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def closure() -> Any:
        optimizer.zero_grad()
        first, second = (logits.log_softmax(0) - reference)[:, None]
        loss = p * ipo_loss(first, second, beta) + (1 - p) * ipo_loss(second, first, beta)
        loss.sum().backward()
        return loss.sum()

    for _ in range(3):
        optimizer.step(closure)
    first, second = (logits.log_softmax(0) - reference).tolist()
    assert first - second == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-6)


def test_the_window_gives_the_same_however_it_is_cut(assert_same_however_cut: Any) -> None:
    assert_same_however_cut(Ipo, {"beta": 1.0})


def test_a_precomputed_reference_gives_the_same(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTK_CACHE", str(tmp_path / "cache"))
    found = []
    for precompute in (False, True):
        run = make(Ipo, folder=f"run{precompute}", max_steps=3, learning_rate=1e-2, precompute_reference=precompute)
        found.append(run.train().metrics)
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_it_learns_to_prefer(make: Any) -> None:
    result = make(Ipo, {"beta": 0.5}, max_steps=60, learning_rate=1e-2).train()
    assert result.metrics["eval_rewards/accuracies"] == 1
    assert result.metrics["eval_rewards/margins"] == pytest.approx(0.5, abs=0.1)
    assert result.metrics["eval_loss"] < 0.1


def test_options_that_mean_nothing_are_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="beta"):
        make(Ipo, {"beta": 0})
    with pytest.raises(ConfigurationError, match="label_smoothing"):
        make(Ipo, {"label_smoothing": 0.1})


@pytest.mark.slow
def test_the_demo_improves_and_unlearns_nothing(tmp_path: Path) -> None:
    figures = Run(Ipo, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"]
    assert figures["exact match_after"] >= figures["exact match_before"]
