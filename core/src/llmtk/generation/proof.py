"""Proof before use: packed generation says of its tokens what plain scoring does, on the model and on a tiny twin."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from llmtk.batch import Batch, Group, Sequence
from llmtk.generation import generate
from llmtk.generation.sampling import Sampling
from llmtk.scoring import packed, padded, proof

if TYPE_CHECKING:
    from torch import nn

    from llmtk.generation.graphs import Record
    from llmtk.generation.jobs import Together

LENGTHS = (3, 14, 1, 6)
"""Tokens of the prompts; one is longer than the twin's windows."""
SAMPLING = Sampling(n=2, max_new_tokens=12, batch_size=4)
"""Fewer side by side than there are to write, so that some wait."""
STOPS = 8
"""One token in so many ends a completion, so that some leave while others go on."""


def why_not_packed(root: nn.Module, together: Together | None = None, record: Record | None = None) -> str | None:
    """Return why a root that is patched for packed scoring must generate the plain way, or None if it need not.

    With `record`, why steps are not to be replayed. The context of autocast is the caller's; the twin computes in
    float32, where less is a fault.
    """
    try:
        device = next(root.parameters()).device
        twin = proof._twin(packed.causal_model(root)).to(device)
        packed.patch(twin)
        with torch.autocast(device.type, enabled=False):
            far = _too_far(twin, "a tiny twin of it", record=record)
        return far or _too_far(root, "the model", together, record)
    except Exception as error:  # a model of a kind never seen must not end the run: it can write the plain way
        return f"packed generation cannot be set up on it ({proof._short(error)})"


def _too_far(model: nn.Module, what: str, together: Together | None = None, record: Record | None = None) -> str | None:
    """Return by how much log-probs are off, if it is more than precision explains."""
    distance, near = _distance(model, together, record)
    if distance <= near:
        return None
    return f"packed generation's log-probs of {what} are off by {distance:.1e}, more than {near:.0e}"


@torch.no_grad()
def _distance(model: Any, together: Together | None, record: Record | None) -> tuple[float, float]:
    """Return how far log-probs of generation are from those of plain scoring, and how far they may be.

    That is relative to those of tokens taken at random, as in the proof of scoring: a model may be so sure of what it
    writes that its log-probs are nothing but rounding.
    """
    device, config = next(model.parameters()).device, model.config.get_text_config()
    prompts = _prompts(config)
    sampling = replace(SAMPLING, stop_tokens=tuple(range(0, config.vocab_size, STOPS)))
    answers = generate(model, prompts, sampling, packed=True, record=record, together=together)
    groups = [
        Group([Sequence(a.tokens, [True] * len(a.tokens), 0) for a in copies], {}, [prompt])
        for prompt, copies in zip(prompts, answers, strict=True)
    ]
    found = torch.tensor([logp for copies in answers for answer in copies for logp in answer.logps], device=device)
    with proof.evaluating(model):
        expected = padded.score(model, Batch.collate(groups).to(device)).logps
    computed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    coarsest = max((computed, *(p.dtype for p in model.parameters())), key=proof._coarseness)
    distance = proof._distance(found, expected, floor=math.log(config.vocab_size) * len(expected) ** 0.5)
    return distance, proof.TOLERANCE.get(coarsest, proof.TOLERANCE[torch.bfloat16])[0]


def _prompts(config: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    limit = min(config.vocab_size, 32_000)
    return [torch.randint(min(3, limit - 1), limit, (n,), generator=generator).tolist() for n in LENGTHS]
