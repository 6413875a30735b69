"""The plain way to generate: prompts padded to the longest, and the model's own cache. Right for every causal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llmtk.generation.completions import Completion, Segment
from llmtk.generation.sampling import choose
from llmtk.scoring import router

if TYPE_CHECKING:
    from llmtk.generation.jobs import Job, Jobs


def write(model: nn.Module, jobs: Jobs) -> dict[int, Completion]:
    """Return each job's completion, by number. With `jobs.together`, all ranks run as many forwards."""
    by_length = sorted(jobs.all, key=lambda job: len(job.prompt_tokens))
    done: dict[int, Completion] = {}
    while jobs.anyone(len(done) < len(by_length)):
        done |= _write(model, by_length[len(done) : len(done) + jobs.sampling.batch_size], jobs)
    return done


def _write(model: Any, batch: Sequence[Job], jobs: Jobs) -> dict[int, Completion]:
    """Write some jobs side by side; with none of its own, a rank writes what nobody looks at."""
    device, sampling = next(model.parameters()).device, jobs.sampling
    prompts = [job.prompt_tokens for job in batch] or [[0]]
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    mask = torch.zeros(len(prompts), longest + sampling.max_new_tokens, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
        mask[row, longest - len(prompt) :] = 1
    last_position = int(min(jobs.positions, longest + sampling.max_new_tokens)) - 1
    uniform = torch.from_numpy(np.array([job.uniform for job in batch])).to(device)

    written: list[tuple[list[int], list[float]]] = [([], []) for _ in batch]
    done: dict[int, Completion] = {}
    # A mixture of experts that is asked for its router loss would compute it of the new tokens, with the mask of all.
    quiet = {"output_router_logits": False} if router.is_asked_for(model) else {}
    cache = None
    for position in range(sampling.max_new_tokens):
        end = longest + position
        # A row that has come to its end goes on unseen until the others have; it needs a position that there is.
        positions = (mask[:, :end].cumsum(1) - 1).clamp(min=0, max=last_position)[:, -ids.shape[1] :]
        output = model(
            input_ids=ids,
            attention_mask=mask[:, :end],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **quiet,
        )
        cache = output.past_key_values
        if batch:
            before = jobs.before((job, tokens) for job, (tokens, _) in zip(batch, written, strict=True))
            token, logp = choose(output.logits[:, -1], uniform[:, position], sampling, before)
            _keep(batch, written, done, jobs, token.tolist(), logp.tolist())
            ids = token[:, None]
        else:
            ids = ids[:, -1:]
        if not jobs.anyone(len(done) < len(batch)):
            break
    return done


def _keep(
    batch: Sequence[Job],
    written: Sequence[tuple[list[int], list[float]]],
    done: dict[int, Completion],
    jobs: Jobs,
    tokens: list[int],
    logps: list[float],
) -> None:
    """Add a token to each completion that goes on, and close those that end with it."""
    for job, row, token, logp in zip(batch, written, tokens, logps, strict=True):
        if job.number in done:
            continue
        row[0].append(token)
        row[1].append(logp)
        if ends := jobs.ending(job, row[0]):
            done[job.number] = Completion((Segment(*row, version=jobs.version),), ends)
