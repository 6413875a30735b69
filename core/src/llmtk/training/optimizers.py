"""Optimizers and schedulers by the names that transformers' TrainingArguments uses, and torch's own other optimizers.

What an optimizer reads is found in its signature: those with `betas` take `train.adam_beta1` and `adam_beta2`, and
`adam_epsilon` for their `eps`; whatever else they take stands under `train.optim_args`.
"""

from __future__ import annotations

import math
from importlib import import_module
from inspect import signature
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llmtk.errors import ConfigurationError, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmtk.config.sections import TrainConfig

Groups = list[dict[str, Any]]
Kind = type[torch.optim.Optimizer]


def _bitsandbytes(kind: str, bits: int, paged: bool | None = None) -> tuple[str, dict[str, Any]]:
    return f"bitsandbytes.optim.{kind}", {"optim_bits": bits} | ({} if paged is None else {"is_paged": paged})


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw_torch_fused": ("torch.optim.AdamW", {"fused": True}),
    "adamw_torch": ("torch.optim.AdamW", {"fused": False}),
    "sgd": ("torch.optim.SGD", {}),
    "rmsprop": ("torch.optim.RMSprop", {}),
    "adagrad": ("torch.optim.Adagrad", {}),
    # Its own schedule, and its own scale of the learning rate, would stand beside those of the run.
    "adafactor": ("transformers.optimization.Adafactor", {"scale_parameter": False, "relative_step": False}),
    "adamw_8bit": _bitsandbytes("AdamW", 8, paged=False),
    "adamw_bnb_8bit": _bitsandbytes("AdamW", 8, paged=False),
    "paged_adamw_32bit": _bitsandbytes("AdamW", 32, paged=True),
    "paged_adamw_8bit": _bitsandbytes("AdamW", 8, paged=True),
    "ademamix": _bitsandbytes("AdEMAMix", 32, paged=False),
    "ademamix_8bit": _bitsandbytes("AdEMAMix", 8, paged=False),
    "paged_ademamix_32bit": _bitsandbytes("AdEMAMix", 32, paged=True),
    "paged_ademamix_8bit": _bitsandbytes("AdEMAMix", 8, paged=True),
    "lion_32bit": _bitsandbytes("Lion", 32, paged=False),
    "lion_8bit": _bitsandbytes("Lion", 8, paged=False),
    "paged_lion_32bit": _bitsandbytes("Lion", 32, paged=True),
    "paged_lion_8bit": _bitsandbytes("Lion", 8, paged=True),
    "rmsprop_bnb": _bitsandbytes("RMSprop", 32),
    "rmsprop_bnb_32bit": _bitsandbytes("RMSprop", 32),
    "rmsprop_bnb_8bit": _bitsandbytes("RMSprop", 8),
    "stable_adamw": ("optimi.StableAdamW", {}),
    # Those of torch that TrainingArguments has no names for.
    "adadelta": ("torch.optim.Adadelta", {}),
    "adam": ("torch.optim.Adam", {}),
    "adamax": ("torch.optim.Adamax", {}),
    "asgd": ("torch.optim.ASGD", {}),
    "muon": ("torch.optim.Muon", {}),
    "nadam": ("torch.optim.NAdam", {}),
    "radam": ("torch.optim.RAdam", {}),
    "rprop": ("torch.optim.Rprop", {}),
}
"""By name: where the class stands, and the arguments that the name stands for."""

_IN_BACKWARD = (
    "it changes weights in the middle of the backward pass, before gradients are added up over micro-batches and "
    "ranks, clipped, and refused where they are not finite"
)
_OBJECTS = "it keeps Python objects as state, and checkpoints hold tensors and numbers alone"
_TWO_SETS = (
    "it trains other weights than those to evaluate and export, and moving between the two rounds them, so that an "
    "evaluation would change the run"
)
REFUSED: dict[str, str] = {
    **dict.fromkeys(("lomo", "adalomo", "apollo_adamw_layerwise"), _IN_BACKWARD),
    **dict.fromkeys(("galore_adamw_layerwise", "galore_adamw_8bit_layerwise"), _IN_BACKWARD),
    "galore_adafactor_layerwise": _IN_BACKWARD,
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw"), _OBJECTS),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), f"{_OBJECTS} (torchao's tensors are of its own classes)"),
    "grokadamw": "it keeps its state by parameter objects among its settings, where no checkpoint can hold it",
    **dict.fromkeys(("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"), _TWO_SETS),
    "adamw_anyprecision": "its package, torchdistx, is not kept up any more",
    "adamw_torch_xla": "it is for XLA devices, and a run computes on CUDA or a CPU",
    "adamw_torch_npu_fused": "it is for Ascend NPUs, and a run computes on CUDA or a CPU",
    "lbfgs": "it asks for loss and gradient several times in a step, and a step here has one gradient",
    "sparse_adam": "it takes sparse gradients alone, and a language model has dense ones",
}
"""Optimizers that transformers or torch know and a run cannot use, and why."""

_OF_THE_RUN = frozenset({"self", "params", "lr", "weight_decay", "betas"})
"""Arguments that keys under `train` give."""
_NOT_OFFERED = frozenset(
    ("foreach", "fused", "capturable", "differentiable", "maximize", "triton", "gradient_release", "is_paged")
)
"""Arguments that say how the same update is computed, turn it round, or make it in the backward pass."""
_PACKAGES = {"optimi": "torch-optimi"}
"""Packages that are called otherwise than what is imported of them."""


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Split the trained parameters: weight decay for matrices, none for biases, norms and other vectors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer that `train.optim` names. ConfigurationError for one that cannot be had, or its arguments."""
    kind, fixed = _found(config.optim)
    _check_read(config, kind, fixed)
    own = {key: tuple(value) if isinstance(value, list) else value for key, value in config.optim_args.items()}
    settings: dict[str, Any] = {"lr": config.learning_rate, **_adam_settings(config, kind), **fixed, **own}
    try:
        return kind(groups, **settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"train.optim: {config.optim} cannot be set up: {error}") from error


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that is not known or cannot be used, and options that the chosen one does not read."""
    build_optimizer([{"params": [nn.Parameter(torch.zeros(2, 2))]}], config)


def _found(name: str) -> tuple[Kind, dict[str, Any]]:
    """Import the optimizer of a name: its class, and the arguments that the name stands for."""
    if name in REFUSED:
        raise ConfigurationError(f"train.optim: {name} cannot be used: {REFUSED[name]}. Choose another")
    if name not in OPTIMIZERS:
        known = [*OPTIMIZERS, *REFUSED]
        raise ConfigurationError(
            f"train.optim: {name!r} is not known.{suggest(name, known)} Known: {', '.join(OPTIMIZERS)}"
        )
    (module, _, attribute), fixed = OPTIMIZERS[name][0].rpartition("."), OPTIMIZERS[name][1]
    try:
        return cast(Kind, getattr(import_module(module), attribute)), fixed
    except (ImportError, AttributeError) as error:
        package = _PACKAGES.get(module, module.partition(".")[0])
        raise ConfigurationError(
            f"train.optim: {name} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from error


def _adam_settings(config: TrainConfig, kind: Kind) -> dict[str, Any]:
    """Return the arguments that `train.adam_beta1`, `adam_beta2` and `adam_epsilon` give to those that have them."""
    parameters = signature(kind).parameters
    if "betas" not in parameters:
        return {}
    # AdEMAMix has a third one, of which TrainingArguments knows nothing.
    betas = (config.adam_beta1, config.adam_beta2, *parameters["betas"].default[2:])
    return {"betas": betas} | ({"eps": config.adam_epsilon} if "eps" in parameters else {})


def _check_read(config: TrainConfig, kind: Kind, fixed: Mapping[str, Any]) -> None:
    """Refuse options that the optimizer would pass over in silence, and arguments that it does not take."""
    parameters, fields = signature(kind).parameters, type(config).model_fields
    reads = _adam_settings(config, kind).keys() | ({"weight_decay"} & parameters.keys())
    for key, argument in (
        ("adam_beta1", "betas"),
        ("adam_beta2", "betas"),
        ("adam_epsilon", "eps"),
        ("weight_decay", "weight_decay"),
    ):
        if getattr(config, key) != fields[key].default and argument not in reads:
            raise ConfigurationError(f"train.{key} is not used by optim: {config.optim}; leave it out")
    takes = [key for key in parameters if key not in _OF_THE_RUN | _NOT_OFFERED | reads | fixed.keys()]
    for key in config.optim_args:
        if key not in takes:
            raise ConfigurationError(
                f"train.optim_args.{key}: {config.optim} takes no such argument.{suggest(key, takes)} "
                f"It takes: {', '.join(takes) or 'none'}"
            )


def check_scheduler(config: TrainConfig) -> None:
    """Refuse a scheduler that is not known or needs what is not given, before anything is loaded."""
    from transformers.trainer_utils import SchedulerType

    known = [kind.value for kind in SchedulerType]
    if config.lr_scheduler_type not in known:
        raise ConfigurationError(
            f"train.lr_scheduler_type: {config.lr_scheduler_type!r} is not known."
            f"{suggest(config.lr_scheduler_type, known)} Known: {', '.join(known)}"
        )
    _check_schedule_reads(config)
    probe = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    build_scheduler(probe, config, 100)


def _check_schedule_reads(config: TrainConfig) -> None:
    """Refuse options that transformers' schedule would pass over in silence."""
    kind = config.lr_scheduler_type
    if config.lr_scheduler_kwargs and kind in ("constant", "constant_with_warmup"):
        raise ConfigurationError(f"train.lr_scheduler_kwargs is not used by lr_scheduler_type: {kind}; leave it out")
    if kind == "constant" or waits_for_evaluation(config):
        for key in ("warmup_steps", "warmup_ratio"):
            if getattr(config, key):
                raise ConfigurationError(f"train.{key} is not used by lr_scheduler_type: {kind}; leave it out")


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> Any:
    """Build the schedule over this many steps. ConfigurationError where its arguments don't fit."""
    from transformers import get_scheduler

    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            warmup_steps(config, steps),
            steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"train.lr_scheduler_kwargs {dict(config.lr_scheduler_kwargs)} do not fit "
            f"lr_scheduler_type {config.lr_scheduler_type}: {error}"
        ) from error


def follow(scheduler: Any) -> None:
    """Set the learning rates of the schedule's step: a resumed run may have more steps than the one that saved them."""
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scales = [scale(scheduler.last_epoch) for scale in scheduler.lr_lambdas]
        for group, base, scale in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scales, strict=True):
            group["lr"] = base * scale


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """Return in how many of a run's steps the learning rate rises."""
    return config.warmup_steps or math.ceil(config.warmup_ratio * steps)


def waits_for_evaluation(config: TrainConfig) -> bool:
    """Say whether the schedule moves on with evaluations instead of with steps."""
    return config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
