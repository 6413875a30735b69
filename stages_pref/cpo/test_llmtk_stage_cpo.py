"""The losses against closed forms in float64, at known points, and however a window is cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_stage_cpo import LOSSES
from llmtk_stage_cpo import ContrastivePreferenceOptimization as Cpo

from llmtk import ConfigurationError, Run


def by_hand(loss: str, chosen: torch.Tensor, rejected: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """Return the loss of one pair, from the log-probs of its answers' tokens."""
    if loss == "ipo":
        return (chosen.mean() - rejected.mean() - 0.5 / beta) ** 2
    right = 1 / (1 + (rejected.sum() / beta**-1 - chosen.sum() / beta**-1).exp())
    if loss == "hinge":
        return torch.clamp(1 - beta * chosen.sum() + beta * rejected.sum(), min=0)
    return -((1 - smoothing) * right.log() + smoothing * (1 - right).log())


@pytest.mark.parametrize(
    ("loss", "smoothing", "alpha"),
    [("sigmoid", 0.0, 1.0), ("sigmoid", 0.2, 0.0), ("hinge", 0.0, 0.5), ("ipo", 0.0, 1.0)],
)
def test_loss_and_gradient_have_their_closed_form(
    make: Any, window: Any, loss: str, smoothing: float, alpha: float
) -> None:
    options = {"loss": loss, "beta": 0.2, "cpo_alpha": alpha} | ({"label_smoothing": smoothing} if smoothing else {})
    at = window(make(Cpo, options))
    chosen, rejected = at.exact_answers("chosen"), at.exact_answers("rejected")
    pairs = [by_hand(loss, c, j, 0.2, smoothing) for c, j in zip(chosen, rejected, strict=True)]
    at.assert_is(torch.stack(pairs).mean() - alpha * torch.cat(chosen).mean())

    _, _, output = at.output()
    wanted = {loss: ("pairs", 1.0)} | ({"nll": ("chosen_tokens", alpha)} if alpha else {})
    assert {name: (term.per, term.coefficient) for name, term in output.terms.items()} == wanted


@pytest.mark.parametrize(("loss", "value"), [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_equal_log_probs_have_known_losses(loss: str, value: float) -> None:
    logps = torch.full((3,), -2.5, dtype=torch.float64)
    assert LOSSES[loss](logps, logps, 0.1, 0.0).tolist() == pytest.approx([value] * 3)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_exact_in_float64(loss: str) -> None:
    logps = torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[loss](x[0], x[1], 0.7, 0.1), logps)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_window_gives_the_same_however_it_is_cut(assert_same_however_cut: Any, loss: str) -> None:
    assert_same_however_cut(Cpo, {"loss": loss})


def test_it_learns_to_prefer(make: Any) -> None:
    run = make(Cpo, max_steps=60, learning_rate=1e-2)
    before = run.evaluate()
    after = run.train().metrics
    assert after["eval_rewards/accuracies"] == 1
    assert after["eval_rewards/margins"] > before["rewards/margins"]
    assert after["eval_logps/chosen"] > before["logps/chosen"]
    assert after["eval_loss/nll"] < before["loss/nll"]


@pytest.mark.parametrize("loss", ["hinge", "ipo"])
def test_label_smoothing_is_refused_where_it_is_not_used(make: Any, loss: str) -> None:
    run = make(Cpo, {"loss": loss, "label_smoothing": 0.1})
    with pytest.raises(ConfigurationError, match=f"cpo.label_smoothing: cpo.loss: {loss} .*; used by sigmoid"):
        run.train()


def test_a_reference_is_refused(make: Any) -> None:
    with pytest.raises(ConfigurationError, match="precompute_reference"):
        make(Cpo, precompute_reference=True)


@pytest.mark.slow
def test_the_demo_improves_and_unlearns_nothing(tmp_path: Path) -> None:
    figures = Run(Cpo, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"]
    assert figures["exact match_after"] >= figures["exact match_before"]
