"""Heads of one value: found in a model, put beside a language model's own, and asked.

transformers' sequence and token classification models with `num_labels` 1 have one, reward models among them. A
language model can have one beside its own head (`add_head`): the critic of an actor, on the same trunk. Its own forward
never asks it.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmtk.errors import ModelLoadError

if TYPE_CHECKING:
    from collections.abc import Iterator

ADDED = "value_head"
"""What a head is called that stands beside a language model's own."""
HEADS = ("score", "classifier", ADDED)
"""What heads of one value are called: in transformers' classification models, and here."""


def head_of(model: Any) -> nn.Module | None:
    """Return the head of one label that a model has, perhaps trained beside an adapter; None where it has none."""
    for name in HEADS:
        head = getattr(model, name, None)
        plain = getattr(head, "original_module", head)
        if isinstance(head, nn.Module) and isinstance(plain, nn.Linear) and plain.out_features == 1:
            return head
    return None


def find(root: nn.Module) -> Any | None:
    """Return the innermost model of a root that has a trunk and a head of one label, or None.

    PluginError where there are several: which one is meant cannot be told.
    """
    from transformers import PreTrainedModel

    found = [
        module
        for module in root.modules()
        if isinstance(module, PreTrainedModel) and module.base_model is not module and head_of(module) is not None
    ]
    if len(found) > 1:
        raise ModelLoadError(f"the root holds {len(found)} models with a head of one value; one is what values come of")
    return found[0] if found else None


def add_head(root: nn.Module) -> None:
    """Put a head of one value, in float32, beside the head of the language model in a root, perhaps an adapted one.

    Its weight and bias are 0, and so are all values at first. ModelLoadError where there is not one language model
    whose trunk and head can be told apart.
    """
    from llmtk.scoring.packed import CannotPack, causal_model

    try:
        model = causal_model(root)
    except CannotPack as reason:
        raise ModelLoadError(f"{type(root).__name__} can have no value head: {reason}") from reason
    weight = model.get_output_embeddings().weight
    head = nn.Linear(weight.shape[-1], 1, device=weight.device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model.add_module(ADDED, head)


@contextlib.contextmanager
def without_head(root: nn.Module) -> Iterator[None]:
    """Take the head that was added to a root's language model away for a while: it can be saved as what it was."""
    model = find(root)
    assert model is not None
    head = getattr(model, ADDED)
    delattr(model, ADDED)
    try:
        yield
    finally:
        model.add_module(ADDED, head)


def has_language_head(root: nn.Module) -> bool:
    """Say whether anything in a root gives logits over a vocabulary."""
    from transformers import PreTrainedModel

    return any(isinstance(m, PreTrainedModel) and m.get_output_embeddings() is not None for m in root.modules())


def of_states(model: Any, hidden: Tensor) -> Tensor:
    """Return the head's answer (targets,) in float32 to hidden states (targets, width).

    In the head's own dtype, autocast aside: 8 bits are too few to tell good from better.
    """
    head = head_of(model)
    assert head is not None
    dropout = getattr(model, "dropout", None)
    if isinstance(dropout, nn.Module):
        hidden = dropout(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        values: Tensor = head(hidden.to(next(head.parameters()).dtype))
    return values.squeeze(-1).float()
