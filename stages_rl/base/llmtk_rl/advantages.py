"""Advantages and estimates of KL: pure functions of tensors.

Where values belong to groups, `group` (n,) int64 says to which, from 0 to `groups` - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation before dividing by it."""
ROUNDING = 1e-6
"""Rewards that differ by less than this, times their size where that is over 1, are equal: in float32, too."""


def group_mean(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the mean of each group: (n,) to (groups,); 0 for one without values."""
    counts = torch.bincount(group, minlength=groups).clamp(min=1)
    return values.new_zeros(groups).index_add(0, group, values) / counts


def group_std(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return each group's standard deviation with n - 1 below, (groups,); 0 for one with less than two values."""
    deviations = values - group_mean(values, group, groups)[group]
    below = (torch.bincount(group, minlength=groups) - 1).clamp(min=1)
    return (values.new_zeros(groups).index_add(0, group, deviations.square()) / below).sqrt()


def is_flat(rewards: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return which groups (groups,) have equal rewards (n,) alone, so that none is better than another; or none."""
    highest = rewards.new_full((groups,), -torch.inf).scatter_reduce(0, group, rewards, "amax")
    lowest = rewards.new_full((groups,), torch.inf).scatter_reduce(0, group, rewards, "amin")
    size = rewards.new_ones(groups).scatter_reduce(0, group, rewards.abs(), "amax")
    return highest - lowest <= ROUNDING * size


def relative_to_group(rewards: Tensor, group: Tensor, groups: int, std: Tensor | float | None) -> Tensor:
    """Return rewards (n,) less their group's mean, divided by `std` where it is given.

    arXiv 2402.03300, section 4.1.2. `std` has shape (groups,), or is one number for all. Equal rewards give exactly 0.
    """
    advantages = rewards - group_mean(rewards, group, groups)[group]
    # Of equal rewards the mean may be off by its rounding, which a standard deviation of 0 would blow up.
    advantages = advantages.masked_fill(is_flat(rewards, group, groups)[group], 0.0)
    if std is None:
        return advantages
    return advantages / ((std[group] if isinstance(std, Tensor) else std) + EPSILON)


def leave_one_out(rewards: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return rewards (n,) less the mean of the others of their group (arXiv 2402.14740, equation 8).

    One that is alone has no baseline, and gives 0.
    """
    counts = torch.bincount(group, minlength=groups)[group]
    advantages = relative_to_group(rewards, group, groups, None)
    return advantages * counts / (counts - 1).clamp(min=1)


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Return the generalised advantage estimates (tokens,) of sequences that stand one behind the other.

    A_t = sum_k (gamma lam)^k delta_{t+k},  delta_t = r_t + gamma V_{t+1} - V_t,  within a sequence; behind its last
    token V is 0 (arXiv 1506.02438, equation 16). `rewards` and `values` are (tokens,), `lengths` (sequences,).
    """
    advantages = torch.zeros_like(rewards)
    longest = int(lengths.max()) if len(lengths) else 0
    starts = lengths.cumsum(0) - lengths
    following = torch.zeros(len(lengths), dtype=rewards.dtype, device=rewards.device)
    next_value = torch.zeros_like(following)
    for position in range(longest - 1, -1, -1):
        here = (position < lengths).nonzero().flatten()
        at = starts[here] + position
        delta = rewards[at] + gamma * next_value[here] - values[at]
        following[here] = delta + gamma * lam * following[here]
        next_value[here] = values[at]
        advantages[at] = following[here]
    return advantages


def k1(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """log p - log q of each token: an unbiased estimate of KL(p || q) on tokens drawn from p, of either sign."""
    return logps - reference_logps


def k3(logps: Tensor, reference_logps: Tensor) -> Tensor:
    """q/p - log(q/p) - 1 of each token: an estimate of KL(p || q) that is never negative (Schulman 2020).

    Its value is unbiased on tokens drawn from p; its gradient is not that of the KL, unless multiplied by the ratio of
    p to the distribution that was drawn from.
    """
    log_ratio = reference_logps - logps
    return log_ratio.exp() - log_ratio - 1
