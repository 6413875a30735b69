"""NEFTune (arXiv 2310.05914, algorithm 1): uniform noise on the embeddings of what is trained on.

For token t of a sequence of L tokens, in a model of width d:

    e_t + u,    each entry of u drawn from Uniform(-1, 1) * alpha / sqrt(L d)

L is the sequence's own, wherever it lies: neither the length of a packed row nor that of the longest beside it, so that
the noise does not depend on how a batch was cut. A prefix that several sequences share is embedded once in a packed
row, and has the noise of the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtk.errors import ConfigurationError, TrainingError
from llmtk.scoring.packed import TASK

if TYPE_CHECKING:
    from torch import nn

    from llmtk.batch import Batch


class EmbeddingNoise:
    """Adds the noise to what a model's input embeddings give, in a block and nowhere else.

    `generator` gives the generator on the CPU from which each forward's seed is drawn: one number of it, however many
    the device needs. ConfigurationError for a model without input embeddings.
    """

    def __init__(self, model: nn.Module, alpha: float, generator: Callable[[], torch.Generator]) -> None:
        find: Any = getattr(model, "get_input_embeddings", None)
        if find is None:
            raise ConfigurationError("train.neftune_noise_alpha: this model has no input embeddings to put noise on")
        self._alpha = alpha
        self._generator = generator
        self._lengths: Tensor | None = None
        self._heard = False
        find().register_forward_hook(self._add)

    @contextmanager
    def on(self, batch: Batch, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Add noise in the block, which is one forward of this batch. `inputs` are what the root is called with."""
        self._lengths, self._heard = lengths_of(batch, inputs), False
        try:
            yield
        finally:
            self._lengths = None
        if not self._heard:
            raise TrainingError(
                "train.neftune_noise_alpha: the model's forward does not go through its input embeddings. Leave it out"
            )

    def _add(self, module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor | None:
        if self._lengths is None:
            return None
        self._heard = True
        seed = int(torch.randint(2**62, (), generator=self._generator()))
        generator = torch.Generator(embedded.device).manual_seed(seed)
        noise = torch.rand(embedded.shape, generator=generator, device=embedded.device) * 2 - 1
        scale = self._alpha / (self._lengths.to(embedded.device) * embedded.shape[-1]).sqrt()
        return embedded + (noise * scale[..., None]).to(embedded.dtype)


def lengths_of(batch: Batch, inputs: Mapping[str, Any]) -> Tensor:
    """Return L for the tokens of a root's inputs: (1, T) of a packed row, (sequences, 1) of padded ones."""
    host = batch.host
    own, prefix = host.segment_lengths, host.segment_prefix
    continues = prefix >= 0
    whole = own + torch.where(continues, own[prefix.clamp(min=0)], 0)
    if TASK not in inputs:
        return whole[host.is_sequence][:, None]
    whole = whole.scatter_reduce(0, prefix[continues], whole[continues], "amax")
    return whole.repeat_interleave(torch.tensor(inputs[TASK].layout.lengths))[None]
