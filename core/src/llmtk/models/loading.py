"""Models: loaded from a folder or the hub, or built from scratch, ready to be trained."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from llmtk.errors import ConfigurationError, ModelLoadError
from llmtk.models.checks import (
    ADAPTER_CONFIG,
    adapter_folder,
    base_of,
    base_revision_of,
    build_config,
    check_origin,
    is_hub_name,
    resolve,
    where,
)
from llmtk.models.errors import loading, quietly, without_report
from llmtk.models.freezing import freeze_parts
from llmtk.models.tokenizers import stop_token_ids
from llmtk.scoring import value_head
from llmtk.scoring.value_head import HEADS
from llmtk.seeding import seeded

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmtk.config.sections import ModelConfig
    from llmtk.contract import Head


CLASSIFIES = "ForSequenceClassification"
VALUE_TASK = "SEQ_CLS"
"""What peft calls an adapter on such a model."""


def load_model(
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    trainable: bool,
    compute_dtype: torch.dtype,
    frozen_base: bool = False,
    seed: int = 0,
    head: Head = "language",
) -> PreTrainedModel:
    """Load the model, or build it from scratch, with as many embeddings at least as the tokenizer has tokens.

    What ``train_only`` and ``freeze`` say is frozen, if it is trained and no adapter on it.

    Args:
        config: The run's ``model`` section.
        tokenizer: What ``load_tokenizer`` gave for it. Its padding token becomes the model's.
        trainable: Whether the run trains it. If not, it is in eval mode and none of its parameters wants a gradient.
        compute_dtype: What the run computes in: the dtype under ``auto`` of weights that are not trained.
        frozen_base: Whether only an adapter on it is trained. So it is where the name is that of an adapter, which
            comes on its base.
        seed: Draws the weights that are new. torch's global generator stays as it is.
        head: A language model's, or one of one value a token: that which the model has, or a new one (`new_head`).

    Raises:
        ConfigurationError: A combination that cannot be run.
        ModelLoadError: A model that cannot be loaded, lacks weights, or has weights that are not finite.
    """
    check_origin(config)
    adapter = adapter_folder(config.name_or_path)
    if adapter:
        check_task(adapter, head)
        base = {"name_or_path": base_of(adapter), "revision": config.revision or base_revision_of(adapter)}
        config, frozen_base = config.model_copy(update=base), True
    dtype = _weights_dtype(config, compute_dtype, trained=trainable and not frozen_base)
    with seeded(seed):
        if config.from_config:
            model = _from_scratch(config, tokenizer, dtype, head)
        else:
            model = pretrained(config, dtype, head, compute_dtype)
        fit_embeddings(model, tokenizer)
    set_padding(model, tokenizer)
    if adapter:
        model = continue_adapter(model, adapter)
        trained_in_float32(model)
    if not trainable:
        model.requires_grad_(False).eval()
    elif not frozen_base:
        _check_not_quantised(model, config)
        freeze_parts(model, config)
    return model


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the model an embedding for each token. Embeddings to spare stay: they are often there for alignment."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))


def set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make the tokenizer's padding token the model's."""
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
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


def _quantisation(config: ModelConfig, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Return how ``from_pretrained`` is to quantise the weights as they are loaded: all linear layers but the head."""
    if config.quantization is None:
        return {}
    from transformers import BitsAndBytesConfig

    if config.quantization == "8bit":
        # It warns at every product that inputs are cast to float16, which is what 8 bits are multiplied with.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    asked = config.bnb_4bit_compute_dtype
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=compute_dtype if asked == "auto" else getattr(torch, asked),
        )
    }


def _keep_packing(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights anew when a CPU first evaluates with them.

    It does so in place, rounds their scales, and has no gradient for them from then on.
    """
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False


def _check_not_quantised(model: PreTrainedModel, config: ModelConfig) -> None:
    """Refuse a model of the hub's that turns out to be quantised: a folder's is known before it is loaded."""
    if getattr(model, "is_quantized", False):
        raise ConfigurationError(
            f"{config.name_or_path} is saved quantised, and quantised weights cannot be trained themselves. Train an "
            "adapter on them, with peft: {r: 16}"
        )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters are trained, and how many there are; those of 4 bits, two to a byte, count as two."""
    sizes = [(_size(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    # DeepSpeed leaves nothing in a parameter of which this rank holds a part, and says how many there are in all.
    return int(getattr(parameter, "ds_numel", parameter.numel()) if state is None else state.shape.numel())


def pretrained(
    config: ModelConfig,
    dtype: torch.dtype | Literal["auto"],
    head: Head = "language",
    compute_dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Load ``config.name_or_path`` as it is, in ``dtype`` (``auto``: as it was saved), its weights checked.

    With ``config.quantization``, its linear layers are quantised, and multiplied in ``compute_dtype``. A head of one
    value that it lacks is new.

    Raises:
        ModelLoadError: It cannot be loaded, lacks weights, has another head, or weights that are not finite.
    """
    name = str(config.name_or_path)
    had = head_of(config)
    _check_head(name, head, had)
    more: dict[str, Any] = {"num_labels": 1} if head == "value" else {}
    shown = nullcontext() if is_hub_name(name) else quietly()
    with loading(f"the model {where(name)}"), shown, without_report():
        model, info = _auto_class(head).from_pretrained(
            resolve(name),
            revision=config.revision,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **_attention(config),
            **_quantisation(config, compute_dtype),
            **more,
        )
    _keep_packing(model)
    missing = sorted(info["missing_keys"])
    if head == "value" and had == "language":
        missing = [key for key in missing if key.partition(".")[0] not in HEADS]
        new_head(model)
    if missing:
        # transformers would go on with random numbers in their place
        raise ModelLoadError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__}, the first of them {missing[0]}. "
            "It was saved from another kind of model, or not in full"
        )
    check_finite(model, name)
    return cast("PreTrainedModel", model)


def new_head(model: Any) -> None:
    """Draw the weights of a head of one value from a normal distribution of variance 1 / (width + 1), biases 0.

    That is arXiv 2009.01325, appendix B.1: behind a last norm, values begin with a variance near 1.
    """
    head = value_head.head_of(model)
    if head is None:
        raise ModelLoadError(f"{type(model).__name__} has no head of one value that is known here")
    for parameter in head.parameters():
        drawn = torch.randn(parameter.shape) if parameter.ndim == 2 else torch.zeros(parameter.shape)
        parameter.data.copy_(drawn * (parameter.shape[-1] + 1) ** -0.5)


def head_of(config: ModelConfig) -> Head:
    """Return which head the saved model or adapter has. ModelLoadError for a head of several labels."""
    from transformers import AutoConfig

    name = str(config.name_or_path)
    if adapter := adapter_folder(name):
        return head_of_adapter(adapter)
    with loading(f"the model {where(name)}"), quietly():
        saved = AutoConfig.from_pretrained(
            resolve(name), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if not any(str(kind).endswith(CLASSIFIES) for kind in saved.architectures or ()):
        return "language"
    if saved.num_labels != 1:
        raise ModelLoadError(
            f"{name} is a classifier of {saved.num_labels} labels; one that gives a value (a reward) has 1"
        )
    return "value"


def check_task(adapter: Path, head: Head) -> None:
    """Check that a saved adapter is for a model with this head. ModelLoadError where it is not."""
    if (theirs := head_of_adapter(adapter)) != head:
        kinds = {"language": "a language model", "value": "a model with a head of one value (a reward model)"}
        raise ModelLoadError(
            f"{adapter} is an adapter of {kinds[theirs]}, and {kinds[head]} is wanted here. Give one of these, or the "
            "folder of a full model (peft's merge_and_unload makes one of an adapter and its base)"
        )


def head_of_adapter(folder: Path) -> Head:
    """Return which head the model of a saved adapter has."""
    task = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("task_type")
    return "value" if task == VALUE_TASK else "language"


def trained_in_float32(model: nn.Module) -> None:
    """Keep a head of one value that is trained beside an adapter in float32, like the adapter."""
    owner = value_head.find(model)
    if owner is not None:
        head = value_head.head_of(owner)
        assert head is not None
        head.float()


def _check_head(name: str, wanted: Head, had: Head) -> None:
    if wanted == "language" and had == "value":
        raise ModelLoadError(
            f"{name} has a head of one value (it is a reward model, or the like), not a language model's. Give the "
            "language model that it was trained from"
        )


def _auto_class(head: Head) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForCausalLM if head == "language" else AutoModelForSequenceClassification


def _from_scratch(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, head: Head
) -> PreTrainedModel:
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
    built = build_config(fields)
    if head == "value":
        built.num_labels = 1
    with loading(f"model.from_config: a model of type {fields['model_type']}"):
        model = _auto_class(head).from_config(built, dtype=dtype, **_attention(config))
    if head == "value":
        new_head(model)
    else:
        model.generation_config.eos_token_id = stop_token_ids(tokenizer) or None
    return cast("PreTrainedModel", model)
