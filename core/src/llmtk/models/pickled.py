"""Pickled weights, turned into safetensors: read by torch's loader of tensors alone, which runs no code of the file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from llmtk.errors import ModelLoadError
from llmtk.models.checks import ADAPTER_WEIGHTS, pickled_files
from llmtk.models.errors import summary

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def convert(folder: Path) -> list[Path]:
    """Write a folder's pickled weights as safetensors beside them, a file for each, and return the new files.

    Names, shapes and dtypes stay; a tensor that stands under several names is written once for each. The pickles stay
    too.

    Raises:
        ModelLoadError: There are none, there are safetensors already, or a pickle holds more than tensors by name.
        OSError: The folder cannot be written.
    """
    if not folder.is_dir():
        raise ModelLoadError(f"{folder} is no folder. Give the folder that the weights are in")
    sources = pickled_files(folder)
    if not sources:
        raise ModelLoadError(f"{folder} has no pickled weights: no .bin, .pt or .pth file")
    if there := sorted(file.name for file in folder.glob("*.safetensors")):
        raise ModelLoadError(f"{folder} has {there[0]} already. Nothing is converted; move it away to convert again")
    targets = [folder / name for name in _target_names(folder, sources)]
    index: dict[str, str] = {}
    for source, target in zip(sources, targets, strict=True):
        weights = _tensors(source)
        index |= dict.fromkeys(weights, target.name)
        aside = target.with_name(f".{target.name}.new")
        save_file(weights, aside, {"format": "pt"})
        aside.rename(target)
    if len(targets) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1) + "\n")
    return targets


def _target_names(folder: Path, sources: list[Path]) -> list[str]:
    count, first = len(sources), sources[0].name
    if count == 1:
        return [ADAPTER_WEIGHTS if first.startswith("adapter_model") else WEIGHTS]
    if not first.startswith("pytorch_model"):
        names = ", ".join(source.name for source in sources)
        raise ModelLoadError(
            f"{folder} has several pickles, and which are the weights is not plain: {names}. Keep those"
        )
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _tensors(file: Path) -> dict[str, Tensor]:
    """Return a pickle's tensors by name, each with memory of its own. ModelLoadError for anything else in it."""
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises anything
        raise ModelLoadError(
            f"{file} cannot be read as tensors alone: it is damaged, or holds objects whose code would run when it is "
            f"opened, which llmtk does not do. Convert it where you trust it. torch says: {summary(error, 200)}"
        ) from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ModelLoadError(f"{file} holds no tensors by name, so it is no model's weights")
    return {str(name): tensor.clone().contiguous() for name, tensor in weights.items()}
