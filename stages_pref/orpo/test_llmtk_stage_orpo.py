"""The loss against closed forms in float64, the odds near certainty, and however a window is cut."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from llmtk_stage_orpo import OddsRatioPreferenceOptimization as Orpo
from llmtk_stage_orpo import log1mexp, log_odds_ratio

from llmtk import Run


@pytest.mark.parametrize("nll_on", ["completion", "all"])
def test_loss_and_gradient_have_their_closed_form(make: Any, window: Any, nll_on: str) -> None:
    """With odds p/(1 - p), -log sigmoid(log(odds_c/odds_j)) is log(1 + odds_j/odds_c)."""
    at = window(make(Orpo, {"beta": 0.4, "nll_on": nll_on}))
    chosen, rejected = at.exact_logps("chosen"), at.exact_logps("rejected")
    pairs = []
    for (c, c_targets), (j, j_targets) in zip(chosen, rejected, strict=True):
        p, q = c[c_targets].mean().exp(), j[j_targets].mean().exp()
        pairs.append((1 + (q * (1 - p)) / (p * (1 - q))).log())
    tuned = torch.cat([logps if nll_on == "all" else logps[targets] for logps, targets in chosen])
    at.assert_is(0.4 * torch.stack(pairs).mean() - tuned.mean())

    _, _, output = at.output()
    wanted = {"nll": ("chosen_tokens", 1.0), "odds_ratio": ("pairs", 0.4)}
    assert {name: (term.per, term.coefficient) for name, term in output.terms.items()} == wanted
    assert float(at.batch.weights["chosen_tokens"].sum()) == len(tuned)
    ratio = output.metrics["log_odds_ratio"]
    assert float(ratio.sum / ratio.count) == pytest.approx(-float(torch.stack(pairs).mean().detach()), rel=1e-5)
    assert "log_odds_chosen" in output.metrics


def test_what_is_fine_tuned_on_leaves_the_odds_as_they_are(make: Any, window: Any) -> None:
    found = []
    for nll_on in ("completion", "all"):
        _, _, output = window(make(Orpo, {"nll_on": nll_on}, folder=nll_on)).output()
        odds = float(output.terms["odds_ratio"].sum.detach())
        found.append([odds, *(float(mean.sum) for mean in output.metrics.values())])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_log1mexp_is_exact_from_certainty_to_nothing() -> None:
    getcontext().prec = 60
    x = torch.cat([-(2.0 ** torch.arange(-45, 6.0)), torch.tensor([-0.6931, -0.6932, -math.log(2)])]).double()
    wanted = [float((1 - Decimal(value).exp()).ln()) for value in x.tolist()]
    assert log1mexp(x).tolist() == pytest.approx(wanted, rel=1e-14)
    single = slice(22, None)  # from 2^-23, the precision of float32
    assert log1mexp(x[single].float()).tolist() == pytest.approx(wanted[single], rel=1e-6)


@pytest.mark.parametrize("logp", [0.0, -1e-30, -1e-8, -1e-7, -0.6931, -0.6932, -20.0, -1000.0])
def test_gradients_stay_finite_at_any_log_prob(logp: float) -> None:
    logps = torch.tensor([[logp], [-2.0]], requires_grad=True)
    for pair in (logps, logps.flip(0)):
        loss = -F.logsigmoid(log_odds_ratio(*pair)).sum()
        (found,) = torch.autograd.grad(loss, logps)
        assert torch.isfinite(loss)
        assert found.isfinite().all()


def test_the_gradient_is_that_of_the_paper() -> None:
    """d/d log p of the log odds is 1/(1 - p); that of -log sigmoid, -odds_j/(odds_c + odds_j)."""
    logps = -torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3 - 0.01
    logps.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: F.logsigmoid(log_odds_ratio(x[0], x[1])), logps)
    (found,) = torch.autograd.grad(-F.logsigmoid(log_odds_ratio(logps[0], logps[1])).sum(), logps)
    p, q = logps.detach().exp()
    share = (q / (1 - q)) / (p / (1 - p) + q / (1 - q))
    assert torch.allclose(found[0], -share / (1 - p))
    assert torch.allclose(found[1], share / (1 - q))


def test_equal_log_probs_have_even_odds() -> None:
    logps = torch.tensor([-0.01, -1.0, -7.0], dtype=torch.float64)
    assert log_odds_ratio(logps, logps).tolist() == [0, 0, 0]
    assert (-F.logsigmoid(log_odds_ratio(logps, logps))).tolist() == pytest.approx([math.log(2)] * 3)


@pytest.mark.parametrize("nll_on", ["completion", "all"])
def test_the_window_gives_the_same_however_it_is_cut(assert_same_however_cut: Any, nll_on: str) -> None:
    assert_same_however_cut(Orpo, {"nll_on": nll_on})


@pytest.mark.parametrize("nll_on", ["completion", "all"])
def test_it_learns_to_prefer(make: Any, nll_on: str) -> None:
    run = make(Orpo, {"nll_on": nll_on}, max_steps=80, learning_rate=1e-2)
    before = run.evaluate()
    after = run.train().metrics
    assert after["eval_rewards/accuracies"] == 1
    assert after["eval_log_odds_chosen"] > max(1, before["log_odds_chosen"])
    assert after["eval_logps/chosen"] > before["logps/chosen"]


@pytest.mark.slow
def test_the_demo_improves_and_unlearns_nothing(tmp_path: Path) -> None:
    figures = Run(Orpo, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"]
    assert figures["exact match_after"] >= figures["exact match_before"]
