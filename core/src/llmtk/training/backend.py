"""The backend: everything that differs between one process, DDP, FSDP2 and DeepSpeed, in this one place.

It is Accelerate's, with its traps closed: no replayed data loader, no scheduler that steps once per process, no
gradient accumulation taken from the environment.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from llmtk.batch import Batch
from llmtk.config.sections import DeepspeedConfig, FsdpConfig, TrainConfig
from llmtk.errors import ConfigurationError, TrainingError
from llmtk.training import checkpoints
from llmtk.training.sharding import shard_with
from llmtk.training.zero import Zero, spread

NOT_FINITE = "the gradient is not finite"


@dataclass(frozen=True)
class StepResult:
    """An optimizer step: the global gradient norm before clipping, and why no weight changed, if none did."""

    grad_norm: float
    skipped: str | None = None


class Backend:
    """Prepares models, runs backward passes and steps, and lets ranks talk."""

    def __init__(
        self,
        config: TrainConfig,
        project_dir: str | None = None,
        *,
        fsdp: FsdpConfig | None = None,
        deepspeed: DeepspeedConfig | None = None,
    ) -> None:
        self.precision, self.why_precision = choose_precision(config)
        _check_ddp_backend(config.ddp_backend)
        self.pins_memory = _pins_memory(config)
        # Accelerate keeps the precision in a state shared by the process, which a second run would inherit.
        AcceleratorState._reset_state()
        self.accelerator = Accelerator(
            mixed_precision=self.precision,
            # Without being told, Accelerate meets no other ranks where there is no accelerator.
            cpu=not torch.accelerator.is_available(),
            # The plugin object wins over ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment; a number does not.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            step_scheduler_with_optimizer=False,
            log_with=_trackers(config.report_to) or None,
            project_dir=project_dir,
            kwargs_handlers=_handlers(config),
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if fsdp is not None:
            shard_with(self.accelerator, fsdp)
        self.config, self.deepspeed = config, deepspeed
        self.zero: Zero | None = None
        expected = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != expected:
            raise ConfigurationError(
                f"the launcher started {expected} processes (WORLD_SIZE), but this one knows of {self.world_size}: "
                f"each would train alone. Start with torchrun or accelerate launch"
            )
        # Control messages stay off the accelerator: no synchronisation, and any Python value.
        self._control = dist.new_group(backend="gloo") if self.world_size > 1 else None
        if self.world_size > 1:
            _backends.add(self)
            atexit.unregister(_leave)
            atexit.register(_leave)

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products under autocast."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "no": torch.float32}[self.precision]

    @property
    def forward_is_collective(self) -> bool:
        """Whether a forward waits for the other ranks: theirs of a sharded model hold parts of its weights."""
        if self.zero is not None:
            return self.zero.spreads_weights
        return any(isinstance(module, FSDPModule) for module in self.root.modules())

    def prepare(self, root: nn.Module, frozen: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
        """Wrap the root and its optimizer; put frozen models beside them, in eval mode and without gradients."""
        if optimizer.state and self.accelerator.distributed_type == DistributedType.FSDP:
            kind = type(optimizer).__name__
            raise ConfigurationError(f"fsdp: {kind} has state of whole weights before the first step; choose another")
        self.root, self.optimizer = root, optimizer
        self.wrapped: nn.Module
        if self.deepspeed is not None:
            self.zero = spread(self.accelerator, self.deepspeed, self.config, root, optimizer)
            self.wrapped = self.zero.engine
        else:
            self.wrapped, self.prepared = self.accelerator.prepare(root, optimizer)
        if isinstance(self.wrapped, DistributedDataParallel):
            # Rotary buffers broadcast at every forward would make a forward on one rank alone hang. As an argument,
            # torch 2.13 warns of this name, and Accelerate 1.15 does not know the other one.
            self.wrapped.broadcast_buffers = False
        self.parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
        self._place_frozen(frozen)

    def place(self, root: nn.Module, frozen: Mapping[str, nn.Module]) -> None:
        """Put models where they compute, without training them."""
        self.root = root
        self.wrapped = self.accelerator.prepare_model(root, evaluation_mode=True)
        self._place_frozen(frozen)

    def _place_frozen(self, frozen: Mapping[str, nn.Module]) -> None:
        for model in frozen.values():
            model.to(self.device).eval().requires_grad_(False)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context in which models that Accelerate did not wrap compute."""
        return self.accelerator.autocast()  # type: ignore[no-any-return]

    def whole_weights(self) -> dict[str, Tensor] | None:
        """Return all weights of a sharded root, whole, on the main rank; None for a root that is not sharded.

        All ranks must call it together.
        """
        if self.zero is None and not self.forward_is_collective:
            return None
        return checkpoints.weights_of(self.root, frozen_too=True, keep=self.is_main)

    def load_weights(self, file: Path) -> None:
        """Put trained weights back from a checkpoint's file. All ranks must call it together."""
        checkpoints.load_weights(file, self.root)
        if self.zero is not None:
            self.zero.weights_changed()

    def optimizer_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what `checkpoints.optimizer_of` does, whole on the main rank. All ranks must call it together."""
        optimizer = self.optimizer if self.zero is None else self.zero.gathered(keep=self.is_main)
        return checkpoints.optimizer_of(self.root, optimizer, keep=self.is_main)

    def load_optimizer(self, file: Path, saved: Mapping[str, Any]) -> None:
        """Put the optimizer's state back from a checkpoint's file."""
        if self.zero is None:
            checkpoints.load_optimizer(file, self.root, self.optimizer, saved)
            return
        whole = self.zero.empty()
        checkpoints.load_optimizer(file, self.root, whole, saved, device=torch.device("cpu"))
        self.zero.take(whole)

    def to_device(self, batch: Batch) -> Batch:
        """Return a batch on the device; through pinned memory, the copy need not be waited for."""
        return (batch.pin_memory() if self.pins_memory else batch).to(self.device)

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of one forward and backward; gradients are synchronised in the last one only."""
        if self.zero is not None:
            self.zero.engine.set_gradient_accumulation_boundary(last)
            return contextlib.nullcontext()
        # A sharded model adds up shards of gradients: to wait for the last would keep whole ones.
        if last or self.world_size == 1 or self.forward_is_collective:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(self.wrapped)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients. TrainingError for a loss that has none."""
        if not loss.requires_grad:
            raise TrainingError(
                "the loss does not depend on the model, so that nothing can be learnt: make its terms of what "
                "run.score(batch) gives, without detach, item or torch.no_grad"
            )
        if self.zero is not None:
            self.zero.backward(loss)
        else:
            self.accelerator.backward(loss)

    def step(self, max_norm: float, refused: str | None = None) -> StepResult:
        """Clip, and step unless it is refused or the gradient is not finite. Gradients are cleared either way."""
        if self.zero is not None:
            grad_norm = self.zero.step(refused=refused is not None)
            return StepResult(grad_norm, refused or (None if math.isfinite(grad_norm) else NOT_FINITE))
        norm = self.accelerator.clip_grad_norm_(self.parameters, max_norm or math.inf)
        grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        skipped = refused
        if skipped is None and not math.isfinite(grad_norm):
            skipped = "fp16 overflow" if self.precision == "fp16" else NOT_FINITE
        if skipped is None:
            self.prepared.step()
        elif self.accelerator.scaler is not None:
            # The scaler must see every step that was unscaled, or the next unscale_ raises.
            self.accelerator.scaler.update()
        self.prepared.zero_grad(set_to_none=True)
        return StepResult(grad_norm, skipped)

    def close_trackers(self) -> None:
        """Finish what is reported to trackers. Not Accelerate's `end_training`, after which ranks cannot talk."""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up named numbers over ranks. A rank may lack a name."""
        return add_up(self.gather(dict(values)))

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """Return one rank's value on every rank."""
        if self._control is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self._control)
        return values[0]

    @contextlib.contextmanager
    def together(self, what: str, error: type[Exception]) -> Iterator[None]:
        """Do something on every rank that may fail on one: then it fails on all, and nobody waits for ever."""
        failure: Exception | None = None
        try:
            yield
        except Exception as caught:
            failure = caught
        told = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if isinstance(failure, OSError | SafetensorError):
            raise error(f"{what} failed: {failure}") from failure
        if failure is not None:
            raise failure
        if any(told):
            rank = next(index for index, message in enumerate(told) if message)
            raise error(f"{what} failed on rank {rank}: {told[rank]}")


# Those whose wrapped models hold the process group.
_backends: weakref.WeakSet[Backend] = weakref.WeakSet()


def _leave() -> None:
    """Part from the other ranks when the process ends: until then, runs may be evaluated, and others follow.

    gloo's threads need the interpreter's lock to let their last tensors go, and abort the process if it has ended by
    then. They are waited for when the last reference to their group goes, and a DDP model is one.
    """
    for backend in list(_backends):
        backend.accelerator.free_memory()
        vars(backend).pop("wrapped", None)
        backend.zero = None
        backend._control = None
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _pins_memory(config: TrainConfig) -> bool:
    """Say whether batches go through pinned memory. ConfigurationError where there is nothing to copy to."""
    if config.dataloader_pin_memory and not torch.cuda.is_available():
        raise ConfigurationError(
            "train.dataloader_pin_memory: batches are pinned for copies to a CUDA device; none is here. Leave it out"
        )
    return torch.cuda.is_available() if config.dataloader_pin_memory is None else config.dataloader_pin_memory


def _check_ddp_backend(name: str | None) -> None:
    """Refuse what this torch or this machine cannot talk through: Accelerate would take another in silence."""
    if name is None:
        return
    if not dist.is_backend_available(name):
        raise ConfigurationError(f"train.ddp_backend: this torch is built without {name}. Leave it out, or use gloo")
    if name == "nccl" and not torch.cuda.is_available():
        raise ConfigurationError("train.ddp_backend: nccl is for CUDA devices; none is here. Leave it out, or use gloo")


def _handlers(config: TrainConfig) -> list[Any]:
    handlers: list[Any] = [
        DistributedDataParallelKwargs(find_unused_parameters=config.ddp_find_unused_parameters),
    ]
    return handlers + ([InitProcessGroupKwargs(backend=config.ddp_backend)] if config.ddp_backend else [])


def _trackers(names: list[str]) -> list[str]:
    """Return the trackers' names. ConfigurationError for one that is unknown or not installed (Accelerate drops it)."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in known:
            raise ConfigurationError(f"train.report_to: {name!r} is no tracker of Accelerate's: {', '.join(known)}")
        if name not in available:
            raise ConfigurationError(f"train.report_to: {name} is not installed; pip install {name}, or leave it out")
    return list(names)


def add_up(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add mappings up, name by name, in their order."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def choose_precision(config: TrainConfig) -> tuple[str, str]:
    """Return Accelerate's name of the precision to compute in, and why. ConfigurationError for an impossible one."""
    if config.fp16:
        if not torch.cuda.is_available():
            raise ConfigurationError("train.fp16 needs a CUDA device; none is here. Leave it out, or use bf16: true")
        return "fp16", "train.fp16"
    if config.bf16 is not None:
        if config.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ConfigurationError(
                f"train.bf16: {torch.cuda.get_device_name()} has no bfloat16. Use fp16: true, or bf16: false"
            )
        return ("bf16", "train.bf16") if config.bf16 else ("no", "train.bf16")
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("bf16", "the device has it") if has else ("no", "the device has no bfloat16")
    if torch.cpu._is_amx_tile_supported():
        return "bf16", "this CPU has bfloat16 matrix units"
    return "no", "this CPU has no bfloat16 matrix units"
