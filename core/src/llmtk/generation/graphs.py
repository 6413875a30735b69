"""Steps that are recorded once and then replayed: on CUDA a token is one launch, in place of one for each kernel.

What is recorded can change neither its shapes nor its tensors, and a step changes both with every token that is written
and every sequence that ends. So what is recorded is a step with room to spare, and it is recorded anew where that is
used up, or most of it is for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmtk.generation.cache import Cache, Step

Replay = Callable[[], Tensor]
"""Computes again what was recorded, and gives the tensor that it was written to."""
Record = Callable[[Callable[[], Tensor]], Replay]


def on_cuda(compute: Callable[[], Tensor]) -> Replay:
    """Record what a function does on the current device. RuntimeError for what cannot be: what waits for the device."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may load data meanwhile
            output = compute()
    except BaseException:
        torch.cuda.set_stream(before)  # which torch does not where the end of a failed recording fails too
        raise

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class Replayed:
    """Runs the steps of a cache: the first of a shape as it is, which also warms up, the others from a recording."""

    def __init__(self, cache: Cache, run: Callable[[Step], Tensor], device: torch.device, record: Record) -> None:
        self._cache, self._run, self._device, self._record = cache, run, device, record
        self._step: Step | None = None
        self._replay: Replay | None = None

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Return the logits (R, vocabulary) of what follows the sequences' last tokens (R,), until the next call."""
        self._cache.reserve()
        if self._step is None or not self._step.fits(len(tokens)):
            self._replay = None  # its memory is there for the next
            self._step = Step(self._cache, tokens, self._device, spare=True)
            return self._run(self._step)
        self._step.fill(tokens)
        if self._replay is None:
            step = self._step
            self._replay = self._record(lambda: self._run(step))
        return self._replay()[: len(tokens)]
