"""DeepSpeed's ZeRO: optimizer state, gradients too, weights too are spread over the ranks (arXiv 1910.02054).

DeepSpeed lays parameters end to end in flat tensors, of which each rank holds a stretch, and its optimizer knows these
alone. What is written to disk is whole and by parameter name, as ever.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmtk.config.sections import DeepspeedConfig, TrainConfig

OLDEST = "0.19.8"
"""The oldest DeepSpeed that was tried. Up to 0.19.4 at least, it steps in float32 on gradients that are not finite."""
BUCKET = 50_000_000
"""Numbers that are reduced or gathered at once: 200 MB in float32. DeepSpeed's own default takes ten times as much."""
PERSISTENT = 100_000
"""Parameters of fewer numbers are not let go of after each use, under stage 3."""


def missing() -> str | None:
    """Return what is missing for the section `deepspeed`, and how to get it; None where nothing is."""
    install = f"pip install 'deepspeed>={OLDEST}'"
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        return f"DeepSpeed is not installed: {install}"
    return None if Version(version) >= Version(OLDEST) else f"DeepSpeed {version} is too old: {install}"


def check_zero(zero: DeepspeedConfig) -> None:
    """Refuse what cannot be done here. ConfigurationError says what to do instead."""
    if zero.zero_stage == 0:
        raise ConfigurationError(
            "deepspeed.zero_stage: 0 spreads nothing over the ranks: each has all, as without the section. "
            "Leave the section out, or choose 1, 2 or 3"
        )
    if lacking := missing():
        raise ConfigurationError(f"deepspeed: {lacking}, or leave the section out")
    if "RANK" not in os.environ:
        raise ConfigurationError(
            "deepspeed: DeepSpeed wants a launcher, for one process too. Start with torchrun --nproc-per-node N "
            "-m llmtk run, or leave the section out"
        )
    for key in ("offload_optimizer", "offload_param"):
        if getattr(zero, key) != "none" and not torch.accelerator.is_available():
            raise ConfigurationError(
                f"deepspeed.{key} frees a device's memory, and there is no device here. Leave it out"
            )


def spread(
    accelerator: Accelerator,
    zero: DeepspeedConfig,
    train: TrainConfig,
    root: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> Zero:
    """Have Accelerate prepare a model and its optimizer by DeepSpeed.

    It learns of DeepSpeed for this moment alone. Told from the start, it would train weights in bfloat16 where a run
    computes in it, pass over DeepSpeed on a CPU, and have transformers spread every model that is loaded.
    """
    from accelerate.utils import DeepSpeedPlugin, DistributedType
    from transformers.integrations import unset_hf_deepspeed_config

    _check_float32(root)
    _quieten()
    groups = [list(group["params"]) for group in optimizer.param_groups]
    settings = _settings(zero, train, accelerator.mixed_precision)
    plugin: Any = DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=False)
    plugin.select(_from_accelerator_state=True)
    state: Any = accelerator.state
    before = state.distributed_type
    state.distributed_type, state.deepspeed_plugins = DistributedType.DEEPSPEED, {"default": plugin}
    accelerator.deepspeed_engine_wrapped = None
    try:
        engine, _ = accelerator.prepare(root, optimizer)
    finally:
        state.distributed_type = before
        unset_hf_deepspeed_config()
    return Zero(engine, optimizer, groups)


def _check_float32(root: nn.Module) -> None:
    """Refuse trained weights of which DeepSpeed would keep a second set, in float32, that no checkpoint holds."""
    found = {parameter.dtype for parameter in root.parameters() if parameter.requires_grad} - {torch.float32}
    if found:
        raise ConfigurationError(
            f"model.dtype: under deepspeed trained weights are float32, and these are {found.pop()}. Set it to float32"
        )


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter of which this rank holds a part, under stage 3."""
    return hasattr(tensor, "ds_id")


def shape_of(tensor: Any) -> torch.Size:
    """Return a tensor's shape, of one that is spread its whole shape."""
    return torch.Size(tensor.ds_shape if is_spread(tensor) else tensor.shape)


def gathering(tensor: Tensor, *, changing: bool = False) -> AbstractContextManager[Any]:
    """Return the context in which a tensor that is spread is whole on all ranks; what changes it must do so on all."""
    if not is_spread(tensor):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([tensor], modifier_rank=0 if changing else None)  # type: ignore[no-any-return]


def _settings(zero: DeepspeedConfig, train: TrainConfig, precision: str) -> dict[str, Any]:
    """Return DeepSpeed's own configuration."""
    return {
        # Windows are cut by tokens: this number says nothing, but DeepSpeed wants one.
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        # Losses are divided by their window's totals already.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": {
            "stage": zero.zero_stage,
            "reduce_bucket_size": BUCKET,
            "allgather_bucket_size": BUCKET,
            "stage3_param_persistence_threshold": PERSISTENT,
            "offload_optimizer": {"device": zero.offload_optimizer, "pin_memory": zero.offload_optimizer != "none"},
            "offload_param": {"device": zero.offload_param, "pin_memory": zero.offload_param != "none"},
        },
        # The optimizer of the run, on the host as well: DeepSpeed's own reads other options.
        "zero_force_ds_cpu_optimizer": False,
        # Of the modules that it names, gradients would be added up in bfloat16.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []},
    }


def _quieten() -> None:
    """Keep DeepSpeed from telling what it does, and from compiling a reduction of its own on a CPU, for minutes."""
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # torch 2.13 has other names for what DeepSpeed calls in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Zero:
    """A model and its optimizer under ZeRO."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, groups: list[list[Tensor]]) -> None:
        """Take over an engine, the optimizer that it was given, and the parameters that this one's groups had."""
        self.engine = engine
        self.optimizer = optimizer
        self.groups = groups
        self.spreads_weights: bool = engine.zero_optimization_stage() == 3
        self._has_gradients = False

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients."""
        self.engine.backward(loss)
        self._has_gradients = True

    def step(self, refused: bool) -> float:
        """Clip, and step unless it is refused or the gradient is not finite; return the norm, infinite if it is not.

        DeepSpeed clears its gradients in a step alone. One that is refused is made by an optimizer that does nothing.
        """
        if not self._has_gradients:
            return 0.0
        with _idle(self.optimizer) if refused else nullcontext():
            self.engine.step()
        self._has_gradients = False
        norm = float(self.engine.get_global_grad_norm())
        return norm if math.isfinite(norm) else math.inf

    def weights_changed(self) -> None:
        """Have the optimizer step from the model's weights as they are: it keeps a copy."""
        self.engine.optimizer.refresh_fp32_params()

    def gathered(self, keep: bool = True) -> torch.optim.Optimizer:
        """Return an optimizer that cannot step, with groups and whole state by parameter, on the CPU.

        All ranks must call it together; those that do not keep it get one without state.
        """
        whole = self._by_parameter()
        for flat, parameters in self._stretches():
            for key, value in self.optimizer.state.get(flat, {}).items():
                for parameter in parameters:
                    found = self._whole(value, parameter) if _is_flat(value, flat) else value
                    if keep:
                        whole.state[parameter][key] = found
        return whole

    def empty(self) -> torch.optim.Optimizer:
        """Return what `gathered` does, without state."""
        return self._by_parameter()

    def take(self, whole: torch.optim.Optimizer) -> None:
        """Put groups and whole state by parameter back, each rank the stretches that it holds."""
        for group, kept in zip(self.optimizer.param_groups, whole.param_groups, strict=True):
            group |= {key: value for key, value in kept.items() if key != "params"}
        self.optimizer.state.clear()
        for flat, parameters in self._stretches():
            for key, value in whole.state[parameters[0]].items():
                if not isinstance(value, Tensor):
                    self.optimizer.state[flat][key] = value
                    continue
                if value.shape != shape_of(parameters[0]):  # a step counter, which a fused kernel reads on its device
                    place = flat.device if self.optimizer.defaults.get("fused") else value.device
                    self.optimizer.state[flat][key] = value.to(place, copy=True)
                    continue
                stretch = torch.zeros_like(flat, dtype=value.dtype)
                for parameter in parameters:
                    at, begin, count = self._piece(parameter)
                    values = whole.state[parameter][key].flatten()
                    stretch[at : at + count] = values[begin : begin + count].to(flat.device)
                self.optimizer.state[flat][key] = stretch

    def _by_parameter(self) -> torch.optim.Optimizer:
        groups = [
            {**group, "params": parameters}
            for group, parameters in zip(self.optimizer.param_groups, self.groups, strict=True)
        ]
        return torch.optim.Optimizer(groups, self.optimizer.defaults)

    def _stretches(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """Yield what the optimizer has in place of parameters, and the parameters that lie there end to end."""
        inner = self.engine.optimizer
        if self.spreads_weights:
            yield from zip(inner.fp32_partitioned_groups_flat, inner.fp16_groups, strict=True)
        else:
            yield from zip(inner.single_partition_of_fp32_groups, inner.bit16_groups, strict=True)

    def _piece(self, parameter: Any) -> tuple[int, int, int]:
        """Return where this rank's piece of a parameter begins in the stretch, in the parameter, and its length."""
        if self.spreads_weights:
            inner = self.engine.optimizer
            _, at, size = inner.grad_position[inner.get_param_id(parameter)]
            begin = dist.get_rank() * size
            return at, begin, max(0, min(size, parameter.ds_numel - begin))
        if parameter._hp_mapping is None:
            return 0, 0, 0
        held, of = parameter._hp_mapping.hp_fragment_address, parameter._hp_mapping.lp_fragment_address
        return held.start, of.start, of.numel

    def _whole(self, stretch: Tensor, parameter: nn.Parameter) -> Tensor:
        """Put a parameter's state together from the pieces of all ranks, to the bit: bytes are added to zeros."""
        shape = shape_of(parameter)
        at, begin, count = self._piece(parameter)
        whole = torch.zeros(shape.numel(), dtype=stretch.dtype, device=parameter.device)
        whole[begin : begin + count] = stretch[at : at + count]
        dist.all_reduce(whole.view(torch.uint8))
        return whole.view(shape).cpu()


def _is_flat(value: Any, flat: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == flat.shape


@contextmanager
def _idle(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have an optimizer do nothing for a while."""
    step = optimizer.step
    optimizer.step = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        optimizer.step = step  # type: ignore[method-assign]
