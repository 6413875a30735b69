"""Proof before use: packed generation says of its tokens what plain scoring does, on the model and on a tiny twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmtk.batch import Batch, Group, Sequence
from llmtk.generation import generate
from llmtk.generation.sampling import Sampling
from llmtk.scoring import packed, padded, proof

if TYPE_CHECKING:
    from torch import nn

    from llmtk.generation.jobs import Together

LENGTHS = (3, 14, 1)
"""Tokens of the prompts; one is longer than the twin's windows."""
SAMPLING = Sampling(n=2, max_new_tokens=12, batch_size=4)
"""Fewer side by side than there are to write, so that some wait."""


def why_not_packed(root: nn.Module, together: Together | None = None) -> str | None:
    """Return why a root that is patched for packed scoring must generate the plain way, or None if it need not.

    The context of autocast is the caller's.
    """
    try:
        twin = proof._twin(packed.causal_model(root)).to(next(root.parameters()).device)
        packed.patch(twin)
        for what, model, keeping in (("a tiny twin of it", twin, None), ("the model", root, together)):
            distance, near = _distance(model, keeping)
            if not distance <= near:
                return f"packed generation's log-probs of {what} are off by {distance:.1e}, more than {near:.0e}"
    except Exception as error:  # a model of a kind never seen must not end the run: it can write the plain way
        return f"packed generation cannot be set up on it ({proof._short(error)})"
    return None


@torch.no_grad()
def _distance(model: Any, together: Together | None) -> tuple[float, float]:
    """Return how far log-probs of generation are from those of plain scoring, and how far they may be."""
    device = next(model.parameters()).device
    prompts = _prompts(model.config.get_text_config())
    answers = generate(model, prompts, SAMPLING, packed=True, together=together)
    groups = [
        Group([Sequence(a.tokens, [True] * len(a.tokens), 0) for a in copies], {}, [prompt])
        for prompt, copies in zip(prompts, answers, strict=True)
    ]
    found = torch.tensor([logp for copies in answers for answer in copies for logp in answer.logps], device=device)
    with proof.evaluating(model):
        expected = padded.score(model, Batch.collate(groups).to(device)).logps
    computed = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    coarsest = max((computed, *(p.dtype for p in model.parameters())), key=proof._coarseness)
    return proof._distance(found, expected), proof.TOLERANCE.get(coarsest, proof.TOLERANCE[torch.bfloat16])[0]


def _prompts(config: Any) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    limit = min(config.vocab_size, 32_000)
    return [torch.randint(min(3, limit - 1), limit, (n,), generator=generator).tolist() for n in LENGTHS]
