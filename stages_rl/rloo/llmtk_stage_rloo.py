"""REINFORCE leave-one-out (arXiv 2402.14740): each answer is judged by the mean reward of the others to its prompt.

With the rewards R_i of a prompt's k answers,

    A_i = R_i - 1/(k-1) sum_{j != i} R_j

    1/N  sum_i  -min(rho_i A_i, clip(rho_i, 1 - eps, 1 + eps) A_i),   rho_i = pi(y_i|x) / pi_old(y_i|x)

over the N answers of the optimizer window, on all ranks: an answer is one action, and the ratio that of the whole of
it. In the first pass rho is 1, and the gradient is REINFORCE's, -A_i grad log pi(y_i|x).

The policy is held to the reference by R_i - beta (log pi(y_i|x) - log pi_ref(y_i|x)) in the reward's place (`kl_in:
reward`, section 2), or by beta times the KL of each token in the loss, whose estimate k3 is multiplied by the token's
ratio so that its gradient is the KL's (`kl_in: loss`).
"""

from __future__ import annotations

from typing import Literal

import torch
from llmtk_rl.advantages import EPSILON, k1, k3, leave_one_out
from llmtk_rl.demo import reinforcement_demo
from llmtk_rl.losses import Clipping, clip_ratios, clipped
from llmtk_rl.rollouts import mean_and_std
from llmtk_rl.stage import BetaOptions, ReinforcementStage, policy_metrics
from pydantic import Field

from llmtk import Batch, ConfigurationError, Demo, LossOutput, Mean, RunView, Term
from llmtk.config.unused import is_given


class ReinforceLeaveOneOut(ReinforcementStage):
    """Prompts; each is answered several times."""

    summary = "REINFORCE leave-one-out: answers of the policy, each judged by the mean reward of the others"
    paper = "arXiv 2402.14740"
    citation = """
        @misc{ahmadian2024back,
            title = {{Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
                     LLMs}},
            author = {Arash Ahmadian and Chris Cremer and Matthias Gallé and Marzieh Fadaee and Julia Kreutzer
                      and Olivier Pietquin and Ahmet Üstün and Sara Hooker},
            year = {2024},
            eprint = {2402.14740},
            archivePrefix = {arXiv},
            primaryClass = {cs.LG},
        }
    """
    section = "rloo"

    class Options(BetaOptions):
        """How the policy is held to the reference, and how far it may go."""

        beta: float = Field(0.05, ge=0)
        """How strongly the policy is held to the reference. 0: not at all, and there is no reference."""
        kl_in: Literal["reward", "loss"] = "reward"
        """Where the KL stands: in the reward of each answer, or as a term of the loss, token by token."""
        epsilon: float = Field(0.2, ge=0, lt=1)
        """Ratios count from 1 - epsilon to 1 + epsilon."""
        normalize_advantages: bool = False
        """Bring the advantages of a round, on all ranks, to a mean of 0 and a standard deviation of 1."""

    def check(self, run: RunView) -> None:
        super().check(run)
        if self.options.num_generations < 2:
            raise ConfigurationError("rloo.num_generations: 1 leaves no other answer to compare with; give 2 or more")
        if is_given(self.options, "kl_in") and not self.options.beta:
            raise ConfigurationError("rloo.kl_in: there is no KL with rloo.beta 0; remove one of them")

    @property
    def needs_old_logps(self) -> bool:
        return super().needs_old_logps or self._kl_in_reward

    @property
    def _kl_in_reward(self) -> bool:
        return bool(self.options.beta) and self.options.kl_in == "reward"

    def with_advantages(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Batch:
        rewards = batch.per_sequence.get("rewards", torch.zeros(0))
        if self._kl_in_reward:
            old, reference = batch.per_target["old_logps"], batch.per_target["reference_logps"]
            metrics["kl"] = Mean(k3(old, reference).sum(), len(old))
            rewards = rewards - self.options.beta * batch.sum_by_sequence(k1(old, reference))
        advantages = leave_one_out(rewards, batch.sequence_group, len(batch))
        if self.options.normalize_advantages:
            mean, std = mean_and_std(run, advantages)
            advantages = (advantages - mean) / (std + EPSILON)
        metrics["advantages/mean"] = Mean(advantages.sum(), len(advantages))
        metrics["advantages/abs"] = Mean(advantages.abs().sum(), len(advantages))
        return batch.with_columns(per_sequence={"advantages": advantages})

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        o = self.options
        scores = run.score(batch, also=["entropy"], temperature=o.temperature)
        old = batch.per_target.get("old_logps", scores.logps.detach())
        advantages = batch.per_sequence["advantages"]
        ratio = batch.sum_by_sequence(scores.logps - old).exp()
        clipping = Clipping(o.epsilon, o.epsilon)
        surrogate = clipped(ratio, advantages, clipping)
        # An answer that is masked has no tokens left, and its ratio is 1, without a gradient; it counts nowhere.
        counts = batch.target_counts > 0
        terms = {"policy": Term(torch.where(counts, surrogate, 0.0).sum(), per="sequences")}

        metrics = policy_metrics(self, batch, scores, old) | clip_ratios(ratio[counts], advantages[counts], clipping)
        if o.beta and o.kl_in == "loss":
            kl = k3(scores.logps, batch.per_target["reference_logps"])
            metrics["kl"] = Mean(kl.detach().sum(), len(kl))
            terms["kl"] = Term((kl * (scores.logps - old).exp()).sum(), "sequences", o.beta)
        return LossOutput(terms, metrics, scores)

    def demo(self) -> Demo:
        return reinforcement_demo("rloo", max_steps=280, options={"num_iterations": 4, "beta": 0.0})
