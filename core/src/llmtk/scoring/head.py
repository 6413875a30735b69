"""The head, fused with the log-prob: logits of targets alone, a tile of the vocabulary at a time, never all at once.

For targets y with hidden states h (targets, width) and the head's weight W (vocabulary, width):

    z = cap(scale (h W^T + b))        logp = z_y - lse(z)        entropy = lse(z) - sum_v p_v z_v

The forward pass keeps `lse` and a few numbers a target; the backward pass computes each tile of z again, forms its
gradient, and at once the tile's share of dh and dW. Tiles are of the vocabulary, so each row of dW is written once.
Products run in the compute dtype, sums over tiles in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TILE_ELEMENTS = 2 * 2**20
"""Logits held at a time, about: 8 MiB in float32, which a CPU's cache holds; larger ones cost it page faults."""


@dataclass(frozen=True)
class HeadShape:
    """What is done to logits: the model multiplies them by `scale`, then caps them at `cap` softly (0: not at all);
    then they are divided by a `temperature`."""

    scale: float = 1.0
    cap: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True)
class HeadScores:
    """Per target (targets,), float32: log-prob; if asked for entropy, mean log-prob over the vocabulary, the sum of
    squared probabilities (no gradient), top-1 and the logarithm of the sum of the logits' exponentials."""

    logps: Tensor
    entropy: Tensor | None = None
    vocab_mean: Tensor | None = None
    square_sum: Tensor | None = None
    top1: Tensor | None = None
    logsumexp: Tensor | None = None


def head_scores(
    hidden: Tensor, head: nn.Linear, targets: Tensor, shape: HeadShape, also: frozenset[str] = frozenset()
) -> HeadScores:
    """Score targets (targets,) from the hidden states (targets, width) that predict them."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        hidden = hidden.to(torch.get_autocast_dtype(device))
    fused: Any = _FusedHead.apply
    logps, *extras = fused(hidden, head.weight, head.bias, targets, shape, also)
    names = ("entropy", "vocab_mean", "square_sum", "top1", "logsumexp")
    return HeadScores(logps, **{name: value for name, value in zip(names, extras, strict=True) if name in also})


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
        shape, also = rest
        rows, vocabulary = len(hidden), len(weight)
        lse = hidden.new_full((rows,), torch.finfo(torch.float32).min, dtype=torch.float32)
        # sum_v p_v log p_v of what was seen so far (lse minus sum_v p_v z_v would cancel); sum_v z_v; sum_v p_v^2; the
        # largest logit, and which it is.
        negentropy, total, squares = torch.zeros_like(lse), torch.zeros_like(lse), torch.zeros_like(lse)
        largest, likeliest = torch.full_like(lse, -torch.inf), torch.zeros_like(targets)
        chosen = torch.zeros_like(lse)
        for start, stop in _tiles(rows, vocabulary):
            logits = _logits(hidden, weight, bias, start, stop, shape)
            new_lse = torch.logaddexp(lse, logits.logsumexp(-1))
            if "entropy" in also:
                shift, log_probability = lse - new_lse, logits - new_lse[:, None]
                negentropy = shift.exp() * (negentropy + shift) + (log_probability.exp() * log_probability).sum(-1)
            if "square_sum" in also:
                squares = (2 * (lse - new_lse)).exp() * squares + (2 * (logits - new_lse[:, None])).exp().sum(-1)
            if "vocab_mean" in also:
                total += logits.sum(-1)
            if "top1" in also:
                value, index = logits.max(-1)
                likeliest = torch.where(value > largest, index + start, likeliest)
                largest = torch.maximum(value, largest)
            here = (targets >= start) & (targets < stop)
            picked = logits.gather(-1, (targets - start).clamp(0, stop - start - 1)[:, None]).squeeze(-1)
            chosen = torch.where(here, picked, chosen)
            lse = new_lse
        entropy = -negentropy
        ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
        ctx.set_materialize_grads(False)  # an entropy that is only looked at costs nothing in the backward pass
        ctx.shape, ctx.also = shape, also
        top1 = likeliest == targets
        ctx.mark_non_differentiable(squares, top1)
        return chosen - lse, entropy, total / vocabulary - lse, squares, top1, lse

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        hidden, weight, bias, targets, lse, entropy = ctx.saved_tensors
        d_logps, d_entropy, d_mean, _, _, d_lse = gradients
        if d_logps is None:
            d_logps = torch.zeros_like(lse)
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32) if wants_hidden else None
        d_weight = torch.empty_like(weight) if wants_weight else None
        d_bias = torch.empty_like(bias) if bias is not None and wants_bias else None
        d_probability = -(d_logps if d_mean is None else d_logps + d_mean)
        if d_lse is not None:
            d_probability += d_lse
        for start, stop in _tiles(len(hidden), len(weight)):
            logits = _logits(hidden, weight, bias, start, stop, ctx.shape)
            log_probability = logits - lse[:, None]
            if d_entropy is None:
                d_logits = log_probability.exp_().mul_(d_probability[:, None])
            else:
                # dH/dz_v = -p_v (log p_v + H)
                d_logits = log_probability.exp()
                d_logits *= d_probability[:, None] - d_entropy[:, None] * (log_probability + entropy[:, None])
            if d_mean is not None:
                d_logits += (d_mean / len(weight))[:, None]
            here = (targets >= start) & (targets < stop)
            column = (targets - start).clamp(0, stop - start - 1)[:, None]
            d_logits.scatter_add_(-1, column, torch.where(here, d_logps, torch.zeros_like(d_logps))[:, None])
            if ctx.shape.cap:
                d_logits *= 1 - (logits * (ctx.shape.temperature / ctx.shape.cap)).square()
            if ctx.shape.scale != ctx.shape.temperature:
                d_logits *= ctx.shape.scale / ctx.shape.temperature
            product = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                d_hidden += product @ weight[start:stop].to(hidden.dtype)
            if d_weight is not None:
                d_weight[start:stop] = product.t() @ hidden
            if d_bias is not None:
                d_bias[start:stop] = d_logits.sum(0)
        return d_hidden if d_hidden is None else d_hidden.to(hidden.dtype), d_weight, d_bias, None, None, None


def _tiles(rows: int, vocabulary: int) -> list[tuple[int, int]]:
    """Cut the vocabulary into equal tiles of about TILE_ELEMENTS logits."""
    tiles = max(1, -(-rows * vocabulary // TILE_ELEMENTS))
    width = -(-vocabulary // tiles)
    return [(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int, shape: HeadShape) -> Tensor:
    """Return a tile of the final logits (targets, stop - start) in float32."""
    logits = (hidden @ weight[start:stop].to(hidden.dtype).t()).float()
    if bias is not None:
        logits += bias[start:stop]
    return shaped(logits, shape)


def shaped(logits: Tensor, shape: HeadShape) -> Tensor:
    """Scale and cap what the head gave, and divide it by the temperature."""
    if shape.scale != 1.0:
        logits = logits * shape.scale
    if shape.cap:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    return logits if shape.temperature == 1.0 else logits / shape.temperature
