"""What a forward pass keeps for its backward pass: less than torch would, and the same gradients to the bit.

torch keeps what each operation asks for, by itself. Under autocast each projection that reads a norm keeps a cast of
it, all alike; a norm keeps its input, the scale of each token and the product of both; a gated layer keeps the gate,
what it gates and their product. Here

- of several casts of one tensor the first is kept;
- of a product whose factors are kept anyway nothing is: the backward pass multiplies them again.

That is a third of what a llama layer keeps, for three multiplications. Weights and their casts are left alone: to cast
them again would take as long for few tokens as for many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 19
"""Numbers in a hidden state below which the passes over it are no faster than the Python in here, 3 us for each tensor.

With 2,000 tokens of a width of 256 it gains as much time as it takes; below, it takes up to 7% of a step.
"""
CAST, PRODUCT = "ToCopyBackward0", "MulBackward0"
"""How torch calls their nodes in its graph."""

Again = Callable[[], Tensor]
"""Gives in the backward pass what the forward pass had."""


@contextmanager
def keep_less(device: torch.device, size: int) -> Iterator[None]:
    """Keep less in the block, which is one forward pass with hidden states of this many numbers: tokens times width.

    On a CPU alone: an accelerator would wait for the Python in here.
    """
    if device.type != "cpu" or size < SMALL:
        yield
        return
    casts: dict[Any, Again] = {}
    try:
        with saved_tensors_hooks(partial(_pack, casts), lambda again: again()):
            yield
    finally:
        casts.clear()  # the graph holds on to its hooks, and the backward pass is to let go of layer after layer


def _pack(casts: dict[Any, Again], tensor: Tensor) -> Again:
    """Say how to come by a tensor again. `casts` are those that this forward pass keeps, by what they are casts of."""
    whole = tensor if tensor._base is None else tensor._base
    again = _made_again(casts, whole) if type(whole) is Tensor else None
    if again is None:
        # Not itself: what a node puts out would keep the node, and the node it, for ever.
        return partial(_kept, tensor if tensor.is_leaf else tensor.detach(), tensor._version)
    if tensor is whole:
        return again
    size, stride, offset = tensor.size(), tensor.stride(), tensor.storage_offset()
    return lambda: again().as_strided(size, stride, offset)


def _made_again(casts: dict[Any, Again], tensor: Tensor) -> Again | None:
    """Say how to come by a cast or a product that need not be kept; None for anything else."""
    node: Any = tensor.grad_fn
    if node is None or tensor._version:  # written to, it is no longer what the node put out
        return None
    kind, inputs = node.name(), node.next_functions
    if kind == CAST:
        key = (*inputs[0], tensor.dtype, tensor.stride())
        return casts.setdefault(key, partial(_kept, tensor.detach(), 0))
    # Each factor is kept for the other's gradient, unless it is a product itself.
    if kind == PRODUCT and all(factor is not None and factor.name() != PRODUCT for factor, _ in inputs):
        return lambda: node._saved_self * node._saved_other
    return None


def _kept(tensor: Tensor, version: int) -> Tensor:
    """Return a tensor, if it is as it was. torch does not look: what hooks give is theirs."""
    if tensor._version != version:
        raise RuntimeError(
            f"a {tuple(tensor.shape)} tensor that the backward pass needs was written to after the forward pass read it"
        )
    return tensor
