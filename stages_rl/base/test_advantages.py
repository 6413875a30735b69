"""Advantages and estimates of KL against sums written out, and against enumerated expectations."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
import torch
from llmtk_rl.advantages import gae, group_mean, group_std, is_flat, k1, k3, leave_one_out, relative_to_group

REWARDS = [[0.0, 1.0, 0.25, 1.0], [2.0, -1.0], [0.5, 0.5, 0.5], [3.0], [-0.1, 0.7, 0.2, 0.2, 1e3]]
"""Groups of unequal sizes: some completions were left out."""


def laid_out(rewards: Sequence[Sequence[float]], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    group = torch.tensor([index for index, values in enumerate(rewards) for _ in values], dtype=torch.int64)
    return torch.tensor([value for values in rewards for value in values], dtype=dtype), group


def test_means_and_standard_deviations_are_those_of_each_group() -> None:
    values, group = laid_out(REWARDS)
    assert group_mean(values, group, 6).tolist() == pytest.approx([*map(statistics.mean, REWARDS), 0.0])
    spreads = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in REWARDS]
    assert group_std(values, group, 6).tolist() == pytest.approx([*spreads, 0.0])


def test_advantages_are_rewards_less_the_mean_over_the_standard_deviation() -> None:
    """With n - 1 and 1e-4, as TRL divides; a group without members changes nothing."""
    values, group = laid_out(REWARDS)
    wanted = [
        (value - statistics.mean(values)) / (statistics.stdev(values) + 1e-4) if len(values) > 1 else 0.0
        for values in REWARDS
        for value in values
    ]
    found = relative_to_group(values, group, 6, group_std(values, group, 6))
    assert found.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("std", [None, 2.5])
def test_advantages_by_one_number_for_all_or_none(std: float | None) -> None:
    values, group = laid_out(REWARDS)
    wanted = [
        (value - statistics.mean(values)) / (1.0 if std is None else std + 1e-4)
        for values in REWARDS
        for value in values
    ]
    assert relative_to_group(values, group, 5, std).tolist() == pytest.approx(wanted, rel=1e-12)


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    values, group = laid_out(REWARDS)
    wanted = [
        value - statistics.mean(values[:i] + values[i + 1 :]) if len(values) > 1 else 0.0
        for values in REWARDS
        for i, value in enumerate(values)
    ]
    assert leave_one_out(values, group, 5).tolist() == pytest.approx(wanted, rel=1e-12, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2, 3, 5, 8, 13, 64])
def test_equal_rewards_give_exactly_zero_however_their_mean_rounds(size: int, dtype: torch.dtype) -> None:
    """Divided by 0 + 1e-4, a mean that is off by its rounding would be a signal."""
    values = (0.1 * 3, 0.1, 1 / 3, -0.7, 1e-3, 123.456, 1e4 / 3, 0.0)
    rewards, group = laid_out([[value] * size for value in values], dtype)
    for std in (None, 0.0, group_std(rewards, group, len(values))):
        assert relative_to_group(rewards, group, len(values), std).tolist() == [0.0] * len(rewards)
    assert leave_one_out(rewards, group, len(values)).tolist() == [0.0] * len(rewards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_that_differ_in_their_last_bit_are_equal_rewards(dtype: torch.dtype) -> None:
    """0.1 + 0.2 and 0.3: two ways to the same weighted sum."""
    rewards, group = laid_out([[0.1 + 0.2, 0.3, 0.1 * 3, 0.3]], dtype)
    assert relative_to_group(rewards, group, 1, group_std(rewards, group, 1)).tolist() == [0.0] * 4


def test_flat_groups_are_those_without_a_better_member() -> None:
    values, group = laid_out(REWARDS)
    assert is_flat(values, group, 6).tolist() == [False, False, True, True, False, True]


def test_small_differences_of_large_rewards_still_count() -> None:
    rewards, group = laid_out([[100.0, 100.01]], torch.float32)
    assert relative_to_group(rewards, group, 1, None).tolist() == pytest.approx([-0.005, 0.005], rel=1e-2)


def test_without_rewards_there_are_no_advantages() -> None:
    nothing, group = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert relative_to_group(nothing, group, 0, group_std(nothing, group, 0)).tolist() == []
    assert leave_one_out(nothing, group, 0).tolist() == []


def test_gae_is_the_discounted_sum_of_temporal_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, gamma, lam = [4, 1, 0, 7], 0.9, 0.8
    rewards = torch.randn(12, generator=generator, dtype=torch.float64)
    values = torch.randn(12, generator=generator, dtype=torch.float64)
    wanted, start = [], 0
    for length in lengths:
        r, v = rewards[start : start + length].tolist(), [*values[start : start + length].tolist(), 0.0]
        deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        wanted += [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)]
        start += length
    assert gae(rewards, values, torch.tensor(lengths), gamma, lam).tolist() == pytest.approx(wanted, rel=1e-12)


# Estimates of KL, their expectations taken over all tokens

POLICY = torch.tensor([0.2, -0.5, 1.0, 0.0], dtype=torch.float64)
REFERENCE = torch.tensor([1.1, 0.3, -0.4, 0.0], dtype=torch.float64).log_softmax(0)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probs."""
    return (p.exp() * (p - q)).sum()


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    p = POLICY.log_softmax(0)
    for estimate in (k1(p, REFERENCE), k3(p, REFERENCE)):
        assert float((p.exp() * estimate).sum()) == pytest.approx(float(divergence(p, REFERENCE)), rel=1e-12)
    assert (k3(p, REFERENCE) >= 0).all()
    assert k3(p, p).tolist() == [0.0] * 4


@pytest.mark.parametrize("corrected", [True, False])
def test_the_gradient_of_k3_is_that_of_the_kl_only_if_multiplied_by_the_ratio(corrected: bool) -> None:
    """On tokens drawn from the policy; without the ratio it is that of the KL the other way round."""
    logits = POLICY.clone().requires_grad_()
    p = logits.log_softmax(0)
    ratio = (p - p.detach()).exp() if corrected else 1.0
    (found,) = torch.autograd.grad((p.detach().exp() * ratio * k3(p, REFERENCE)).sum(), logits)
    p = logits.log_softmax(0)
    (wanted,) = torch.autograd.grad(divergence(p, REFERENCE) if corrected else divergence(REFERENCE, p), logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
