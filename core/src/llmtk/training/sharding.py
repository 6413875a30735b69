"""Sharded training: each rank holds a part of every weight, of its gradient and of its optimizer state.

It is PyTorch's FSDP2, or DeepSpeed's ZeRO (`zero.py`), set up by Accelerate. What is written to disk is whole, so that
a run goes on, and a model loads, with any number of ranks, sharded or not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llmtk.errors import ConfigurationError
from llmtk.training.zero import check_zero, gathering, is_spread

if TYPE_CHECKING:
    from accelerate import Accelerator

    from llmtk.config.run_config import RunConfig
    from llmtk.config.sections import FsdpConfig, TrainConfig

OPTIMIZERS = frozenset({"adamw_torch_fused", "adamw_torch", "adam", "sgd"})
"""Those that look at each weight by itself, so that a part of a matrix is updated as the whole would be."""


def check_parallelism(config: RunConfig) -> None:
    """Refuse the sections `fsdp` and `deepspeed` where they cannot be followed, before anything is loaded."""
    if config.fsdp is not None and config.deepspeed is not None:
        raise ConfigurationError("fsdp and deepspeed both spread a model over the ranks; leave one of them out")
    if config.deepspeed is not None:
        check_zero(config.deepspeed)
        check_options(config.train, "deepspeed")
        if config.model.quantization is not None:
            raise ConfigurationError(
                "model.quantization does not go together with deepspeed yet; leave one of them out"
            )
    if config.fsdp is not None:
        check_fsdp(config.fsdp, int(os.environ.get("WORLD_SIZE", "1")))
        check_options(config.train, "fsdp")


def check_moving_reference(config: RunConfig) -> None:
    """Refuse a reference that moves towards a policy of which each rank has but a part."""
    if config.fsdp is not None or (config.deepspeed is not None and config.deepspeed.zero_stage == 3):
        raise ConfigurationError(
            "a reference that moves towards the policy is whole on each rank, and of the policy each has a part. "
            "Leave the reference where it is, or spread less: deepspeed.zero_stage 1 or 2"
        )


def check_fsdp(fsdp: FsdpConfig, ranks: int) -> None:
    """Refuse what cannot be sharded here. ConfigurationError says what to do instead."""
    if ranks == 1:
        raise ConfigurationError(
            "fsdp shards a model over several processes, and this is one. Start them with llmtk launch -n N "
            "(or torchrun), or leave it out"
        )
    if fsdp.cpu_offload and not torch.accelerator.is_available():
        raise ConfigurationError("fsdp.cpu_offload frees a device's memory, and there is no device here. Leave it out")


def check_options(config: TrainConfig, section: str) -> None:
    """Refuse options of training that parts of weights, or a wrapper of this section, do not go together with."""
    if config.optim not in OPTIMIZERS:
        raise ConfigurationError(
            f"train.optim: {config.optim} looks at whole matrices, or was not tried on parts of them; "
            f"with {section} choose one of {', '.join(sorted(OPTIMIZERS))}"
        )
    asked = {
        "fp16": config.fp16,
        "torch_compile": config.compiles,
        "precompute_reference": config.precompute_reference,
        "neftune_noise_alpha": config.neftune_noise_alpha is not None,
    }
    for key, wanted in asked.items():
        if wanted:
            raise ConfigurationError(f"train.{key} does not go together with {section} yet; leave one of them out")


def shard_with(accelerator: Accelerator, fsdp: FsdpConfig) -> None:
    """Let an Accelerator prepare models by FSDP2.

    Not by its own argument: on a CPU, Accelerate 1.15 would pass over that in silence, and FSDP2 runs there as well.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    plugin: Any = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=fsdp.reshard_after_forward,
        cpu_offload=fsdp.cpu_offload,
        auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    )
    state: Any = accelerator.state
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin


def in_shards(root: nn.Module) -> nn.Module:
    """Return a root whose parameters are its shards: after a forward without gradient, some are still gathered."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return root


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a weight of which this rank holds a part."""
    return isinstance(tensor, DTensor) or is_spread(tensor)


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Return tensors detached, and sharded ones whole, on the CPU, on the ranks that keep them.

    All ranks must call it together, with the same names in the same order.
    """
    gathered = {}
    for name, tensor in tensors.items():
        if not is_sharded(tensor):
            gathered[name] = tensor.detach().contiguous()
            continue
        with gathering(tensor):
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep:
                # A copy: what a collective gives is a tensor of its own kind, which files do not take.
                gathered[name] = full.detach().to("cpu", copy=True)
    return gathered


def fill(wanted: Tensor, tensor: Tensor) -> None:
    """Put a whole tensor's values into a tensor, or into the part of it that this rank holds."""
    with torch.no_grad(), gathering(wanted, changing=True):
        wanted.copy_(like(tensor, wanted))


def like(tensor: Tensor, wanted: Tensor) -> Tensor:
    """Return a whole tensor as the part of it that this rank holds, if it belongs to a sharded one of its shape."""
    if not isinstance(wanted, DTensor) or tensor.shape != wanted.shape:
        return tensor
    return distribute_tensor(tensor.to(wanted.device), wanted.device_mesh, wanted.placements)
