"""The plain way to score: sequences padded to the longest, each with its whole prefix, logits for all of them.

It is right for every causal model of transformers, and so the measure of every faster way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtk.scoring.scores import Scores, checked

if TYPE_CHECKING:
    from llmtk.batch import Batch

Forward = Callable[..., Any]
"""The wrapped root, or anything that is called like a causal model of transformers and returns `.logits`."""


def score(root: Forward, batch: Batch, also: Iterable[str] = (), temperature: float = 1.0) -> Scores:
    """Score every target token of the batch. ValueError for an unknown name in `also`."""
    wanted = checked(also)
    logits = target_logits(root, batch).float()
    if temperature != 1.0:
        logits = logits / temperature
    targets = batch.target_tokens
    extras: dict[str, Tensor] = {}
    if wanted & {"entropy", "vocab_mean", "square_sum"}:
        all_logps = logits.log_softmax(-1)
        logps = all_logps.gather(-1, targets[:, None]).squeeze(-1)
        if "entropy" in wanted:
            extras["entropy"] = -(all_logps.exp() * all_logps).sum(-1)
        if "vocab_mean" in wanted:
            extras["vocab_mean"] = all_logps.mean(-1)
        if "square_sum" in wanted:
            extras["square_sum"] = (2 * all_logps.detach()).exp().sum(-1)
    else:
        logps = -F.cross_entropy(logits, targets, reduction="none")
    if "logsumexp" in wanted:
        extras["logsumexp"] = logits.logsumexp(-1)
    if "top1" in wanted:
        extras["top1"] = logits.detach().argmax(-1) == targets
    if "values" in wanted:
        from llmtk.scoring import values

        extras["values"] = values.padded(root, batch)
    return Scores(batch, logps, **extras)


def map_logits(root: Forward, batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor] = ()) -> Tensor:
    """Return `fn(logits (targets, vocabulary), *columns (targets, ...))`, whose first dimension must be targets."""
    return fn(target_logits(root, batch).float(), *columns)


def target_logits(root: Forward, batch: Batch) -> Tensor:
    """Return the logits that predict each target: (targets, vocabulary)."""
    ids, mask, positions = padded_rows(batch)
    logits: Tensor = root(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    # Where every position is scored (blocks of text), a copy of all logits is saved.
    return logits if len(positions) == len(logits) else logits.index_select(0, positions)


def padded_rows(batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return (input ids (sequences, longest), their mask or None, index of each target's prediction (targets,))."""
    ids, lengths, positions = _pad(batch)
    padded = bool((lengths != ids.shape[1]).any())
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long() if padded else None
    return ids, mask, positions


def _pad(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return (input ids (sequences, longest), lengths (sequences,), index of each target's logits (targets,)).

    A sequence's last token predicts nothing, so it is not fed: n + 1 tokens need n positions of the model. A single
    token is, since models take no row without any.
    """
    segments = torch.split(batch.tokens, batch.segment_lengths.tolist())
    prefixes = batch.segment_prefix.tolist()
    rows = [
        torch.cat([segments[prefix], segment]) if prefix >= 0 else segment
        for segment, prefix in zip(segments, prefixes, strict=True)
        if prefix != -2
    ]
    rows = [row[: max(len(row) - 1, 1)] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)
    starts = (batch.segment_lengths[batch.segment_prefix.clamp(min=0)] * (batch.segment_prefix >= 0))[batch.is_sequence]
    own = batch.segment_lengths[batch.is_sequence]
    row = torch.arange(len(own), device=ids.device)
    offset = torch.arange(len(batch.tokens), device=ids.device) - batch.segment_starts.repeat_interleave(
        batch.segment_lengths
    )
    sequence = batch.target_sequence
    return ids, lengths, row[sequence] * ids.shape[1] + starts[sequence] + offset[batch.targets] - 1
