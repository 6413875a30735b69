"""Training in part: which of a model's own parameters are trained, and which stay as they are."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, cast

from torch import nn

from llmtk.errors import ConfigurationError, suggest
from llmtk.scoring import value_head

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from llmtk.config.sections import ModelConfig


def freeze_parts(model: PreTrainedModel, config: ModelConfig) -> None:
    """Freeze what ``model.train_only`` leaves out, or what ``model.freeze`` names; with neither, nothing.

    Names are matched part by part, anywhere in a parameter's own: ``layers.1`` is in ``model.layers.1.mlp.up_proj``,
    and not in ``model.layers.10``. Weights that are tied are trained if one of their names says so, or frozen if one
    does. A head of one value is trained beside the last layers, since it may be new.

    Raises:
        ConfigurationError: A name that matches nothing, more layers than there are, or nothing left to train.
    """
    key = "train_only" if config.train_only is not None else "freeze"
    asked = getattr(config, key)
    if asked is None:
        return
    patterns = _layer_names(model, key, asked) if isinstance(asked, int) else asked
    if key == "train_only" and isinstance(asked, int):
        patterns = [*patterns, *_value_head_names(model)]
    _check_patterns(model, key, patterns)
    matched = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(_is_in(pattern, name) for pattern in patterns)
    }
    for parameter in model.parameters():
        parameter.requires_grad_((id(parameter) in matched) == (key == "train_only"))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(f"model.{key}: {asked} leaves no parameter to be trained")


def _is_in(pattern: str, name: str) -> bool:
    return fnmatchcase(f".{name}.", f"*.{pattern}.*")


def _layer_names(model: PreTrainedModel, key: str, count: int) -> list[str]:
    """Return the names of the last ``count`` layers (train_only), or of the first (freeze)."""
    stack, total = _layers(model, key)
    if count > total:
        raise ConfigurationError(f"model.{key}: {count} layers are asked for, the model has {total}")
    return [f"{stack}.{index}" for index in (range(total - count, total) if key == "train_only" else range(count))]


def _layers(model: PreTrainedModel, key: str) -> tuple[str, int]:
    """Return the name of the list that the model's layers stand in, and how many there are."""
    total = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    alike = [name for name in stacks if len(cast("nn.ModuleList", model.get_submodule(name))) == total]
    # Not the experts of each layer, of which there may be as many.
    found = [name for name in alike if not any(name.startswith(f"{outer}.") for outer in alike)]
    if total is None or len(found) != 1:
        raise ConfigurationError(
            f"model.{key}: which modules are the layers of {type(model).__name__} is not plain. Give names in place "
            f"of a number; its lists of modules are {', '.join(stacks) or 'none'}"
        )
    return found[0], total


def _value_head_names(model: PreTrainedModel) -> list[str]:
    head = value_head.head_of(model)
    return [] if head is None else [name for name, module in model.named_modules() if module is head]


def _check_patterns(model: PreTrainedModel, key: str, patterns: Iterable[str]) -> None:
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for pattern in patterns:
        if not any(_is_in(pattern, name) for name in names):
            parts = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            near = suggest(pattern, parts)
            raise ConfigurationError(
                f"model.{key}: no parameter's name has {pattern!r} in it.{near} The model's names are made of "
                f"{', '.join(parts)}"
            )
