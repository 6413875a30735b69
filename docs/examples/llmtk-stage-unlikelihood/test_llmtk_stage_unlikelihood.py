"""The stage keeps the contract; and what is its own."""

from __future__ import annotations

from math import log
from types import SimpleNamespace

import pytest
import torch
from llmtk.testing import CHECKS, check_stage

from llmtk_stage_unlikelihood import Unlikelihood, log_one_minus_exp


@pytest.mark.parametrize("check", CHECKS)
def test_it_conforms(check: str) -> None:
    check_stage("unlikelihood", check)


def test_the_loss_is_that_of_the_paper() -> None:
    answer = {"prompt_ids": [1, 2], "completion_ids": [3, 4], "completion_targets": [True, True], "place": ""}
    stage = Unlikelihood(Unlikelihood.Options(alpha=0.5))
    batch = stage.prepare_batch(None, [answer | {"label": True}, answer | {"label": False}]).windows[0]
    scores = SimpleNamespace(logps=torch.tensor([0.5, 0.25, 0.5, 0.75]).log())
    terms = stage.compute_loss(SimpleNamespace(score=lambda batch: scores), batch).terms
    assert float(terms["likelihood"].sum) == pytest.approx(-log(0.5) - log(0.25))
    assert float(terms["unlikelihood"].sum) == pytest.approx(-log(0.5) - log(0.25))
    assert terms["unlikelihood"].coefficient == 0.5
    assert batch.weights["good_tokens"].tolist() == [2, 0]
    assert batch.weights["bad_tokens"].tolist() == [0, 2]


def test_a_certain_token_has_a_finite_loss() -> None:
    assert torch.isfinite(log_one_minus_exp(torch.tensor([0.0, -1e-9, -1e4]))).all()
