"""Models written to a folder, and read back from one: what is written loads with ``from_pretrained``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtk.config.sections import ModelConfig
from llmtk.models.checks import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    NAMED,
    base_of,
    base_revision_of,
    check_safetensors,
    is_hub_name,
    resolve,
)
from llmtk.models.errors import loading, quietly
from llmtk.models.loading import (
    check_finite,
    fit_embeddings,
    head_of,
    head_of_adapter,
    pretrained,
    set_padding,
)
from llmtk.models.merging import merge_adapter
from llmtk.models.tokenizers import load_tokenizer
from llmtk.seeding import seeded

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtk.contract import Head


def save_model(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    weights: dict[str, Tensor] | None = None,
    max_shard_size: str | None = None,
) -> None:
    """Write the model, or its adapter alone, with tokenizer, chat template and generation config.

    A full model loads with ``AutoModelForCausalLM.from_pretrained(path)``, an adapter with
    ``AutoPeftModelForCausalLM``, as long as its base stays where it is: the adapter records it by its absolute path.
    One with a head of one value loads with ``AutoModelForSequenceClassification``, an adapter on it with
    ``AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=1)``.

    ``weights`` are the model's by name, where it holds parts of them alone. A full model's are written to files of at
    most ``max_shard_size`` bytes (``2GB``), by default to one.

    Raises:
        OSError: The folder cannot be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    for config in getattr(model, "peft_config", {}).values():
        config.base_model_name_or_path = _absolute(config.base_model_name_or_path)
        if isinstance(config.target_modules, set):  # written in an order that changes from process to process
            config.target_modules = sorted(config.target_modules)
    # An adapter kept as the reference is not what was trained.
    how: dict[str, Any] = {"selected_adapters": ["default"]} if hasattr(model, "peft_config") else {}
    with quietly():
        model.save_pretrained(
            folder,
            **how,
            **({} if weights is None else {"state_dict": weights}),
            **({"max_shard_size": max_shard_size} if max_shard_size else {}),
        )
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "tokenizer_config.json", file)  # safetensors lets none but their owner read them


def save_merged(adapter: Path, path: Path, like: ModelConfig) -> None:
    """Merge a saved adapter into its base, as that is saved, and write the full model, which needs neither.

    Not into the weights that were trained on, which the run still needs, and which may be quantised. `like` is as for
    `load_folder`.

    Raises:
        ModelLoadError: The base is gone.
        OSError: The folder cannot be written.
    """
    model, tokenizer = _load_adapter(adapter, like.model_copy(update={"quantization": None}))
    save_model(merge_adapter(model), tokenizer, path)


def load_folder(
    path: str | Path,
    like: ModelConfig | None = None,
    compute_dtype: torch.dtype = torch.float32,
    key: str = NAMED,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load what ``save_model`` wrote. This is ``llmtk.load``, which says more.

    Args:
        path: The folder.
        like: How: with which attention, with code of its own, and an adapter's base quantised. A run's own section.
        compute_dtype: What quantised weights are multiplied in.
        key: What errors call the key that names it.
    """
    folder, like = Path(resolve(str(path))), like or ModelConfig()
    if (folder / ADAPTER_CONFIG).is_file():
        return _load_adapter(folder, like, compute_dtype, key)
    return _load_full(str(path), like.model_copy(update={"quantization": None, "revision": None}), key=key)


def _load_full(
    name: str,
    like: ModelConfig,
    tokenizer_name: str | None = None,
    head: Head | None = None,
    compute_dtype: torch.dtype = torch.float32,
    key: str = NAMED,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = like.model_copy(
        update={"name_or_path": name, "tokenizer": tokenizer_name, "from_config": None, "reference": None}
    )
    tokenizer = load_tokenizer(config, key=key)
    with seeded(0):
        model = pretrained(config, "auto", head or head_of(config), compute_dtype)
        fit_embeddings(model, tokenizer)
    set_padding(model, tokenizer)
    return model.eval(), tokenizer


def _load_adapter(
    folder: Path, like: ModelConfig, compute_dtype: torch.dtype = torch.float32, key: str = NAMED
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    from peft import PeftModel
    from transformers import GenerationConfig

    check_safetensors(folder / ADAPTER_WEIGHTS)
    own_tokenizer = str(folder) if (folder / "tokenizer_config.json").is_file() else None
    name = base_of(folder)
    revision = (like.revision or base_revision_of(folder)) if is_hub_name(name) else None
    like = like.model_copy(update={"revision": revision})
    base, tokenizer = _load_full(name, like, own_tokenizer, head_of_adapter(folder), compute_dtype, key)
    with loading(f"the adapter {folder}"), quietly():
        model = PeftModel.from_pretrained(base, folder)
    check_finite(model, str(folder))
    if (folder / "generation_config.json").is_file():
        base.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), tokenizer


def _absolute(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name
