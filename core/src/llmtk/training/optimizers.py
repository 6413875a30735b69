"""Optimizers and schedulers by the names that transformers' TrainingArguments uses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmtk.errors import ConfigurationError, suggest

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmtk.config.sections import TrainConfig

Groups = list[dict[str, Any]]


def decay_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Split the trained parameters: weight decay for matrices, none for biases, norms and other vectors."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adamw(fused: bool) -> Callable[[Groups, TrainConfig], torch.optim.Optimizer]:
    def build(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
        betas = (config.adam_beta1, config.adam_beta2)
        return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=fused)

    return build


OPTIMIZERS: dict[str, Callable[[Groups, TrainConfig], torch.optim.Optimizer]] = {
    "adamw_torch_fused": _adamw(fused=True),
    "adamw_torch": _adamw(fused=False),
    "sgd": lambda groups, config: torch.optim.SGD(groups, lr=config.learning_rate),
    "rmsprop": lambda groups, config: torch.optim.RMSprop(groups, lr=config.learning_rate),
    "adagrad": lambda groups, config: torch.optim.Adagrad(groups, lr=config.learning_rate),
    "adafactor": lambda groups, config: torch.optim.Adafactor(groups, lr=config.learning_rate),
}


def build_optimizer(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    """Build the optimizer that `train.optim` names. ConfigurationError for an unknown one."""
    check_optimizer(config)
    return OPTIMIZERS[config.optim](groups, config)


def check_optimizer(config: TrainConfig) -> None:
    """Refuse an optimizer that is not known, and options that the chosen one does not read."""
    if config.optim not in OPTIMIZERS:
        raise ConfigurationError(
            f"train.optim: {config.optim!r} is not known.{suggest(config.optim, OPTIMIZERS)} "
            f"Known: {', '.join(OPTIMIZERS)}"
        )
    if not config.optim.startswith("adamw"):
        fields = type(config).model_fields
        for key in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if getattr(config, key) != fields[key].default:
                raise ConfigurationError(f"train.{key} is not used by optim: {config.optim}; leave it out")


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

    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * steps)
    try:
        return get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            warmup,
            steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_kwargs),
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(
            f"train.lr_scheduler_kwargs {dict(config.lr_scheduler_kwargs)} do not fit "
            f"lr_scheduler_type {config.lr_scheduler_type}: {error}"
        ) from error


def waits_for_evaluation(config: TrainConfig) -> bool:
    """Say whether the schedule moves on with evaluations instead of with steps."""
    return config.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
