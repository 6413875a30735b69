"""Learning rates, step by step, against transformers' schedules; through runs that are stopped half-way."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from llmtk import ConfigurationError, LossOutput, Models, Round, Term, hookimpl
from llmtk.run import Interrupted

from .kit import Lm, group_of, make, series

STEPS = 6
KWARGS = {
    "cosine_with_min_lr": {"min_lr": 2e-3},
    "cosine_warmup_with_min_lr": {"min_lr": 2e-3, "warmup_lr_rate": 0.1},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0, "lr_end": 1e-4},
    "inverse_sqrt": {"timescale": 3},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
    "greedy": {"patience": 0, "factor": 0.5},
}
WAITING = ("reduce_lr_on_plateau", "greedy")
UNWARMED = ("constant", *WAITING)
EVALUATIONS = [3.0, 4.0, 2.0, 5.0, 1.0, 0.5]


class Scalar(Lm):
    """As small as a run can be: one number is trained, and evaluations come from a list."""

    def build_models(self, run):
        return Models(torch.nn.Linear(1, 1))

    def prepare_batch(self, run, rows):
        return Round.of([group_of(row) for row in rows])

    def compute_loss(self, run, batch):
        count = len(batch.target_tokens)
        if not run.model.training:
            return LossOutput({"loss": Term(torch.tensor(EVALUATIONS[run.step - 1] * count), "tokens")})
        return LossOutput({"loss": Term(run.model.weight.sum() * count, "tokens")})

    def export_model(self, run, path):
        """Write nothing."""


class Stop:
    name = "stop"

    @hookimpl
    def step_finished(self, run, step):
        if step.step == 3:
            run.ask_to_stop(15)


def scalar(path, kind="linear", **settings):
    more = {"eval": [{"text": "ab"}], "eval_strategy": "steps", "eval_steps": 1}
    return make(path, Scalar, lr_scheduler_type=kind, logging_steps=1, **{"max_steps": STEPS} | more | settings)


def expected(kind, warmup, kwargs=None, steps=STEPS):
    """Return the rates that transformers' schedule gives for each step, and the one after the last."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_scheduler(kind, optimizer, warmup, steps, scheduler_specific_kwargs=kwargs or {})
    rates = []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step(*([EVALUATIONS[step]] if kind in WAITING else []))
    return rates


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_is_transformers_own_and_survives_a_resume(tmp_path, kind):
    warmup = 0 if kind in UNWARMED else 2
    kwargs = KWARGS.get(kind, {})
    settings = {"kind": kind, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup}
    with pytest.raises(Interrupted):
        scalar(tmp_path / "run", plugins=[Stop()], **settings).train()
    run = scalar(tmp_path / "run", resume="auto", **settings)
    run.train()
    wanted = expected(kind, warmup, kwargs)
    assert series(run, "learning_rate") == pytest.approx(wanted, rel=1e-12)
    assert kind == "constant" or len(set(wanted)) > 1


def test_a_cosine_by_its_formula(tmp_path):
    run = scalar(tmp_path / "run", "cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": 1e-3}, warmup_ratio=0.3)
    run.train()
    warmup = 2  # 0.3 of 6 steps, rounded up
    cosine = [1e-3 + 9e-3 * (1 + math.cos(math.pi * (s - warmup) / (STEPS - warmup))) / 2 for s in range(warmup, STEPS)]
    assert series(run, "learning_rate") == pytest.approx([0, 5e-3, *cosine])


@pytest.mark.parametrize(("kwargs", "message"), [({"min_lr_rat": 1}, "do not fit"), ({}, "do not fit")])
def test_arguments_that_do_not_fit_are_refused(tmp_path, kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        scalar(tmp_path / "run", "cosine_with_min_lr", lr_scheduler_kwargs=kwargs).train()
    assert not (tmp_path / "run").exists()


def test_a_constant_rate_takes_no_arguments(tmp_path):
    with pytest.raises(ConfigurationError, match="lr_scheduler_kwargs"):
        scalar(tmp_path / "run", "constant", lr_scheduler_kwargs={"min_lr": 1}).train()


@pytest.mark.parametrize("kind", UNWARMED)
@pytest.mark.parametrize("warmup", [{"warmup_steps": 2}, {"warmup_ratio": 0.1}])
def test_a_warmup_that_the_schedule_would_not_make_is_refused(tmp_path, kind, warmup):
    (key,) = warmup
    with pytest.raises(ConfigurationError, match=rf"train\.{key} is not used by lr_scheduler_type: {kind}"):
        scalar(tmp_path / "run", kind, **warmup).train()


def test_an_unknown_schedule_is_refused_with_the_near_one(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'cosin' is not known\. Did you mean 'cosine'"):
        scalar(tmp_path / "run", "cosin").train()


def test_an_unknown_optimizer_is_refused_with_the_near_one(tmp_path):
    with pytest.raises(ConfigurationError, match=r"'adamw_troch' is not known\. Did you mean 'adamw_torch'"):
        scalar(tmp_path / "run", optim="adamw_troch")


def test_options_of_another_optimizer_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"train\.adam_beta2 is not used by optim: sgd"):
        scalar(tmp_path / "run", optim="sgd", adam_beta2=0.9)


def test_decay_is_for_matrices_alone(tmp_path):
    """At a rate of 1 and a decay of a half, with gradients of zero, AdamW halves what decays."""

    class Still(Scalar):
        def compute_loss(self, run, batch):
            return LossOutput({"loss": Term((run.model.weight.sum() + run.model.bias.sum()) * 0, "tokens")})

    settings = {"weight_decay": 0.5, "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1}
    run = make(tmp_path / "run", Still, **settings)
    run._set_up()
    weight, bias = run.model.weight.item(), run.model.bias.item()
    run.train()
    assert (run.model.weight.item(), run.model.bias.item()) == (weight / 2, bias)
