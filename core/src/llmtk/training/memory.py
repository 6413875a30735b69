"""How much memory a run is going to take on each rank: an estimate, made before anything is trained.

Weights and gradients are counted. An optimizer's state is measured on a small matrix. What a forward pass keeps for its
backward pass is measured on two short sequences, and taken to grow with tokens in a line, as with fused attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from llmtk.batch import Batch, Group, Sequence
from llmtk.training.compiling import layers_of
from llmtk.training.evaluation import eval_mode
from llmtk.training.planning import first_micro_batches

if TYPE_CHECKING:
    from llmtk.run import Run

TOKENS = (16, 48)
"""Lengths of the sequences on which a forward pass is measured."""
SIDE = 256
"""Rows and columns of the matrix on which an optimizer's state is measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes on this rank, by what they are for."""

    weights: int
    """The trained model and the frozen ones."""
    gradients: int
    optimizer: int
    activations: int
    """What the largest micro-batch of the first steps keeps between its forward and its backward pass, casts of weights
    among it. 0 where it is not known, as for a model that is no language model."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(run: Run) -> Memory:
    """Estimate the memory of a run that is set up. All ranks must call it together."""
    trained = [parameter for parameter in run.model.parameters() if parameter.requires_grad]
    models = (run.model, *run.frozen.values())
    return Memory(
        weights=sum(_bytes(model.parameters()) for model in models),
        gradients=_bytes(trained),
        optimizer=_state_of(run, trained),
        activations=_activations(run, tokens=first_micro_batches(run)[1]),
    )


def _state_of(run: Run, trained: list[nn.Parameter]) -> int:
    """Return the bytes of the optimizer's state; ZeRO spreads it in any stage, and beside it a copy of the weights."""
    each, zero = state_bytes(run.optimizer, trained[0]), run.backend.zero
    count = sum(_local(parameter).numel() for parameter in trained)
    if zero is None:
        return int(each * count)
    return int((each + torch.float32.itemsize) * (count if zero.spreads_weights else count / run.world_size))


def state_bytes(optimizer: torch.optim.Optimizer, like: torch.Tensor) -> float:
    """Return the bytes of state for each weight, measured on a step of an optimizer like this one over one matrix.

    0 for one that cannot be made again from its settings, or wants more than a gradient.
    """
    kind = type(optimizer)
    probe = nn.Parameter(torch.zeros(SIDE, SIDE, dtype=like.dtype, device=like.device))
    probe.grad = torch.ones_like(probe)
    settings = {key: value for key, value in optimizer.defaults.items() if key in signature(kind).parameters}
    try:
        twin = kind([probe], **settings)
        twin.step()
    except Exception:  # whatever optimizer a stage builds, the rest of the estimate stands
        return 0.0
    kept = [value for value in twin.state[probe].values() if isinstance(value, torch.Tensor)]
    return _bytes(kept) / probe.numel()


def kept_bytes(run: Run, tokens: int) -> int:
    """Return the bytes that scoring one sequence keeps for its backward pass, the model's weights left out."""
    sequence = Sequence([0] * tokens, [False] + [True] * (tokens - 1))
    batch = Batch.collate([Group([sequence], {})]).to(run.device)
    score = run.score if run.forward.scorers[None].has_logits else run.values
    found: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = _local(tensor).untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    # Without dropout, of which the run's generators would know, and without checkpointing.
    with eval_mode(run.model), saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = score(batch)  # held on to, or a storage might be given out again
    own = {_local(parameter).untyped_storage().data_ptr() for parameter in run.model.parameters()}
    del scores
    return sum(size for place, size in found.items() if place not in own)


def in_words(size: float) -> str:
    """Return a number of bytes for people: `1.2 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _activations(run: Run, tokens: int) -> int:
    short, long = TOKENS
    try:
        few, many = (kept_bytes(run, count) for count in TOKENS)
    except Exception:  # no language model: the rest of the estimate stands
        return 0
    kept = few + (many - few) / (long - short) * (tokens - short)
    layers = len(layers_of(run.model))
    if run.config.train.gradient_checkpointing and layers:
        # Each layer's input, and one layer at a time anew.
        model: Any = run.model
        width = model.config.get_text_config().hidden_size
        kept = kept / layers + layers * tokens * width * run.backend.compute_dtype.itemsize
    return int(max(kept, 0))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(_local(tensor).nbytes for tensor in tensors)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor that this rank holds."""
    held: torch.Tensor = getattr(tensor, "ds_tensor", tensor)  # DeepSpeed's, of a parameter that it has spread
    return held.to_local() if isinstance(held, DTensor) else held
