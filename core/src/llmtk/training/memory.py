"""How much memory a run is going to take on each rank: an estimate, made before anything is trained.

Weights, gradients and casts are counted; an optimizer's state is measured on a small matrix; what a forward pass keeps
for its backward pass goes by Korthikanti et al. (arXiv 2205.05198, equation 1), 34 bytes for each token, layer and
entry of the hidden state at 16 bits, without the attention scores, which fused attention does not keep.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from llmtk.config.sections import TrainConfig

KEPT = 34
"""Bytes that a layer keeps of each token and entry of the hidden state, computing at 16 bits."""
KEPT_BY_CHECKPOINTING = 2
"""The same where activations are computed again: the layer's input."""
SIDE = 256
"""Rows and columns of the matrix on which an optimizer's state is measured."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each rank, by what they are for."""

    weights: int
    """The trained model and the frozen ones, and their casts to the type that is computed in."""
    gradients: int
    optimizer: int
    activations: int
    """What the largest micro-batch keeps between its forward and its backward pass."""

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate(
    root: nn.Module,
    frozen: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    compute_dtype: torch.dtype,
    tokens: int,
    packed: bool,
) -> Memory:
    """Estimate the memory of a run whose largest micro-batch has so many tokens."""
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    wide = [p for p in root.parameters() if p.is_floating_point() and p.itemsize > compute_dtype.itemsize]
    frozen_weights = sum(_bytes(model.parameters()) for model in frozen.values())
    return Memory(
        weights=_bytes(root.parameters()) + frozen_weights + sum(p.numel() for p in wide) * compute_dtype.itemsize,
        gradients=_bytes(trained),
        optimizer=int(state_bytes(optimizer) * sum(parameter.numel() for parameter in trained)),
        activations=_activations(root, config, compute_dtype, tokens, packed),
    )


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of state for each weight, measured on a step of an optimizer like this one over one matrix.

    0 for one that cannot be made again from its settings, or wants more than a gradient.
    """
    kind, like = type(optimizer), optimizer.param_groups[0]["params"][0]
    probe = nn.Parameter(torch.zeros(SIDE, SIDE, dtype=like.dtype, device=like.device))
    probe.grad = torch.ones_like(probe)
    settings = {key: value for key, value in optimizer.defaults.items() if key in signature(kind).parameters}
    try:
        twin = kind([probe], **settings)  # type: ignore[arg-type]
        twin.step()
    except Exception:  # an estimate must not end a run, whatever optimizer a stage builds
        return 0.0
    kept = [value for value in twin.state[probe].values() if isinstance(value, torch.Tensor)]
    return _bytes(kept) / probe.numel()


def in_words(size: float) -> str:
    """Return a number of bytes for people: `1.2 GiB`."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def _activations(root: nn.Module, config: TrainConfig, compute_dtype: torch.dtype, tokens: int, packed: bool) -> int:
    settings: Any = getattr(root, "config", None)
    if not hasattr(settings, "get_text_config"):  # no language model: its layers are not known
        return 0
    text = settings.get_text_config()
    width, layers = getattr(text, "hidden_size", 0), getattr(text, "num_hidden_layers", 0)
    scale = compute_dtype.itemsize / 2
    kept = KEPT_BY_CHECKPOINTING * layers + KEPT if config.gradient_checkpointing else KEPT * layers
    # A padded forward keeps logits, and their gradient, in float32; the fused head goes by tiles.
    logits = 0 if packed else 8 * text.vocab_size
    return int(tokens * (width * kept * scale + logits))


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
