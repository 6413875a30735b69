"""Cheap checks of the ``model`` section, before any data is read and before anything heavy is imported.

A folder's files are judged by their names and headers alone; a hub name is left to the hub, if that can be reached.
"""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, ModelLoadError, suggest
from llmtk.hub import why_unreachable

if TYPE_CHECKING:
    from llmtk.config.sections import ModelConfig

BUILTIN = "builtin"
NAMED = "model.name_or_path"
"""The key that names a run's model."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NOT_WEIGHTS = {"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt"}
_OWN_KEYS = {"dtype", "torch_dtype", "attn_implementation", "trust_remote_code", "revision"}
_ROPE_KEYS = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


def check_model(config: ModelConfig, key: str = NAMED) -> None:
    """Check what can be checked of the ``model`` section without loading a model; ``key`` is what has its name.

    Raises:
        ConfigurationError: No model is named, or ``from_config`` has a type or a field that transformers lacks.
        ModelLoadError: The folder is missing or incomplete, holds pickled, truncated or remote-code weights.
    """
    check_origin(config, key)
    if config.reference:
        _check_named("model.reference", config.reference, trust_remote_code=config.trust_remote_code)
    if isinstance(config.tokenizer, str):
        _check_exists("model.tokenizer", config.tokenizer)
    elif config.tokenizer is not None and config.name_or_path:
        raise ConfigurationError(
            "model.tokenizer: a trained tokenizer gives token ids a new meaning, which name_or_path's weights do not "
            "know. Leave it out (the model has its own), or train from scratch with from_config"
        )
    elif config.tokenizer is None and config.from_config:
        raise ConfigurationError(
            "model.tokenizer: a model from from_config has no tokenizer of its own: give a tokenizer's folder, or "
            "train one on the data with {kind: char}, {kind: byte} or {kind: bpe, vocab_size: 8192}"
        )


def check_origin(config: ModelConfig, key: str = NAMED) -> None:
    """Check where the weights come from: the part of ``check_model`` that is not about the tokenizer."""
    if config.name_or_path:
        _check_named(key, config.name_or_path, trust_remote_code=config.trust_remote_code)
    elif config.from_config is not None:
        build_config(config.from_config)
    else:
        raise ConfigurationError(
            "model: no model is given. Give name_or_path (a folder, a hub name, or builtin) to continue a model, or "
            "from_config ({model_type: llama, hidden_size: 256, ...}) to train one from scratch"
        )


def resolve(name: str) -> str:
    """Return what transformers is to load: a folder for ``builtin`` or a path (``~`` expanded), else the hub name."""
    if name == BUILTIN:
        return str(files("llmtk.demo") / "model")
    folder = Path(name).expanduser()
    return str(folder) if folder.exists() else name


def is_hub_name(name: str) -> bool:
    """Whether the name is left to the hub, because there is no such folder here."""
    return not Path(resolve(name)).exists()


def where(name: str) -> str:
    """Return how an error names a model: with where it was looked for."""
    return f"{name} (no such folder here, so it was looked for on the hub)" if is_hub_name(name) else name


def build_config(fields: dict[str, Any]) -> Any:
    """Return the transformers configuration that ``model.from_config`` describes.

    Raises:
        ConfigurationError: An unknown ``model_type`` or field, or values that the configuration class refuses.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_TYPES

    model_type = fields["model_type"]
    if model_type not in CAUSAL_TYPES:
        near = suggest(str(model_type), CAUSAL_TYPES)
        raise ConfigurationError(
            f"model.from_config.model_type: transformers has no causal language model {model_type!r}.{near}"
        )
    config_class = CONFIG_MAPPING[model_type]
    given = {key: value for key, value in fields.items() if key != "model_type"}
    for key in given:
        _check_field(key, config_class)
    try:
        return config_class(**given)
    except Exception as error:  # each class validates in its own way, with its own types of error
        said = " ".join(str(error).split())
        raise ConfigurationError(f"model.from_config: {config_class.__name__} refuses these values: {said}") from error


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Check that a folder holds a model that can be loaded from safetensors.

    Raises:
        ModelLoadError: A file is missing, damaged or pickled, or the model needs code of its own.
    """
    config = read_config(folder)
    if config.get("auto_map") and not trust_remote_code:
        raise ModelLoadError(
            f"{folder}: its config.json has an auto_map: the model comes with Python code that would run here with "
            "your rights. Read that code; if you trust it, set model.trust_remote_code: true. If transformers itself "
            "knows the architecture, take auto_map out of config.json instead"
        )
    for file in _weight_files(folder):
        check_safetensors(file)


def adapter_folder(name: str | None) -> Path | None:
    """Return the folder if the name is that of one which holds an adapter, and no model."""
    folder = Path(resolve(name)) if name else None
    return folder if folder and (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file() else None


def base_of(folder: Path) -> str:
    """Return the name of the model that an adapter belongs to. ModelLoadError where it does not say, or it is gone."""
    file = folder / ADAPTER_CONFIG
    mend = f"Put the base model's folder into base_model_name_or_path of {file}"
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{file} is damaged: it names no base model. Copy it again") from error
    if not isinstance(base, str):
        raise ModelLoadError(f"{folder} is an adapter that does not say which model it belongs to. {mend}")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise ModelLoadError(f"{folder} is an adapter on {base}, which is not there any more. {mend}")
    return base


def base_revision_of(folder: Path) -> str | None:
    """Return which branch, tag or commit of its base an adapter belongs to, if it says so."""
    revision = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("revision")
    return revision if isinstance(revision, str) else None


def check_safetensors(file: Path) -> None:
    """Check that a safetensors file is as long as its header says. Reads the header alone.

    Raises:
        ModelLoadError: The file is missing, is no safetensors file, or was cut short.
    """
    if not file.is_file():
        raise ModelLoadError(f"{file} is missing: the weights are incomplete. Copy the whole model again")
    try:
        header_end, data_size = _safetensors_layout(file)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{file} is damaged: it has no readable safetensors header. Copy it again") from error
    size = file.stat().st_size
    if size != header_end + data_size:
        raise ModelLoadError(
            f"{file} is damaged: its header promises {header_end + data_size:,} bytes, it has {size:,}. Copy it again"
        )


def _check_named(key: str, name: str, *, trust_remote_code: bool) -> None:
    _check_exists(key, name)
    if folder := adapter_folder(name):
        if not (folder / ADAPTER_WEIGHTS).is_file() and pickled_files(folder):
            raise ModelLoadError(_why_no_weights(folder, ADAPTER_WEIGHTS))
        check_safetensors(folder / ADAPTER_WEIGHTS)
        _check_named(key, base_of(folder), trust_remote_code=trust_remote_code)
    elif not is_hub_name(name):
        check_folder(Path(resolve(name)), trust_remote_code=trust_remote_code)


def _check_exists(key: str, name: str) -> None:
    if is_hub_name(name) and not _HUB_NAME.fullmatch(name):
        raise ModelLoadError(f"{key}: there is no folder {name}. Give a folder that exists, or a hub name (org/name)")
    if is_hub_name(name) and (reason := why_unreachable("model", name)):
        raise ModelLoadError(f"{key}: there is no folder {name}, and {reason}. Check the name, or the network")


def _check_field(key: str, config_class: Any) -> None:
    if key in _OWN_KEYS:
        raise ConfigurationError(f"model.from_config.{key}: give it one level up, as model.{key}")
    known = _known_fields(config_class)
    if key not in known:
        raise ConfigurationError(
            f"model.from_config.{key}: {config_class.__name__} has no such field.{suggest(key, known)}"
        )


def _known_fields(config_class: Any) -> set[str]:
    # transformers takes any keyword in silence; these are the ones that mean something to this class.
    fields = set(getattr(config_class, "__dataclass_fields__", {})) | set(config_class.attribute_map)
    known = {name for name in fields if not name.startswith("_")}
    return known | _ROPE_KEYS if "rope_parameters" in known else known


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that a model's folder holds. ModelLoadError where there is none, or it is damaged."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelLoadError(f"{folder} is no model: {_why_no_config(folder)}")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}. Copy it again") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{file} is no model's configuration: it holds a {type(config).__name__}. Copy it again")
    return config


def _why_no_config(folder: Path) -> str:
    if folder.is_file():
        return "it is a file. Give the folder that holds config.json and model.safetensors"
    if (folder / "run.json").is_file():
        return "it is the folder of a run that has not finished. Finish it with --resume, or give another folder"
    return "it has no config.json. Give a folder written by save_pretrained"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file() and not single.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelLoadError(f"{index} is damaged: it has no weight_map. Copy it again") from error
        return [folder / shard for shard in sorted(shards)]
    if single.is_file():
        return [single]
    raise ModelLoadError(_why_no_weights(folder))


def pickled_files(folder: Path) -> list[Path]:
    """Return the files of a folder that look like pickled weights; only transformers' or peft's, if it has any."""
    found = sorted(
        file for file in folder.iterdir() if file.suffix in {".bin", ".pt", ".pth"} and file.name not in _NOT_WEIGHTS
    )
    for name in ("pytorch_model", "adapter_model"):
        if named := [file for file in found if file.name.startswith(name)]:
            return named
    return found


def _why_no_weights(folder: Path, wanted: str = "model.safetensors") -> str:
    pickled = [file.name for file in pickled_files(folder)]
    if not pickled:
        return f"{folder} has no weights: there is no {wanted}. Give a folder written by save_pretrained"
    names = ", ".join(pickled[:3]) + (", …" if len(pickled) > 3 else "")
    return (
        f"{folder} has pickled weights only ({names}). A pickle can run any code when it is opened, so llmtk reads "
        f"safetensors alone. This converts them, and opens nothing but tensors:\n"
        f"llmtk convert-weights {shlex.quote(str(folder))}"
    )


def _safetensors_layout(file: Path) -> tuple[int, int]:
    """Return where the header ends, and how many bytes of data it describes."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError("the header is longer than the file")
        header = json.loads(stream.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length, max(ends, default=0)
