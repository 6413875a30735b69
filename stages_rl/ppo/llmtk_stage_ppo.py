"""Proximal policy optimisation (arXiv 1707.06347), as it is done on language models (arXiv 1909.08593).

The policy pi writes a completion y for each prompt, and a value head on its trunk, the critic V, says what each token
may still expect. With the score R of the completion and the policy pi_old that wrote it, token t is rewarded with

    r_t = -beta (log pi_old(y_t) - log pi_ref(y_t))  +  R where t is the last

and judged by its generalised advantage estimate (arXiv 1506.02438, equation 16), from which the return follows:

    A_t = sum_k (gamma lam)^k delta_{t+k},   delta_t = r_t + gamma V_old(t+1) - V_old(t),   G_t = A_t + V_old(t)

The A are whitened over the round, on all ranks. Each of several passes over the round minimises, over the N tokens of
the optimizer window, on all ranks,

    1/N sum_t  -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t)                         rho_t = pi(y_t) / pi_old(y_t)
    + vf_coef / 2N sum_t  max((V_t - G_t)^2, (clip(V_t, V_old(t) - eps_V, V_old(t) + eps_V) - G_t)^2)

beta is fixed, or follows the KL to a target (1909.08593, section 2.2).

The value head begins at 0, and so does every value: at first the advantage is what the rewards alone say. It learns
with the policy, by one optimizer, and its gradient reaches the trunk. An export leaves it out; checkpoints have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from llmtk_rl.advantages import gae, k1, k3
from llmtk_rl.demo import reinforcement_demo
from llmtk_rl.kl_control import KLControl
from llmtk_rl.losses import Clipping, clip_ratios, clipped
from llmtk_rl.rollouts import mean_and_std
from llmtk_rl.stage import ReinforcementOptions, ReinforcementStage, policy_metrics
from pydantic import Field
from torch import Tensor

from llmtk import Batch, ConfigurationError, Demo, LossOutput, Mean, Models, RunView, Term, hookimpl
from llmtk.config.unused import is_given
from llmtk.scoring import value_head


class ProximalPolicyOptimization(ReinforcementStage):
    """Prompts; each is answered once, unless told otherwise, and every token of the answer is judged by a critic."""

    name = section = "ppo"
    summary = "Proximal policy optimisation: a critic judges each token of the policy's rewarded answers"
    paper = "arXiv 1707.06347, 1909.08593"
    citation = """
        @misc{schulman2017proximal,
            title = {{Proximal Policy Optimization Algorithms}},
            author = {John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},
            year = {2017},
            eprint = {1707.06347},
            archivePrefix = {arXiv},
            primaryClass = {cs.LG},
        }

        @misc{ziegler2019finetuning,
            title = {{Fine-Tuning Language Models from Human Preferences}},
            author = {Daniel M. Ziegler and Nisan Stiennon and Jeffrey Wu and Tom B. Brown and Alec Radford and
                      Dario Amodei and Paul Christiano and Geoffrey Irving},
            year = {2019},
            eprint = {1909.08593},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    old_scores = ("values",)

    class Options(ReinforcementOptions):
        """How far policy and critic may go, what is expected, and how strongly the policy is held to the reference."""

        num_generations: int = Field(1, ge=1)
        """Completions of each prompt."""
        num_iterations: int = Field(4, ge=1)
        """Passes over a round before the next one is written."""
        cliprange: float = Field(0.2, gt=0, lt=1)
        """Ratios count from 1 - cliprange to 1 + cliprange."""
        cliprange_value: float = Field(0.2, gt=0)
        """Values count up to this far from those before the round."""
        vf_coef: float = Field(0.1, gt=0)
        """What the critic's loss counts, beside the policy's."""
        gamma: float = Field(1.0, gt=0, le=1)
        """What a reward one token later counts."""
        lam: float = Field(0.95, ge=0, le=1)
        """How far advantages look before they trust the critic. 0: one token; 1: to the end."""
        whiten_advantages: bool = True
        """Shift and scale the advantages of a round's tokens to mean 0 and variance 1."""
        whiten_rewards: bool = False
        """Scale the rewards of a round's tokens, the KL's penalty included, to variance 1; their mean is kept."""
        entropy_coef: float = Field(0.0, ge=0)
        """Add this times the mean entropy a token to what is maximised."""
        missing_eos_penalty: float | None = Field(None, gt=0)
        """Take this from the score of completions that did not end by themselves."""
        kl_coef: float = Field(0.05, ge=0)
        """How much of a token's log-ratio to the reference is taken from its reward. 0: there is no reference."""
        kl_control: Literal["fixed", "adaptive"] = "fixed"
        """Whether kl_coef stays, or follows the KL to kl_target."""
        kl_target: float = Field(6.0, gt=0)
        """For adaptive: the KL of a completion, in nats, that is aimed at."""
        kl_horizon: int = Field(10_000, ge=1)
        """For adaptive: how slowly kl_coef moves. A round of n completions changes it by 0.2 n / kl_horizon at most."""

        @property
        def kl_weight(self) -> float:
            return self.kl_coef

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._control: KLControl | None = None

    @property
    def control(self) -> KLControl:
        """The coefficient of the KL, as it is now."""
        if self._control is None:
            o = self.options
            self._control = KLControl(o.kl_coef, o.kl_target if o.kl_control == "adaptive" else None, o.kl_horizon)
        return self._control

    @property
    def needs_old_logps(self) -> bool:
        return True  # even of a single pass: rewards and advantages are made of what the old policy said

    def check(self, run: RunView) -> None:
        super().check(run)
        self._control = None  # a stage that is run again begins anew
        o = self.options
        for name in ("kl_target", "kl_horizon"):
            if is_given(o, name) and o.kl_control == "fixed":
                raise ConfigurationError(f"ppo.{name} is used with ppo.kl_control: adaptive alone; remove it")
        if o.kl_control == "adaptive" and not o.kl_coef:
            raise ConfigurationError("ppo.kl_control: adaptive multiplies ppo.kl_coef, and 0 stays 0; give another one")
        if o.missing_eos_penalty is not None and o.mask_truncated_completions:
            raise ConfigurationError(
                "ppo.missing_eos_penalty: completions that did not end take no part, by "
                "ppo.mask_truncated_completions; remove one of them"
            )

    def build_models(self, run: RunView) -> Models:
        models = super().build_models(run)
        value_head.add_head(models.root)
        return models

    def export_model(self, run: RunView, path: Path) -> None:
        with value_head.without_head(run.model):
            super().export_model(run, path)

    @hookimpl
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        return {**super().extra_checkpoint_state(run), "kl_coef": self.control.coefficient}

    @hookimpl
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        super().restore_checkpoint_state(run, state)
        self.control.coefficient = state["kl_coef"]

    def with_advantages(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Batch:
        o, values = self.options, batch.per_target["old_values"].double()
        rewards = self._scores(run, batch, metrics) - self._kl_penalty(run, batch, metrics)
        if o.whiten_rewards:
            rewards = rewards * _scale(mean_and_std(run, rewards)[1])
        advantages = gae(rewards, values, batch.target_counts, o.gamma, o.lam)
        returns = advantages + values
        mean, std = mean_and_std(run, advantages)
        metrics |= _means("advantages", advantages) | _means("values", values) | _means("returns", returns)
        metrics["advantages/std"] = Mean(std, 1)
        if spread := mean_and_std(run, returns)[1]:
            metrics["explained_variance"] = Mean(1 - (std / spread) ** 2, 1)
        if o.whiten_advantages:
            advantages = (advantages - mean) * _scale(std)
        return batch.with_columns(per_target={"advantages": advantages.float(), "returns": returns.float()})

    def _scores(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Tensor:
        """Return (targets,) float64: each completion's score at its last token, 0 before it."""
        scores = batch.per_sequence.get("rewards", torch.zeros(0)).double()
        metrics["reward_std"] = Mean(mean_and_std(run, scores)[1], 1)
        if self.options.missing_eos_penalty is not None and len(scores):
            scores = scores - self.options.missing_eos_penalty * batch.per_sequence["truncated"].double()
        counts = batch.target_counts
        rewards = torch.zeros(int(counts.sum()), dtype=torch.float64)
        rewards[counts.cumsum(0)[counts > 0] - 1] = scores[counts > 0]
        return rewards

    def _kl_penalty(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Tensor:
        """Return (targets,) float64: what the KL to the reference takes from each token's reward, and adapt to it."""
        old = batch.per_target["old_logps"].double()
        if self.reference == "none":
            return torch.zeros_like(old)
        reference = batch.per_target["reference_logps"].double()
        kl, completions = k1(old, reference), int((batch.target_counts > 0).sum())
        penalty = self.control.coefficient * kl
        metrics["kl"] = Mean(k3(old, reference).sum(), len(kl))
        metrics["kl/sequence"] = Mean(kl.sum(), completions)
        metrics["kl_coef"] = Mean(self.control.coefficient, 1)
        if run.model.training:  # for the next round
            total = run.sum_over_ranks({"kl": float(kl.sum()), "completions": completions})
            self.control.update(total["kl"] / max(total["completions"], 1), total["completions"])
        return penalty

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o, columns = self.options, batch.per_target
        scores = run.score(batch, also=["entropy", "values"], temperature=o.temperature)
        assert scores.entropy is not None
        assert scores.values is not None
        old, advantages, clipping = columns["old_logps"], columns["advantages"], Clipping(o.cliprange, o.cliprange)
        ratio = (scores.logps - old).exp()
        policy = clipped(ratio, advantages, clipping)
        value = clipped_value_loss(scores.values, columns["old_values"], columns["returns"], o.cliprange_value)

        terms = {"policy": Term(policy.sum(), "tokens"), "value": Term(value.sum(), "tokens", o.vf_coef)}
        if o.entropy_coef:
            terms["entropy"] = Term(scores.entropy.sum(), "tokens", -o.entropy_coef)
        moved = (scores.values.detach() - columns["old_values"]).abs() > o.cliprange_value
        metrics = policy_metrics(self, batch, scores, old) | clip_ratios(ratio.detach(), advantages, clipping)
        metrics["clip_ratio/value_mean"] = Mean(moved.sum(), len(moved))
        metrics["approx_kl"] = Mean(k3(old, scores.logps.detach()).sum(), len(old))
        return LossOutput(terms, metrics, scores)

    def demo(self) -> Demo:
        # Answers are four tokens long, and a critic that has just begun tells them apart less well than their scores.
        options = {"num_generations": 4, "mini_batches": 2, "lam": 1.0, "kl_coef": 0.0}
        return reinforcement_demo("ppo", rows=128, max_steps=360, options=options)


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> Tensor:
    """Return half the larger of two squared errors: of the value, and of it within `cliprange` of the old one.

    All have one shape, as the answer has (arXiv 1707.06347's code; 2005.12729, section 3).
    """
    within = old_values + (values - old_values).clamp(-cliprange, cliprange)
    return torch.maximum((values - returns).square(), (within - returns).square()) / 2


def _scale(std: float) -> float:
    return float((std**2 + 1e-8) ** -0.5)


def _means(name: str, values: Tensor) -> dict[str, Mean]:
    return {f"{name}/mean": Mean(values.sum(), len(values))}
