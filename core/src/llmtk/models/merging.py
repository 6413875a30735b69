"""An adapter made part of its base: one model, which needs neither peft nor the base's folder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llmtk.errors import ConfigurationError
from llmtk.models.errors import quietly

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge_adapter(model: PeftModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the base with its adapter merged into the weights. The model given is used up.

    Args:
        model: The adapter on its base, whose weights are not quantised.
        dtype: What the merged weights are rounded to, once. By default the base's own. They are added up in float32
            at least: in bfloat16 an adapter's small updates would be rounded twice.

    Raises:
        ConfigurationError: The base is quantised: merging would round the adapter away.
    """
    base: Any = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ConfigurationError(
            "the adapter's base is quantised, and merging would round the adapter away with the weights. Merge it into "
            "the model as it was before it was quantised"
        )
    dtype = dtype or base.dtype
    adapted: Any = model.to(torch.promote_types(dtype, torch.float32))
    _untie(base)
    with quietly():
        merged = adapted.merge_and_unload()
    return cast("PreTrainedModel", merged.to(dtype))


def _untie(base: Any) -> None:
    """Give embeddings and head weights of their own where an adapter changes one of them: peft merges in place.

    It takes note in the configuration of weights that are no longer tied.
    """
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        layer = getattr(module, "base_layer", None)
        if layer is not None:
            layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
