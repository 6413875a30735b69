"""Models: loaded from a folder or the hub, or built from scratch, ready to be trained."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from llmtk.errors import ConfigurationError, ModelLoadError
from llmtk.models.checks import adapter_folder, base_of, build_config, check_origin, is_hub_name, resolve, where
from llmtk.models.errors import loading, quietly
from llmtk.models.tokenizers import stop_token_ids

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtk.config.sections import ModelConfig


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: bool,
    compute_dtype: torch.dtype,
    frozen_base: bool = False,
    seed: int = 0,
) -> PreTrainedModel:
    """Load the model, or build it from scratch, with as many embeddings at least as the tokenizer has tokens.

    Args:
        config: The run's ``model`` section.
        tokenizer: What ``load_tokenizer`` gave for it. Its padding token becomes the model's.
        trainable: Whether the run trains it. If not, it is in eval mode and none of its parameters wants a gradient.
        compute_dtype: What the run computes in: the dtype under ``auto`` of weights that are not trained.
        frozen_base: Whether only an adapter on it is trained. So it is where the name is that of an adapter, which
            comes on its base.
        seed: Draws the weights that are new. torch's global generator stays as it is.

    Raises:
        ConfigurationError: A combination that cannot be run.
        ModelLoadError: A model that cannot be loaded, lacks weights, or has weights that are not finite.
    """
    check_origin(config)
    adapter = adapter_folder(config.name_or_path)
    if adapter:
        config, frozen_base = config.model_copy(update={"name_or_path": base_of(adapter)}), True
    dtype = _weights_dtype(config, compute_dtype, trained=trainable and not frozen_base)
    with seeded(seed):
        model = _from_scratch(config, tokenizer, dtype) if config.from_config else pretrained(config, dtype)
        fit_embeddings(model, tokenizer)
    set_padding(model, tokenizer)
    if adapter:
        model = continue_adapter(model, adapter)
    if not trainable:
        model.requires_grad_(False).eval()
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from ``seed`` inside the block, on the CPU, and leave torch's global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reset the GPUs' generators too
        yield


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model an embedding for each token. Embeddings to spare stay: they are often there for alignment."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's padding token the model's."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def continue_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Put a saved adapter on its base, in float32 and to be trained on; what it does not train is frozen.

    Raises:
        ModelLoadError: It does not fit the model, or has weights that are not finite.
    """
    from peft import PeftModel

    with loading(f"the adapter {folder}"), quietly():
        adapted: Any = PeftModel.from_pretrained(model, str(folder), is_trainable=True)
    check_finite(adapted, str(folder))
    return cast("PreTrainedModel", adapted)


def check_finite(model: nn.Module, name: str) -> None:
    """Check that no weight is NaN or infinite.

    Raises:
        ModelLoadError: One is; names the first such tensor.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ModelLoadError(
                f"{name}: {bad:,} of {tensor.numel():,} values of {key} are NaN or infinite. The run that wrote the "
                "model diverged, or the file is damaged: take an earlier checkpoint, or copy it again"
            )


def disable_dropout(model: nn.Module) -> None:
    """Switch all dropout off, in training mode too: dropout modules, and rates that layers read as they run.

    The model's configuration keeps its rates, so that a saved model has them as before.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and "drop" in name:
                setattr(module, name, 0.0)


def _weights_dtype(config: ModelConfig, compute_dtype: torch.dtype, *, trained: bool) -> torch.dtype:
    if config.dtype == "auto":
        return torch.float32 if trained else compute_dtype
    dtype = getattr(torch, config.dtype)
    if trained and dtype == torch.float16:
        raise ConfigurationError(
            "model.dtype: float16 weights cannot be trained, their updates underflow. Use float32 (with train.fp16 "
            "to compute in float16), bfloat16, or an adapter on a float16 base"
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _attention(config: ModelConfig) -> dict[str, Any]:
    return {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}


def pretrained(config: ModelConfig, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """Load ``config.name_or_path`` as it is, in ``dtype`` (``auto``: as it was saved), its weights checked.

    Raises:
        ModelLoadError: It cannot be loaded, lacks weights, or has weights that are not finite.
    """
    from transformers import AutoModelForCausalLM

    name = str(config.name_or_path)
    with loading(f"the model {where(name)}"), nullcontext() if is_hub_name(name) else quietly():
        model, info = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **_attention(config),
        )
    if missing := sorted(info["missing_keys"]):
        # transformers would go on with random numbers in their place
        raise ModelLoadError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__}, the first of them {missing[0]}. "
            "It was saved from another kind of model, or not in full"
        )
    check_finite(model, name)
    return model


def _from_scratch(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    fields = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | (config.from_config or {})
    if fields["vocab_size"] < len(tokenizer):
        raise ConfigurationError(
            f"model.from_config.vocab_size is {fields['vocab_size']}, the tokenizer has {len(tokenizer)} tokens. "
            "Leave it out, and the model gets as many as the tokenizer has"
        )
    with loading(f"model.from_config: a model of type {fields['model_type']}"):
        model = AutoModelForCausalLM.from_config(build_config(fields), dtype=dtype, **_attention(config))
    model.generation_config.eos_token_id = stop_token_ids(tokenizer) or None
    return model
