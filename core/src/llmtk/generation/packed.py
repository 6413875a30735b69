"""The fast way to generate: packed rows through the patched model, a prompt's keys and values shared by its copies.

Each prompt is computed once. Sequences that end leave at once, and waiting ones take their place. One autocast context
around it all casts each weight once, not at every token.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtk.generation.cache import Cache, Prefill, Step
from llmtk.generation.completions import Completion, Segment
from llmtk.generation.graphs import Replayed
from llmtk.generation.sampling import choose
from llmtk.scoring.head import HeadShape, shaped
from llmtk.scoring.packed import TASK, Task

if TYPE_CHECKING:
    from llmtk.generation.graphs import Record
    from llmtk.generation.jobs import Job, Jobs

PREFILL_TOKENS = 4096
"""Tokens of prompts that are computed at a time, about."""


@dataclass
class Row:
    """A sequence that is being written."""

    job: Job
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


class Writer:
    """Writes the completions of some jobs with a model whose causal part is patched.

    `record` records steps, where they can be replayed (`llmtk.generation.graphs`).
    """

    def __init__(self, model: nn.Module, jobs: Jobs, record: Record | None = None) -> None:
        self.model, self.jobs = model, jobs
        self.device = next(model.parameters()).device
        # Long prompts first: what does not fit into memory shows at once, and prompts side by side are of like length.
        self.waiting = deque(sorted(jobs.all, key=lambda job: -len(job.prompt_tokens)))
        self.rows: list[Row] = []
        self.cache = Cache()
        self.replayed = Replayed(self.cache, self._forward, self.device, record) if record else None
        self.first_logits: dict[int, Tensor] = {}
        """By prompt that the cache keeps, the logits (vocabulary,) of what follows it."""
        self.places: dict[int, int] = {}
        """By prompt, where the cache keeps it."""
        self.done: dict[int, Completion] = {}

    def write(self) -> dict[int, Completion]:
        """Return each job's completion, by number. With `jobs.together`, all ranks run as many forwards."""
        while self.jobs.anyone(bool(self.waiting or self.rows)):
            if not (self.waiting or self.rows):
                self._keep_step()
            elif self.waiting and self._has_room():
                self._admit()
            else:
                self._advance()
        return self.done

    def _has_room(self) -> bool:
        """Whether to let sequences in: a prefill is worth its while for several at a time."""
        free = self.jobs.sampling.batch_size - len(self.rows)
        return not self.rows or free >= min(len(self.waiting), max(1, self.jobs.sampling.batch_size // 4))

    def _admit(self) -> None:
        """Let waiting sequences in: prompts that are new are computed, and every sequence gets its first token."""
        free, tokens = self.jobs.sampling.batch_size - len(self.rows), 0
        jobs: list[Job] = []
        new: list[int] = []
        while self.waiting and len(jobs) < free and tokens < PREFILL_TOKENS:
            job = self.waiting.popleft()
            jobs.append(job)
            if job.prompt not in self.places and job.prompt not in new:
                new.append(job.prompt)
                tokens += len(job.prompt_tokens)
        self._prefill(new)
        logits = torch.stack([self.first_logits[job.prompt] for job in jobs])
        self.cache.add_sequences([self.places[job.prompt] for job in jobs])
        rows = [Row(job) for job in jobs]
        self.rows += rows
        self._write(rows, logits)

    def _prefill(self, prompts: list[int]) -> None:
        """Compute new prompts. With none there is a forward all the same where ranks keep step."""
        if not prompts:
            if self.jobs.together is not None:
                self._keep_step()
            return
        prefill = Prefill.of_prompts([self.jobs.prompts[prompt] for prompt in prompts], self.device)
        self.first_logits |= zip(prompts, self._forward(prefill), strict=True)
        self.places |= zip(prompts, self.cache.add_prompts(prefill), strict=True)

    def _forget_prompts(self) -> None:
        """Let prompts go that no sequence continues any more, when they are half of all: it copies the others."""
        needed = {row.job.prompt for row in self.rows} | {job.prompt for job in self.waiting}
        kept = [prompt for prompt in self.places if prompt in needed]
        if 2 * len(kept) <= len(self.places):
            self.cache.keep_prompts([self.places[prompt] for prompt in kept])
            self.places = {prompt: place for place, prompt in enumerate(kept)}
            self.first_logits = {prompt: self.first_logits[prompt] for prompt in kept}

    def _advance(self) -> None:
        """Write one more token of every sequence."""
        tokens = [row.tokens[-1] for row in self.rows]
        logits = self.replayed(tokens) if self.replayed else self._forward(Step(self.cache, tokens, self.device))
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        self._write(self.rows, logits)

    def _write(self, rows: list[Row], logits: Tensor) -> None:
        """Choose the rows' next tokens from their logits (rows, vocabulary), and take out those that end."""
        uniform = torch.from_numpy(np.array([row.job.uniform[len(row.tokens)] for row in rows]))
        before = self.jobs.before((row.job, row.tokens) for row in rows)
        tokens, logps = choose(logits, uniform.to(logits.device), self.jobs.sampling, before)
        for row, token, logp in zip(rows, tokens.tolist(), logps.tolist(), strict=True):
            row.tokens.append(token)
            row.logps.append(logp)
            if ends := self.jobs.ending(row.job, row.tokens):
                segment = Segment(row.tokens, row.logps, version=self.jobs.version)
                self.done[row.job.number] = Completion((segment,), ends)
        ended = [slot for slot, row in enumerate(self.rows) if row.job.number in self.done]
        self.cache.remove(ended)
        for slot in reversed(ended):
            self.rows[slot] = self.rows[-1]
            self.rows.pop()
        if ended:
            self._forget_prompts()

    def _keep_step(self) -> None:
        """Run a forward that nobody looks at, while other ranks write."""
        self._forward(Prefill.of_prompts([[0]], self.device))

    def _forward(self, layout: Prefill | Step) -> Tensor:
        """Return the logits (predictors, vocabulary) of a packed row."""

        def of(hidden: Tensor, head: Any, shape: HeadShape) -> dict[str, Tensor]:
            # A CPU's kernels for bfloat16 are twice as fast with the larger matrix on the left.
            logits = (head.weight @ hidden.mT).mT.float()
            return {"logits": shaped(logits if head.bias is None else logits + head.bias, shape)}

        output = self.model(input_ids=layout.ids, **{TASK: Task(layout, of)})
        logits: Tensor = output["logits"]
        return logits
