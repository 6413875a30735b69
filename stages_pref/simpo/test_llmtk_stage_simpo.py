"""The losses against closed forms in float64, at known points, and however a window is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_stage_simpo import LOSSES
from llmtk_stage_simpo import SimplePreferenceOptimization as Simpo

from llmtk import ConfigurationError, Run


@pytest.mark.parametrize(("loss", "smoothing", "alpha"), [("sigmoid", 0, 0), ("sigmoid", 0.2, 0.3), ("hinge", 0, 0)])
def test_loss_and_gradient_have_their_closed_form(
    make: Any, window: Any, loss: str, smoothing: float, alpha: float
) -> None:
    """The margin is written as the authors' code does: beta (a_c - a_j - gamma/beta)."""
    options = {"loss": loss, "nll_alpha": alpha} | ({"label_smoothing": smoothing} if smoothing else {})
    at = window(make(Simpo, {"beta": 2.5, "gamma": 1.4, **options}))
    chosen, rejected = at.exact_answers("chosen"), at.exact_answers("rejected")
    pairs = []
    for c, j in zip(chosen, rejected, strict=True):
        margin = 2.5 * (c.mean() - j.mean() - 1.4 / 2.5)
        right = 1 / (1 + (-margin).exp())
        logistic = -((1 - smoothing) * right.log() + smoothing * (1 - right).log())
        pairs.append(torch.clamp(1 - margin, min=0) if loss == "hinge" else logistic)
    at.assert_is(torch.stack(pairs).mean() - alpha * torch.cat(chosen).mean())

    _, _, output = at.output()
    wanted = {loss: ("pairs", 1.0)} | ({"nll": ("chosen_tokens", alpha)} if alpha else {})
    assert {name: (term.per, term.coefficient) for name, term in output.terms.items()} == wanted


@pytest.mark.parametrize(("loss", "value"), [("sigmoid", math.log1p(math.exp(1.4))), ("hinge", 2.4)])
def test_equal_log_probs_have_known_losses(loss: str, value: float) -> None:
    equal = torch.zeros(3, dtype=torch.float64)
    assert LOSSES[loss](2.0 * equal - 1.4, 0.0).tolist() == pytest.approx([value] * 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_exact_in_float64(loss: str) -> None:
    margins = torch.tensor([-3.0, -0.4, 0.2, 2.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: LOSSES[loss](z, 0.1), margins)


def test_rewards_are_beta_times_the_mean_log_prob(make: Any, window: Any) -> None:
    at = window(make(Simpo))
    _, _, output = at.output()
    mean = sum(float(logps.detach().mean()) for logps in at.exact_answers("chosen"))
    assert float(output.metrics["logps/chosen"].sum) == pytest.approx(mean, rel=1e-5)
    assert float(output.metrics["rewards/chosen"].sum) == pytest.approx(2 * mean, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"loss": "hinge"}, {"nll_alpha": 0.5}])
def test_the_window_gives_the_same_however_it_is_cut(assert_same_however_cut: Any, options: dict[str, Any]) -> None:
    assert_same_however_cut(Simpo, options)


def test_it_learns_to_prefer(make: Any) -> None:
    after = make(Simpo, max_steps=60, learning_rate=1e-2).train().metrics
    assert after["eval_rewards/accuracies"] == 1
    assert after["eval_rewards/margins"] > 1


def test_label_smoothing_is_refused_where_it_is_not_used(make: Any) -> None:
    run = make(Simpo, {"loss": "hinge", "label_smoothing": 0.1})
    with pytest.raises(ConfigurationError, match=r"simpo.label_smoothing: simpo.loss: hinge .*; used by sigmoid"):
        run.train()


@pytest.mark.slow
def test_the_demo_improves_and_unlearns_nothing(tmp_path: Path) -> None:
    figures = Run(Simpo, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"]
    assert figures["exact match_after"] >= figures["exact match_before"]
