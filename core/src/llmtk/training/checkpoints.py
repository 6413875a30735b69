"""Checkpoints: written aside, synced, renamed, with a manifest. Safetensors and JSON, nothing pickled.

A folder under its final name is complete. Files: `weights.safetensors` and `optimizer.safetensors` by parameter name,
`state.json` (where the run is), and `rank-N.*` (each rank's generators, its plugins' state, and the round that the
checkpoint fell into).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmtk.errors import CheckpointError
from llmtk.folder import sha256_of
from llmtk.training.sharding import fill, in_shards, like, whole
from llmtk.training.zero import shape_of

if TYPE_CHECKING:
    from collections.abc import Callable

MANIFEST = "manifest.json"
NAME = re.compile(r"checkpoint-(\d+)")
REPLACED = ".writing-replaced-"
GROUP = "param_groups/"
"""Before the number of an optimizer's group, in the names of tensors that belong to one."""


def path_of(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step stands."""
    return folder / f"checkpoint-{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the complete checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def verify(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None: every file has the size and SHA-256 of the manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        for name, entry in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["size"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['size']}"
            if sha256_of(file) != entry["sha256"]:
                return f"{name} is damaged: its SHA-256 differs from the manifest's"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    return None


def newest_sound(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is whole; damaged ones are named and passed over."""
    _recover(folder)
    for _, path in reversed(list_checkpoints(folder)):
        problem = verify(path)
        if problem is None:
            return path
        say(f"{path} is damaged and passed over: {problem}")
    return None


def begin(folder: Path, step: int) -> Path:
    """Make the empty folder in which a checkpoint is written aside; leftovers of a killed write go."""
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    aside = folder / f".writing-{step:06d}"
    aside.mkdir()
    return aside


def sweep(folder: Path) -> None:
    """Remove what a killed write or removal left."""
    _recover(folder)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover)


def commit(aside: Path, path: Path) -> None:
    """Add the manifest, make everything durable, and give the folder its name."""
    files = sorted(file for file in aside.iterdir() if file.is_file())
    entries = {file.name: {"size": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    write_json(aside / MANIFEST, {"files": entries})
    for file in (*files, aside / MANIFEST, aside):
        _sync(file)
    if path.exists():  # the same step again, after a resume from an older checkpoint or for a pending evaluation
        retired = path.with_name(REPLACED + path.name)
        path.rename(retired)
        aside.rename(path)
        shutil.rmtree(retired)
    else:
        aside.rename(path)
    _sync(path.parent)


def prune(folder: Path, keep: int | None, protected: set[Path]) -> None:
    """Remove the oldest checkpoints beyond `keep`; the protected ones and the newest stay in any case."""
    if keep is None:
        return
    for _, path in list_checkpoints(folder)[:-keep]:
        if path not in protected:
            _remove(path)


def remove_later(folder: Path, step: int) -> list[Path]:
    """Remove the checkpoints after a step, from which the run goes on anew, and return them.

    Left there, pruning would take them for the newest, and the next resume would go on with a future that never was.
    """
    later = [path for found, path in list_checkpoints(folder) if found > step]
    for path in later:
        _remove(path)
    return later


def save_weights(file: Path, root: nn.Module, *, frozen_too: bool = False) -> None:
    """Write the trained parameters and the persistent buffers. What is frozen is loaded from where it came from."""
    write_tensors(file, weights_of(root, frozen_too=frozen_too))


def weights_of(root: nn.Module, *, frozen_too: bool = False, keep: bool = True) -> dict[str, Tensor]:
    """Return what `save_weights` writes. Of a sharded model, all ranks must call it together; some may keep nothing."""
    return whole(_kept(root, frozen_too), keep)


def load_weights(file: Path, root: nn.Module, *, frozen_too: bool = False) -> None:
    """Put weights back, without a cast. CheckpointError where names, shapes or types differ."""
    saved = load_file(file)
    kept = _kept(root, frozen_too)
    if saved.keys() != kept.keys():
        raise CheckpointError(f"{file} does not fit the model: {_difference(saved.keys(), kept.keys())}")
    for name, tensor in kept.items():
        _check_alike(file, name, saved[name], tensor)
    for name, tensor in kept.items():
        fill(tensor, saved[name])


def save_optimizer(file: Path, root: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Write the optimizer's tensors by parameter name; return the rest (groups and plain numbers) as JSON.

    CheckpointError for state that is neither: nothing is ever pickled.
    """
    tensors, rest = optimizer_of(root, optimizer)
    write_tensors(file, tensors)
    return rest


def optimizer_of(
    root: nn.Module, optimizer: torch.optim.Optimizer, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_optimizer` writes and returns. As `weights_of`, for all ranks of a sharded model together."""
    names = _parameter_names(root)
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}::{key}"] = value
            else:
                numbers.setdefault(names[parameter], {})[key] = value
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        tensors |= {f"{GROUP}{index}::{key}": value for key, value in group.items() if isinstance(value, Tensor)}
        plain = {key: value for key, value in group.items() if key != "params" and not isinstance(value, Tensor)}
        groups.append({**plain, "params": [names[p] for p in group["params"]]})
    rest = {"groups": groups, "numbers": numbers}
    try:
        json.dumps(rest)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps what no checkpoint can hold, neither tensor nor number: {error}"
        ) from error
    return whole(tensors, keep), rest


def load_optimizer(
    file: Path,
    root: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Any],
    device: torch.device | None = None,
) -> None:
    """Put the optimizer's state back by parameter name, on a device, or on that of each parameter.

    Not by torch's own `load_state_dict`, which goes by order and casts state to the parameter's type.
    """
    names = _parameter_names(root)
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    if groups != [group["params"] for group in saved["groups"]]:
        raise CheckpointError(f"{file} does not fit the optimizer: its parameter groups hold other parameters")
    by_name = {name: parameter for parameter, name in names.items()}
    for group, kept in zip(optimizer.param_groups, saved["groups"], strict=True):
        # JSON knows no tuples, and betas must stay one.
        group |= {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items() if k != "params"}
    optimizer.state.clear()
    on_device = {
        id(p): bool(group.get("fused") or group.get("capturable"))
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for full_name, tensor in load_file(file).items():
        name, _, key = full_name.rpartition("::")
        if name.startswith(GROUP):
            optimizer.param_groups[int(name.removeprefix(GROUP))][key] = tensor
            continue
        parameter = by_name[name]
        # As torch does: the step counter lives on the CPU unless a fused kernel reads it.
        stays = key == "step" and not on_device[id(parameter)]
        optimizer.state[parameter][key] = tensor if stays else like(tensor.to(device or parameter.device), parameter)
    for name, values in saved["numbers"].items():
        optimizer.state[by_name[name]] |= values


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name. Of those that share memory, as the tables of 8-bit states do, each is written alone."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        # On the host: under ZeRO, all weights share memory, and a device has no room for them twice.
        apart[name] = tensor.to("cpu", copy=True) if place in seen else tensor
        seen.add(place)
    save_file(apart, file)


def save_rank(folder: Path, rank: int, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Write one rank's tensors and JSON."""
    # Clones: what came out of one buffer (slices of a round) must not share memory in a safetensors file.
    save_file(
        {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}, folder / f"rank-{rank}.safetensors"
    )
    write_json(folder / f"rank-{rank}.json", rest)


def load_rank(folder: Path, rank: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_rank` wrote."""
    return load_file(folder / f"rank-{rank}.safetensors"), read_json(folder / f"rank-{rank}.json")


def split_state(state: Mapping[str, Any], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Part a plugin's state into tensors and JSON. CheckpointError for anything else: nothing is ever pickled."""
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    rest = {key: value for key, value in state.items() if key not in tensors}
    try:
        if not _alike(json.loads(json.dumps(rest)), rest):
            raise TypeError("it would come back changed (a tuple, or a key that is no string)")
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: checkpoint state is tensors and JSON values by name; {error}. "
            f"Mend what its extra_checkpoint_state answers"
        ) from error
    return tensors, rest


def write_json(file: Path, value: Any) -> None:
    """Write JSON for people and machines."""
    file.write_text(json.dumps(value, indent=1) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. CheckpointError where it cannot be read."""
    try:
        value = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return value


def _remove(path: Path) -> None:
    # Renamed first: a folder under a checkpoint's name is never half there.
    doomed = path.with_name(f".writing-removed-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _recover(folder: Path) -> None:
    """Give a checkpoint its name back where the process died between the two renames of a replacement."""
    for retired in folder.glob(f"{REPLACED}*"):
        path = retired.with_name(retired.name.removeprefix(REPLACED))
        if not path.exists():
            retired.rename(path)


def _kept(root: nn.Module, frozen_too: bool) -> dict[str, Tensor]:
    parameters = in_shards(root).named_parameters()
    trained = {name: p for name, p in parameters if p.requires_grad or frozen_too}
    persistent = root.state_dict(keep_vars=True).keys()
    return trained | {name: buffer for name, buffer in root.named_buffers() if name in persistent}


def _parameter_names(root: nn.Module) -> dict[Tensor, str]:
    return {parameter: name for name, parameter in in_shards(root).named_parameters()}


def _check_alike(file: Path, name: str, saved: Tensor, wanted: Tensor) -> None:
    shape = shape_of(wanted)
    if saved.shape != shape or saved.dtype != wanted.dtype:
        raise CheckpointError(
            f"{file}: {name} is {saved.dtype} {tuple(saved.shape)}, the model's is {wanted.dtype} {tuple(shape)}"
        )


def _difference(saved: Any, wanted: Any) -> str:
    missing, extra = sorted(set(wanted) - set(saved)), sorted(set(saved) - set(wanted))
    return f"it lacks {missing[:3]} ({len(missing)} in all) and has {extra[:3]} ({len(extra)}) that the model lacks"


def _alike(a: Any, b: Any) -> bool:
    """Compare JSON values, in which NaN equals itself."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_alike, a, b))
    return bool(a == b or (a != a and b != b))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
