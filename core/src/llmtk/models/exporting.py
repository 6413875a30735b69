"""A finished run's model, written for others: merged, cast, sharded, quantised."""

from __future__ import annotations

import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtk.config.sections import ModelConfig
from llmtk.errors import ConfigurationError, LlmtkError
from llmtk.folder import RunFolder
from llmtk.models.checks import ADAPTER_CONFIG

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD = "README.md"
_SIZE = re.compile(r"[0-9]+[KMGT]B")
Quantization = Literal["4bit", "8bit"]


def export(
    run: str | Path,
    output: str | Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    max_shard_size: str | None = None,
    quantize: Quantization | None = None,
) -> Path:
    """Write the model of a finished run to a folder of its own, with tokenizer, chat template and generation config.

    The folder appears when it is complete. It loads with transformers alone; where an adapter is not merged, with peft
    and its base.

    Args:
        run: The run's folder.
        output: A folder that is not there yet, or is empty.
        merge: Merge the adapter into its base.
        dtype: float32, bfloat16 or float16. By default what the model is saved in.
        max_shard_size: Bytes of a file of weights, at most, such as 2GB.
        quantize: Quantise the weights, by bitsandbytes.

    Raises:
        ConfigurationError: There is no such run, it has not finished, or the options do not go with its model.
        ModelLoadError: The model is damaged, or its adapter's base is gone.
        LlmtkError: The folder cannot be written.
    """
    source, target = Path(run), Path(output)
    like = _finished(source)
    _check_options(source, merge=merge, dtype=dtype, max_shard_size=max_shard_size, quantize=quantize)
    _check_free(target)
    from safetensors import SafetensorError

    from llmtk.models.saving import save_model

    whole = target.resolve()
    aside = whole.with_name(f".{whole.name}.writing")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        model, tokenizer = _loaded(source, like, merge=merge, dtype=dtype)
        save_model(model, tokenizer, aside, max_shard_size=max_shard_size)
        if quantize:
            save_model(_quantized(like, aside, quantize, model.dtype), tokenizer, aside, max_shard_size=max_shard_size)
        _write_card(source, aside, merged=merge)
        aside.rename(whole)
    except (OSError, SafetensorError) as error:
        raise LlmtkError(f"{target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _finished(source: Path) -> ModelConfig:
    """Return how the run loaded its model, but for quantisation: what is written is rounded as the options say."""
    if not source.is_dir():
        raise ConfigurationError(f"{source}: there is no such run. `llmtk runs list` lists those there are")
    like = ModelConfig.model_validate(RunFolder(source).finished().get("model") or {})
    return like.model_copy(update={"quantization": None})


def _check_options(
    source: Path, *, merge: bool, dtype: str | None, max_shard_size: str | None, quantize: Quantization | None
) -> None:
    is_adapter = (source / ADAPTER_CONFIG).is_file()
    if merge and not is_adapter:
        raise ConfigurationError(f"--merge: {source} holds a full model, which has no adapter to merge. Leave it out")
    asked = {"--dtype": dtype, "--max-shard-size": max_shard_size, "--quantize": quantize}
    for option, value in asked.items():
        if value and is_adapter and not merge:
            raise ConfigurationError(f"{option} is for full models, and {source} holds an adapter. Add --merge")
    if max_shard_size:
        _check_size(max_shard_size)
    if quantize and find_spec("bitsandbytes") is None:
        raise ConfigurationError(
            f"--quantize {quantize} needs bitsandbytes, which is not installed: pip install 'llmtk-core[quantization]'"
        )


def _check_size(size: str) -> None:
    if not _SIZE.fullmatch(size) or not any(digit in size for digit in "123456789"):
        raise ConfigurationError(f"--max-shard-size {size}: expected a size such as 500MB or 2GB")


def _check_free(target: Path) -> None:
    if target.is_file():
        raise ConfigurationError(f"--output {target} is a file, not a folder. Choose another")
    if target.is_dir() and any(target.iterdir()):
        raise ConfigurationError(f"--output {target} holds files. Give a folder that is empty, or not there yet")
    if blocking := next((parent for parent in target.parents if parent.is_file()), None):
        raise ConfigurationError(f"--output {target}: {blocking} is a file, not a folder. Choose another")


def _loaded(source: Path, like: ModelConfig, *, merge: bool, dtype: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    import torch

    from llmtk.models.merging import merge_adapter
    from llmtk.models.saving import load_folder

    model: Any
    model, tokenizer = load_folder(source, like)
    wanted = getattr(torch, dtype) if dtype else None
    if merge:
        return merge_adapter(model, wanted), tokenizer
    return (model if wanted is None else model.to(wanted)), tokenizer


def _write_card(source: Path, folder: Path, *, merged: bool) -> None:
    """Let the run's card go along; that of an adapter says that peft loads it, which is over once it is merged."""
    if not (source / CARD).is_file():
        return
    text = (source / CARD).read_text(encoding="utf-8")
    if merged:
        text = text.replace("library_name: peft\n", "library_name: transformers\n", 1)
    (folder / CARD).write_text(text, encoding="utf-8")


def _quantized(like: ModelConfig, folder: Path, quantize: Quantization, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model that was written to a folder, quantised as a run would; the folder's own weights are removed."""
    from llmtk.models.loading import head_of, pretrained

    here = {"name_or_path": str(folder), "from_config": None, "revision": None, "quantization": quantize}
    config = like.model_copy(update=here)
    quantized = pretrained(config, "auto", head_of(config), dtype)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return quantized
