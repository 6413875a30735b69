"""A run into a checkpoint, and back. All ranks call these together, and fail together."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from llmtk.errors import CheckpointError, ConfigurationError
from llmtk.training import checkpoints, optimizers
from llmtk.training.order import Cursor
from llmtk.training.state import TrainState, round_from_state, round_to_state

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llmtk.run import Run


def save(run: Run) -> Path:
    """Write a checkpoint of the run as it is, then remove old ones. CheckpointError where it cannot be written."""
    path = checkpoints.path_of(run.checkpoints, run.state.step)
    aside = path.with_name(f".writing-{run.state.step:06d}")
    backend = run.backend
    with _together(run, "making room for a checkpoint"):
        if backend.is_main:
            checkpoints.begin(run.checkpoints, run.state.step)
    weights, optimizer = _gathered(run)
    with _together(run, f"writing {path}"):
        _write_rank(run, aside)
        if backend.is_main:
            _write_shared(run, aside, weights, *optimizer)
    with _together(run, f"finishing {path}"):
        if backend.is_main:
            checkpoints.commit(aside, path)
            _prune(run)
    return path


def restore(run: Run, path: Path) -> None:
    """Put a run that is set up and untrained to where the checkpoint left it."""
    saved = checkpoints.read_json(path / "state.json")
    _check_environment(run, saved["environment"])
    _check_plugins(run, path, saved["plugins"])
    run.backend.load_weights(path / "weights.safetensors")
    for name in sorted(run.changing):
        checkpoints.load_weights(path / f"frozen-{name}.safetensors", run.frozen[name], frozen_too=True)
    run.backend.load_optimizer(path / "optimizer.safetensors", saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    optimizers.follow(run.scheduler)
    if run.backend.accelerator.scaler is not None and saved["scaler"]:
        run.backend.accelerator.scaler.load_state_dict(saved["scaler"])
    run.state = TrainState.from_json(saved["state"])
    run.order.cursor = Cursor(**saved["cursor"])

    tensors, rest = checkpoints.load_rank(path, run.rank)
    if rest["round"] is not None:
        run.state.round = round_from_state(tensors, rest["round"])
    _restore_plugins(run, tensors, rest["plugins"])
    run.records.cut(saved["records"])
    with _together(run, f"removing what came after {path}"):
        if run.backend.is_main:
            _tidy(run)
    run.randomness.restore(
        {k.removeprefix("random/"): v for k, v in tensors.items() if k.startswith("random/")}, rest["random"]
    )


def restore_best(run: Run, path: Path) -> None:
    """Put a trained run's model back to a checkpoint, with what plugins export of it: an average of the weights."""
    run.backend.load_weights(path / "weights.safetensors")
    tensors, rest = checkpoints.load_rank(path, run.rank)
    _restore_plugins(run, tensors, rest["plugins"])


def environment() -> dict[str, Any]:
    """Return what bit-identical resuming depends on."""
    import numpy
    import peft
    import transformers

    import llmtk

    modules = {"llmtk": llmtk, "torch": torch, "transformers": transformers, "peft": peft, "numpy": numpy}
    return {
        "versions": {"python": platform.python_version(), **{n: str(m.__version__) for n, m in modules.items()}},
        "threads": torch.get_num_threads(),
    }


def _gathered(run: Run) -> tuple[dict[str, torch.Tensor], tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """Return weights and optimizer state, whole on the main rank: no rank waits for one whose disk is full."""
    return checkpoints.weights_of(run.model, keep=run.backend.is_main), run.backend.optimizer_state()


def _write_shared(
    run: Run,
    folder: Path,
    weights: dict[str, torch.Tensor],
    state: dict[str, torch.Tensor],
    optimizer: dict[str, Any],
) -> None:
    checkpoints.write_tensors(folder / "weights.safetensors", weights)
    for name in sorted(run.changing):
        checkpoints.save_weights(folder / f"frozen-{name}.safetensors", run.frozen[name], frozen_too=True)
    checkpoints.write_tensors(folder / "optimizer.safetensors", state)
    scaler = run.backend.accelerator.scaler
    saved = {
        "state": run.state.to_json(),
        "cursor": asdict(run.order.cursor),
        "optimizer": optimizer,
        "scheduler": _plain(run.scheduler.state_dict()),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "records": run.records.offsets(),
        "plugins": run.hooks.keepers(),
        "environment": environment() | {"ranks": run.world_size},
    }
    checkpoints.write_json(folder / "state.json", saved)


def _write_rank(run: Run, folder: Path) -> None:
    random_tensors, random_rest = run.randomness.state()
    tensors = {f"random/{name}": tensor for name, tensor in random_tensors.items()}
    plugins: dict[str, Any] = {}
    for name, state in run.hooks.extra_checkpoint_state().items():
        plugin_tensors, plugins[name] = checkpoints.split_state(state, name)
        tensors |= {f"plugin/{name}/{key}": tensor for key, tensor in plugin_tensors.items()}
    round_rest = None
    if run.state.round is not None:
        round_tensors, round_rest = round_to_state(run.state.round)
        tensors |= round_tensors
    rest = {"random": random_rest, "plugins": plugins, "round": round_rest}
    checkpoints.save_rank(folder, run.rank, tensors, rest)


def _restore_plugins(run: Run, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Mapping[str, Any]]) -> None:
    """Give plugins back what they kept, of a rank's tensors and of the JSON by plugin name."""
    own = _by_prefix(tensors, "plugin/")
    run.hooks.restore_checkpoint_state({name: {**state, **own.get(name, {})} for name, state in rest.items()})


def _tidy(run: Run) -> None:
    """Bring the folder to what it was when the checkpoint was complete; the process may have died while removing."""
    if later := checkpoints.remove_later(run.checkpoints, run.state.step):
        run.notify(f"Going on from step {run.state.step}: later checkpoints are removed ({len(later)})")
    checkpoints.sweep(run.checkpoints)
    _prune(run)


def _prune(run: Run) -> None:
    checkpoints.prune(run.checkpoints, run.config.train.save_total_limit, _protected(run))


def _protected(run: Run) -> set[Path]:
    return {checkpoints.path_of(run.checkpoints, run.state.best.step)} if run.state.best else set()


def _together(run: Run, what: str) -> Any:
    return run.backend.together(what, CheckpointError)


def _by_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith(prefix):
            owner, _, key = full_name.removeprefix(prefix).partition("/")
            found.setdefault(owner, {})[key] = tensor
    return found


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a scheduler's state without what is not data (its functions come back with its construction)."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        try:
            plain[key] = json.loads(json.dumps(value))
        except TypeError:
            continue
    return plain


def _check_plugins(run: Run, path: Path, before: list[str]) -> None:
    """Refuse to leave a plugin's state behind, and to begin one in the midst of a run. Those without any may change."""
    now = run.hooks.keepers()
    changed = [f"  {name} has state there, and is not among this run's plugins" for name in before if name not in now]
    changed += [f"  {name} keeps state, and there is none of it" for name in now if name not in before]
    if changed:
        raise ConfigurationError("\n".join([f"the run cannot go on from {path} with other plugins:", *changed]))


def _check_environment(run: Run, saved: Mapping[str, Any]) -> None:
    if saved["ranks"] != run.world_size:
        raise CheckpointError(
            f"the checkpoint was written by {saved['ranks']} ranks and this run has {run.world_size}. "
            f"Resume with {saved['ranks']}, or start a new run from the exported model"
        )
    now = environment()
    changed = [f"{n} {v} -> {now['versions'].get(n)}" for n, v in saved["versions"].items() if now["versions"][n] != v]
    if saved["threads"] != now["threads"]:
        changed.append(f"threads {saved['threads']} -> {now['threads']}")
    if changed:
        run.notify(f"The resumed run may differ in the last bits from one never stopped: {', '.join(changed)}")
