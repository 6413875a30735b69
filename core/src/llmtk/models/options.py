"""Checks of how a model is used, before it is loaded: what goes together, and what is installed for it."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from llmtk.errors import ConfigurationError, suggest
from llmtk.models.checks import adapter_folder, base_of, is_hub_name, read_config, resolve

if TYPE_CHECKING:
    from llmtk.config.sections import ModelConfig, PeftConfig

_FLASH_PACKAGES = {
    "flash_attention_2": "flash-attn",
    "flash_attention_3": "flash-attn-3",
    "flash_attention_4": "flash-attn-4",
}


def check_options(config: ModelConfig, peft: PeftConfig | None, *, merges: bool, dropout: bool) -> None:
    """Check what is asked of a model that passes ``check_model``, before it is loaded.

    Args:
        config: The run's ``model`` section.
        peft: Its ``peft`` section.
        merges: Whether an adapter is to be merged when the model is exported.
        dropout: Whether dropout stays on.

    Raises:
        ConfigurationError: Options that exclude each other or would have no effect, or that need a package or a
            device that is not here.
    """
    if config.revision:
        _check_revision(config)
    if config.attn_implementation:
        _check_attention(config.attn_implementation)
    if config.quantization:
        _check_quantization(config)
    if peft is not None:
        _check_adapter(config, peft, dropout=dropout)
    _check_trained(config, adapted=peft is not None or adapter_folder(config.name_or_path) is not None, merges=merges)


def _check_revision(config: ModelConfig) -> None:
    name = _base(config)
    if name is None or not is_hub_name(name):
        origin = "built from scratch" if name is None else f"the folder {name}"
        raise ConfigurationError(f"model.revision is for models of the hub's, and this one is {origin}. Leave it out")


def _check_attention(name: str) -> None:
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.utils import is_kernels_available

    from llmtk.scoring.attention import PREFIX

    key = f"model.attn_implementation: {name}"
    if "/" in name:  # a kernel of the hub's
        if not is_kernels_available():
            raise ConfigurationError(f"{key} is a kernel on the hub, which needs another package: pip install kernels")
        return
    # transformers also lists those of paged generation ("paged|sdpa"), and ours, which take packed rows alone.
    known = ["eager", *(n for n in ALL_ATTENTION_FUNCTIONS.valid_keys() if n.isidentifier() and PREFIX not in n)]
    if name not in known:
        raise ConfigurationError(f"{key} is not known.{suggest(name, known)} Known: {', '.join(sorted(known))}")
    if name not in _FLASH_PACKAGES:
        return
    package, problems = _FLASH_PACKAGES[name], []
    if not _is_installed(package) and not is_kernels_available():
        problems.append(f"neither {package} nor kernels is installed (pip install kernels fetches a built one)")
    if not torch.accelerator.is_available():
        problems.append("there is no GPU")
    if problems:
        raise ConfigurationError(f"{key} cannot be used here: {', and '.join(problems)}. Give sdpa, or leave it out")


def _check_quantization(config: ModelConfig) -> None:
    if not _is_installed("bitsandbytes"):
        raise ConfigurationError(
            f"model.quantization: {config.quantization} needs bitsandbytes, which is not installed: "
            "pip install 'llmtk-core[quantization]'"
        )
    if saved := _saved_quantisation(config):
        raise ConfigurationError(
            f"model.quantization: {config.name_or_path} is saved quantised, by {saved}. Leave it out"
        )


def _check_adapter(config: ModelConfig, peft: PeftConfig, *, dropout: bool) -> None:
    if adapter_folder(config.name_or_path):
        raise ConfigurationError(
            "peft: model.name_or_path is an adapter, which is trained on as it is. Leave peft out, or give the folder "
            "of a full model (a merged one, to keep what the adapter has learnt)"
        )
    if config.from_config is not None:
        raise ConfigurationError("peft needs a trained model: model.from_config has random weights. Leave peft out")
    if peft.use_dora and config.quantization == "8bit":
        raise ConfigurationError("peft.use_dora: peft's does not work on 8-bit weights. Give quantization: 4bit")
    if peft.lora_dropout and not dropout:
        raise ConfigurationError(
            f"peft.lora_dropout is {peft.lora_dropout:g}, and all dropout is switched off in this run. Leave it out, "
            "or give train.disable_dropout: false"
        )


def _check_trained(config: ModelConfig, *, adapted: bool, merges: bool) -> None:
    for key in ("train_only", "freeze"):
        if adapted and getattr(config, key) is not None:
            raise ConfigurationError(f"model.{key}: beside an adapter the whole model is frozen. Leave one of them out")
    if merges and not adapted:
        raise ConfigurationError("train.merge_and_save: there is no adapter to merge. Give peft, or leave it out")
    saved = _saved_quantisation(config)
    if (config.quantization or saved) and not adapted:
        how = f"model.quantization: {config.quantization}" if config.quantization else f"{config.name_or_path}: {saved}"
        raise ConfigurationError(
            f"{how}: quantised weights cannot be trained themselves. Train an adapter on them, with peft: {{r: 16}}"
            f"{', or leave quantization out' if config.quantization else ''}"
        )
    if saved and merges:
        raise ConfigurationError(
            f"train.merge_and_save: {config.name_or_path} is saved quantised, by {saved}, and merging would round the "
            "adapter away with the weights. Leave it out, or train on the model as it was before it was quantised"
        )


def _base(config: ModelConfig) -> str | None:
    """Return the name of the model, or of an adapter's base; None for one from scratch."""
    folder = adapter_folder(config.name_or_path)
    return base_of(folder) if folder else config.name_or_path


def _saved_quantisation(config: ModelConfig) -> str | None:
    """Return by what a model folder's weights were quantised when they were saved, if they were."""
    name = _base(config)
    if name is None or is_hub_name(name):
        return None
    settings = read_config(Path(resolve(name))).get("quantization_config")
    return str(settings.get("quant_method", "an unknown method")) if isinstance(settings, dict) else None


def _is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
