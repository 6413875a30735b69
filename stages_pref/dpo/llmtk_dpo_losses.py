"""The losses of direct preference optimisation: pure functions of the log-ratios of pairs.

With r = log pi(y|x) - log pi_ref(y|x), of the chosen answer c and the rejected one j, u the scores that an f-divergence
makes of them (r itself for the reverse KL), d = u_c - u_j and b = beta. Each returns one loss a pair, shape (pairs,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from llmtk_pref import logistic_loss
from torch import Tensor


def logsigmoid(z: Tensor) -> Tensor:
    """log(1 / (1 + e^-z))."""
    return F.logsigmoid(z)


@dataclass(frozen=True)
class Pairs:
    """The log-ratios of a micro-batch's pairs, each (pairs,), float32.

    `aot_shift` and `aot_partner` (pairs, 2) come from the sort over the whole window: see `aot`.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_score: Tensor
    rejected_score: Tensor
    chosen_length: Tensor
    rejected_length: Tensor
    aot_shift: Tensor | None = None
    aot_partner: Tensor | None = None

    @property
    def delta(self) -> Tensor:
        """d = u_c - u_j."""
        return self.chosen_score - self.rejected_score


class Options(Protocol):
    """What the losses read of the stage's options."""

    beta: float
    label_smoothing: float
    discopop_tau: float


def sigmoid(p: Pairs, o: Options) -> Tensor:
    """DPO, arXiv 2305.18290, equation 7; with label smoothing e conservative DPO: labels wrong with probability e."""
    return logistic_loss(o.beta * p.delta, o.label_smoothing)


def sigmoid_norm(p: Pairs, o: Options) -> Tensor:
    """The same on scores a token, so that length does not pay: SimPO's average (arXiv 2405.14734) with a reference."""
    return -logsigmoid(o.beta * (p.chosen_score / p.chosen_length - p.rejected_score / p.rejected_length))


def hinge(p: Pairs, o: Options) -> Tensor:
    """SLiC's margin on the scores: arXiv 2309.06657, section 3.2."""
    return (1 - o.beta * p.delta).relu()


def robust(p: Pairs, o: Options) -> Tensor:
    """Unbiased under labels flipped with probability e: arXiv 2403.00409, equation 12."""
    e, z = o.label_smoothing, o.beta * p.delta
    return (-(1 - e) * logsigmoid(z) + e * logsigmoid(-z)) / (1 - 2 * e)


def exo_pair(p: Pairs, o: Options) -> Tensor:
    """The reverse KL from (1 - e, e) to the policy's preference: arXiv 2402.00856, equation 16."""
    e, z = o.label_smoothing, o.beta * p.delta
    win, lose = z.sigmoid(), (-z).sigmoid()
    return win * (logsigmoid(z) - math.log1p(-e)) + lose * (logsigmoid(-z) - math.log(e))


def nca_pair(p: Pairs, o: Options) -> Tensor:
    """Noise contrastive alignment of a pair: arXiv 2402.05369, equation 10 with rewards 1 and 0."""
    c, j = o.beta * p.chosen, o.beta * p.rejected
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-j)


def bco_pair(p: Pairs, o: Options) -> Tensor:
    """A classifier of answers, without BCO's shift by the mean reward: arXiv 2404.04656, section 4."""
    return -logsigmoid(o.beta * p.chosen) - logsigmoid(-o.beta * p.rejected)


def sppo_hard(p: Pairs, o: Options) -> Tensor:
    """Self-play with win rates 1 and 0: arXiv 2405.00675, equation 4.7, whose eta is 1/beta."""
    half = 0.5 / o.beta
    return (p.chosen - half).square() + (p.rejected + half).square()


def aot(p: Pairs, o: Options) -> Tensor:
    """Paired alignment by optimal transport: arXiv 2406.05882, section 3.

    The policy's log-ratios log pi(c)/pi(j) of the window are sorted, and so are the reference's; equal ranks are
    compared. `aot_shift` is the pair's own reference log-ratio less that of its rank.
    """
    assert p.aot_shift is not None
    return logistic_loss(o.beta * (p.chosen - p.rejected + p.aot_shift), o.label_smoothing)


def aot_unpaired(p: Pairs, o: Options) -> Tensor:
    """Unpaired alignment by optimal transport: arXiv 2406.05882, section 3.

    The window's r_c are sorted, and so are its r_j; equal ranks are compared. `aot_partner` holds the r_j of c's rank,
    and the r_c of j's, as numbers: each comparison is met from both ends, and half of it counted at each, with the
    gradient of that end.
    """
    assert p.aot_partner is not None
    from_chosen = logistic_loss(o.beta * (p.chosen - p.aot_partner[:, 0]), o.label_smoothing)
    from_rejected = logistic_loss(o.beta * (p.aot_partner[:, 1] - p.rejected), o.label_smoothing)
    both = from_chosen + from_rejected
    return both - 0.5 * both.detach()


def apo_zero(p: Pairs, o: Options) -> Tensor:
    """Anchored: the chosen answer up, the rejected one down: arXiv 2408.06266, equation 7."""
    return 1 - (o.beta * p.chosen).sigmoid() + (o.beta * p.rejected).sigmoid()


def apo_down(p: Pairs, o: Options) -> Tensor:
    """Anchored, where the model is better than the chosen answers: both down: arXiv 2408.06266, equation 8."""
    return (o.beta * p.chosen).sigmoid() + 1 - (o.beta * (p.chosen - p.rejected)).sigmoid()


def discopop(p: Pairs, o: Options) -> Tensor:
    """The loss that a language model discovered: arXiv 2406.08414, equation 5."""
    z = o.beta * p.delta
    exponential = (z / o.discopop_tau).sigmoid()
    return -logsigmoid(z) * (1 - exponential) + (-z).exp() * exponential


LOSSES: dict[str, Callable[[Pairs, Options], Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        sigmoid_norm,
        hinge,
        robust,
        exo_pair,
        nca_pair,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
    )
}
"""Every loss on pairs. The stage adds `sft`, which is one on tokens."""


def divergence_score(ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """Return f'(t) of log t = `ratio`, any shape: what takes the log-ratio's place under another divergence.

    f-DPO, arXiv 2309.16240, table 1: reverse_kl log t; forward_kl 1 - 1/t; js log(2t / (1 + t)); alpha
    (t^(a-1) - 1)/(a - 1) for the alpha-divergence of order a. Constants are kept, which cancel in d.
    """
    # Beyond e^80 a float32 is no number any more.
    if divergence == "forward_kl":
        return 1 - (-ratio).clamp(max=80.0).exp()
    if divergence == "js":
        return math.log(2) + logsigmoid(ratio)
    if divergence == "alpha" and alpha != 1:
        return (((alpha - 1) * ratio).clamp(max=80.0).exp() - 1) / (alpha - 1)
    return ratio
