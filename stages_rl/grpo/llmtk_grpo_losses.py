"""Losses of group-relative policy optimisation, as pure functions of one micro-batch.

With the ratio rho_t = pi(y_t) / pi_old(y_t) of each token, and the advantage A of its completion:

    clipped   -min(rho A, clip(rho, 1 - eps, 1 + eps_high) A)         grpo, bnpo, dr_grpo, dapo: arXiv 1707.06347
    cispo     -stop_gradient(min(rho, eps_high)) A log pi(y_t)        arXiv 2506.13585
    sapo      -(4 / tau) sigmoid(tau (rho - 1)) A                     arXiv 2511.20347
    gspo      clipped, with the completion's ratio exp(mean log rho)  arXiv 2507.18071; luspo, arXiv 2602.05261

They differ further in what divides the sum of all tokens (`PER`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from llmtk_rl.losses import Clipping, clipped
from torch import Tensor

if TYPE_CHECKING:
    from llmtk import Batch


@dataclass(frozen=True)
class Policy:
    """What losses are made of: `logps`, `old_logps` and `advantages` of target tokens (targets,), and their batch."""

    batch: Batch
    logps: Tensor
    old_logps: Tensor
    advantages: Tensor

    @property
    def ratio(self) -> Tensor:
        """(targets,): rho of each token."""
        return (self.logps - self.old_logps).exp()

    @property
    def sequence_ratio(self) -> Tensor:
        """(targets,): the geometric mean of its completion's rho, at each token."""
        lengths = self.batch.target_counts.clamp(min=1)
        mean = self.batch.sum_by_sequence(self.logps - self.old_logps) / lengths
        return mean.exp()[self.batch.target_sequence]


def of_tokens(policy: Policy, clipping: Clipping) -> Tensor:
    """Return each token's loss (targets,) under its own clipped ratio."""
    return clipped(policy.ratio, policy.advantages, clipping)


def of_sequences(policy: Policy, clipping: Clipping) -> Tensor:
    """Return each token's loss (targets,) under its completion's clipped ratio: the same for all its tokens."""
    return clipped(policy.sequence_ratio, policy.advantages, clipping)


def cispo(policy: Policy, cap: float) -> Tensor:
    """Return each token's loss (targets,): REINFORCE, weighed by the ratio up to a cap, which has no gradient."""
    return -policy.ratio.detach().clamp(max=cap) * policy.advantages * policy.logps


def sapo(policy: Policy, tau_positive: float, tau_negative: float) -> Tensor:
    """Return each token's loss (targets,): a soft gate in place of a clip, its width by the advantage's sign."""
    tau = torch.full_like(policy.advantages, tau_negative).masked_fill(policy.advantages > 0, tau_positive)
    return -(4 / tau) * torch.sigmoid(tau * (policy.ratio - 1)) * policy.advantages


def mean_over_tokens(policy: Policy, tokens: Tensor) -> Tensor:
    """Weigh each token (targets,) by one over its completion's length."""
    lengths = policy.batch.target_counts.clamp(min=1)
    return tokens / lengths[policy.batch.target_sequence]


def unchanged(policy: Policy, tokens: Tensor) -> Tensor:
    """Weigh all tokens alike."""
    return tokens


Weighing = Callable[[Policy, Tensor], Tensor]
PER: dict[str, tuple[Weighing, str]] = {
    "grpo": (mean_over_tokens, "sequences"),
    "sapo": (mean_over_tokens, "sequences"),
    "gspo": (mean_over_tokens, "sequences"),
    "luspo": (unchanged, "sequences"),
    "bnpo": (unchanged, "tokens"),
    "dapo": (unchanged, "tokens"),
    "cispo": (unchanged, "tokens"),
    "dr_grpo": (unchanged, "room"),
}
"""How a loss weighs tokens, and the weight of the window that divides their sum."""
