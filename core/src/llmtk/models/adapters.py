"""Adapters through peft: small weights that are trained in place of the model's own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from llmtk.errors import ConfigurationError
from llmtk.models.errors import quietly, summary
from llmtk.models.loading import VALUE_TASK, trained_in_float32
from llmtk.scoring import value_head
from llmtk.seeding import seeded

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel

    from llmtk.config.sections import PeftConfig


def add_adapter(
    model: PreTrainedModel, peft_config: PeftConfig, seed: int = 0, revision: str | None = None
) -> PeftModel:
    """Freeze the model and put a fresh LoRA adapter on it, in float32. Its first forward equals the model's.

    A head of one value is trained in full beside it, and saved with it.

    Args:
        model: The base, changed in place.
        peft_config: The run's ``peft`` section.
        seed: Draws the adapter. torch's global generator stays as it is.
        revision: Which branch, tag or commit of a hub model the base is. The adapter keeps it with the base's name.

    Raises:
        ConfigurationError: ``target_modules``, ``modules_to_save`` or ``bias`` name nothing that the model has, or the
            first is a broken regular expression.
    """
    from peft import LoraConfig, get_peft_model

    _check_modules_to_save(model, peft_config.modules_to_save)
    options = peft_config.model_dump(exclude={"method"})
    task = "CAUSAL_LM" if value_head.find(model) is None else VALUE_TASK
    with seeded(seed), quietly():
        try:
            adapted = get_peft_model(model, LoraConfig(task_type=task, revision=revision, **options))
        except re.error as error:
            raise ConfigurationError(
                f"peft.target_modules: {peft_config.target_modules!r} is no regular expression: {error}. One string is "
                "taken for one; give a list of names, or all-linear"
            ) from error
        except ValueError as error:
            raise ConfigurationError(_why_refused(model, peft_config, error)) from error
    if peft_config.bias != "none" and not any(_is_trained_bias(*named) for named in adapted.named_parameters()):
        where = "the model" if peft_config.bias == "all" else "an adapted layer"
        raise ConfigurationError(f"peft.bias: {peft_config.bias}, and {where} has no bias. Leave it out")
    trained_in_float32(adapted)
    return adapted


def _is_trained_bias(name: str, parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and name.endswith("bias") and "modules_to_save" not in name


def _why_refused(model: PreTrainedModel, peft_config: PeftConfig, error: ValueError) -> str:
    target = peft_config.target_modules
    if "arget modules" not in str(error) and "targeted" not in str(error):
        return f"peft: {summary(error)}"
    hint = " (one string is a regular expression for the whole name: give a list of names)"
    return (
        f"peft.target_modules: the model has no module for {target!r}{hint if isinstance(target, str) else ''}. "
        f"It has {_listed(_linear_names(model))}; all-linear takes them all"
    )


def _check_modules_to_save(model: PreTrainedModel, wanted: list[str] | None) -> None:
    names = [name for name, _ in model.named_modules()]
    for module in wanted or []:
        if not any(re.search(rf"(^|\.){re.escape(module)}$", name) for name in names):
            known = {name.rpartition(".")[2] for name in names} - {""}
            raise ConfigurationError(
                f"peft.modules_to_save: the model has no module {module!r}. It has "
                f"{_listed({name for name in known if not name.isdigit()})}"
            )


def _linear_names(model: PreTrainedModel) -> set[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
