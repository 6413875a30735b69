"""The reference: the policy as it is when the run starts, at the least cost that is exact.

A fresh adapter is switched off; a continued one is kept as a second, frozen adapter; anything else is a frozen copy,
whose matrices are held in the dtype that autocast would give them at every use. So an untrained policy and its
reference compute the same numbers, bit by bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmtk.errors import ConfigurationError
from llmtk.models.checks import adapter_folder
from llmtk.models.loading import load_model
from llmtk.models.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase

    from llmtk.config.sections import ModelConfig

KEPT = "reference"
"""The name of the adapter that is kept as the reference."""


def view_of(root: nn.Module, *, continued: bool) -> Callable[[], AbstractContextManager[None]] | None:
    """Return the context in which an adapted root computes as it does now, whatever is trained; None if there is none.

    There is none for a model without an adapter, nor for an adapter that trains its base's biases.
    """
    from peft import PeftModel

    if not isinstance(root, PeftModel) or getattr(root.peft_config["default"], "bias", "none") != "none":
        return None
    if not continued:
        return partial(_adapters, root, {"_disable_adapters": True})
    _keep_adapter(root)
    return partial(_adapters, root, {"_active_adapter": [KEPT]})


def frozen_copy(root: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy that is never trained, its matrices in `dtype` where autocast would cast them at every use."""
    cast = {id(module.weight): weight for module, weight in _cast_matrices(root, dtype)}
    copied: nn.Module = copy.deepcopy(root, memo=dict(cast))
    return copied.requires_grad_(False).eval()


def load_reference(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    *,
    is_other: bool = True,
) -> nn.Module:
    """Load the model that `model.reference` names, frozen, as the policy's own copy would be.

    `dtype` is that of the policy's weights. ConfigurationError for another vocabulary than the policy's, unless it is
    no other model but the one that the policy started from.
    """
    own = config.model_copy(
        update={"name_or_path": config.reference, "reference": None, "from_config": None, "tokenizer": None,
                "revision": None, "dtype": str(dtype).removeprefix("torch.")}
    )  # fmt: skip
    ours = tokenizer.get_vocab()
    if is_other and (theirs := load_tokenizer(own).get_vocab()) != ours:
        differing = sorted(token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token))
        raise ConfigurationError(
            f"model.reference: {config.reference} has another vocabulary than the policy ({len(theirs):,} tokens "
            f"against {len(ours):,}; {len(differing):,} differ, {differing[0]!r} among them), and so other log-probs. "
            "Give a model of the policy's family"
        )
    model: nn.Module = load_model(own, tokenizer, trainable=False, compute_dtype=compute_dtype)
    for module, weight in _cast_matrices(model, compute_dtype):
        module.weight = weight
    return model


def is_continued(config: ModelConfig) -> bool:
    """Whether the policy is an adapter that was trained before."""
    return adapter_folder(config.name_or_path) is not None


def _cast_matrices(root: nn.Module, dtype: torch.dtype) -> list[tuple[Any, nn.Parameter]]:
    """Return linear layers with their weights cast; not those tied to embeddings: autocast leaves lookups alone."""
    from transformers.pytorch_utils import Conv1D

    if dtype == torch.float32:
        return []
    owners = Counter(id(weight) for module in root.modules() for weight in module._parameters.values())
    linear: list[Any] = [module for module in root.modules() if type(module) in (nn.Linear, Conv1D)]
    return [
        (module, nn.Parameter(module.weight.detach().to(dtype), requires_grad=False))
        for module in linear
        if owners[id(module.weight)] == 1 and module.weight.dtype == torch.float32
    ]


def _keep_adapter(root: Any) -> None:
    """Put a frozen copy of the adapter beside it."""
    root.add_adapter(KEPT, copy.deepcopy(root.peft_config["default"]))
    parameters = dict(root.named_parameters())
    for name, parameter in parameters.items():
        if f".{KEPT}." in name:
            parameter.requires_grad_(False)
            parameter.data = parameters[name.replace(f".{KEPT}.", ".default.")].detach().clone()


@contextmanager
def _adapters(root: nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """Set every adapter's state for a while.

    Not by peft's own contexts, which switch `requires_grad` on and off and with it what a wrapper has looked at.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers: list[Any] = [m for m in root.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    before = [{name: getattr(layer, name) for name in state} for layer in layers]
    for layer in layers:
        vars(layer).update(state)
    try:
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            vars(layer).update(values)
