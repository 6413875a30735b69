"""Group-relative policy optimisation (arXiv 2402.03300) and its kin.

Each prompt is answered G times by the policy. With the rewards R_i of a prompt's answers,

    A_i = (R_i - mean R) / std R            (scale_rewards: group; batch: the std of all; none: without it)

is the advantage of every token of answer i, and the loss over all tokens t of the optimizer window, on all ranks,

    1/N  sum_i sum_t  [ loss(rho_it, A_i) + beta KL_it ],   rho_it = pi(y_it) / pi_old(y_it)

with one of the losses of `llmtk_grpo_losses` and its N. KL_it is the estimator k3 against the reference; with
`kl_correction` it is multiplied by rho, and then its gradient is that of the KL.

Departures from other code: N is that of the whole window on all ranks, however it is cut, so that `bnpo` and `dapo`
are one; completions that `mask_truncated_completions` takes out count nowhere in N.
"""

from __future__ import annotations

from typing import Literal

import torch
from llmtk_grpo_losses import PER, Policy, cispo, of_sequences, of_tokens, sapo
from llmtk_rl.advantages import group_std, k3, relative_to_group
from llmtk_rl.demo import reinforcement_demo
from llmtk_rl.losses import Clipping, clip_ratios
from llmtk_rl.rollouts import Rollout, Writer, mean_and_std
from llmtk_rl.stage import BetaOptions, ReinforcementStage, policy_metrics
from pydantic import Field
from torch import Tensor

from llmtk import Batch, ConfigurationError, Demo, LossOutput, Mean, RunView, Term
from llmtk.config.unused import refuse_unused

Loss = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "gspo", "sapo", "luspo"]
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "luspo")
_USED = {
    "epsilon": _CLIPPED,
    "epsilon_high": (*_CLIPPED, "cispo"),
    "delta": _CLIPPED,
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
}
"""Which losses use an option; the others refuse it."""
CISPO_CAP = 5.0


class GroupRelativePolicyOptimization(ReinforcementStage):
    """Prompts; each is answered several times, and answers are judged against each other."""

    summary = "Group-relative policy optimisation: answers of the policy, rewarded and judged within their group"
    paper = "arXiv 2402.03300"
    citation = """
        @misc{shao2024deepseekmath,
            title = {{DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models}},
            author = {Zhihong Shao and Peiyi Wang and Qihao Zhu and Runxin Xu and Junxiao Song and Xiao Bi and
                      Haowei Zhang and Mingchuan Zhang and Y. K. Li and Y. Wu and Daya Guo},
            year = {2024},
            eprint = {2402.03300},
            archivePrefix = {arXiv},
            primaryClass = {cs.CL},
        }
    """
    section = "grpo"

    class Options(BetaOptions):
        """Which loss, how groups are judged, and how far the policy may go."""

        loss: Loss = "dapo"
        """How tokens are weighed against each other, and ratios limited."""
        epsilon: float = Field(0.2, ge=0, lt=1)
        """Ratios count down to 1 - epsilon, and up to 1 + epsilon."""
        epsilon_high: float | None = Field(None, ge=0)
        """Ratios count up to 1 + epsilon_high (DAPO, arXiv 2503.14476, takes 0.28). For cispo the cap itself, 5."""
        delta: float | None = Field(None, gt=1)
        """Ratios never count for more than this, whatever the advantage's sign (arXiv 2505.07291)."""
        sapo_temperature_pos: float = Field(1.0, gt=0)
        """How fast the gate closes for tokens with a positive advantage."""
        sapo_temperature_neg: float = Field(1.05, gt=0)
        """The same for negative ones."""
        scale_rewards: Literal["group", "batch", "none"] = "group"
        """What advantages are divided by: the standard deviation of the group's rewards, of the batch's, or nothing."""
        kl_correction: bool = False
        """Multiply the KL's estimate by the ratio, so that its gradient is the KL's."""
        entropy_coef: float = Field(0.0, ge=0)
        """Add this times the mean entropy a token to what is maximised."""
        drop_flat_groups: bool = False
        """Leave groups out whose rewards are all equal: they teach nothing, but count in the loss's denominator."""
        dynamic_sampling: bool = False
        """Draw more prompts until as many groups as the batch has prompts are not flat (DAPO, section 3.2)."""
        max_extra_draws: int = Field(4, ge=1)
        """How often dynamic_sampling draws again, at most."""

    def check(self, run: RunView) -> None:
        super().check(run)
        o = self.options
        refuse_unused("grpo", o, [o.loss], _USED)
        if o.num_generations < 2:
            raise ConfigurationError("grpo.num_generations: 1 leaves nothing to compare an answer with; give 2 or more")
        if o.kl_correction and not o.beta:
            raise ConfigurationError("grpo.kl_correction: there is no KL without grpo.beta; give it, or remove this")
        if o.max_extra_draws != 4 and not o.dynamic_sampling:
            raise ConfigurationError("grpo.max_extra_draws is used with grpo.dynamic_sampling: true alone; remove it")

    def choose(self, run: RunView, rollouts: list[Rollout], write: Writer) -> list[Rollout]:
        o = self.options
        if not (o.drop_flat_groups or o.dynamic_sampling):
            return rollouts
        kept = [rollout for rollout in rollouts if not rollout.is_flat]
        for _ in range(o.max_extra_draws if o.dynamic_sampling else 0):
            missing = run.global_rows - int(run.sum_over_ranks({"kept": len(kept)})["kept"])
            if missing <= 0:
                break
            kept += [rollout for rollout in write(run.draw(missing)) if not rollout.is_flat]
        return kept

    def with_advantages(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Batch:
        rewards = batch.per_sequence.get("rewards", torch.zeros(0))
        group, groups = batch.sequence_group, len(batch)
        std: Tensor | float | None = None
        if self.options.scale_rewards == "group":
            std = group_std(rewards, group, groups)
        elif self.options.scale_rewards == "batch":
            std = mean_and_std(run, rewards)[1]
        advantages = relative_to_group(rewards, group, groups, std)
        metrics["advantages/mean"] = Mean(advantages.sum(), len(advantages))
        metrics["advantages/abs"] = Mean(advantages.abs().sum(), len(advantages))
        return batch.with_columns(per_sequence={"advantages": advantages})

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o = self.options
        scores = run.score(batch, also=["entropy"], temperature=o.temperature)
        assert scores.entropy is not None
        old = batch.per_target.get("old_logps")
        advantages = batch.per_sequence["advantages"][batch.target_sequence]
        policy = Policy(batch, scores.logps, scores.logps.detach() if old is None else old, advantages)

        weigh, per = PER[o.loss]
        terms = {"policy": Term(weigh(policy, self._tokens(policy)).sum(), per=per)}
        metrics = policy_metrics(self, batch, scores, policy.old_logps)
        if o.loss != "sapo":
            metrics |= self._clip_metrics(policy)
        if o.beta:
            kl = k3(scores.logps, batch.per_target["reference_logps"])
            metrics["kl"] = Mean(kl.detach().sum(), len(kl))
            terms["kl"] = Term(weigh(policy, kl * policy.ratio if o.kl_correction else kl).sum(), per, o.beta)
        if o.entropy_coef:
            terms["entropy"] = Term(scores.entropy.sum(), "tokens", -o.entropy_coef)
        return LossOutput(terms, metrics, scores)

    def demo(self) -> Demo:
        # A round's groups whose answers are all right, or all wrong, cost a pass and teach nothing.
        return reinforcement_demo("grpo", max_steps=280, options={"num_iterations": 4, "drop_flat_groups": True})

    @property
    def _clipping(self) -> Clipping:
        o = self.options
        return Clipping(o.epsilon, o.epsilon if o.epsilon_high is None else o.epsilon_high, o.delta)

    @property
    def _cap(self) -> float:
        high = self.options.epsilon_high
        return CISPO_CAP if high is None else float(high)

    def _tokens(self, policy: Policy) -> Tensor:
        """Return each token's loss (targets,)."""
        o = self.options
        if o.loss == "cispo":
            return cispo(policy, self._cap)
        if o.loss == "sapo":
            return sapo(policy, o.sapo_temperature_pos, o.sapo_temperature_neg)
        return (of_sequences if o.loss in ("gspo", "luspo") else of_tokens)(policy, self._clipping)

    def _clip_metrics(self, policy: Policy) -> dict[str, Mean]:
        """Return the share of tokens whose gradient a limit takes away: below, above, and either."""
        loss = self.options.loss
        ratio = (policy.sequence_ratio if loss in ("gspo", "luspo") else policy.ratio).detach()
        if loss == "cispo":
            high = (ratio > self._cap) & (policy.advantages > 0)
            return {"clip_ratio/high_mean": Mean(high.sum(), len(ratio))}
        return clip_ratios(ratio, policy.advantages, self._clipping)
