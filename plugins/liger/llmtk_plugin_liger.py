"""Liger-Kernel's Triton kernels in a model's layers: RMSNorm, rotary embeddings, SwiGLU and their like, on CUDA.

The kernels are those of "Liger Kernel: Efficient Triton Kernels for LLM Training" (arXiv 2410.10989, section 3.2). Its
losses stay out: scoring has a fused head of its own, of which every stage's loss is made. Kernels are put into the
model when it is built, so that what a run proves at its start, it proves on the model that it trains.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from llmtk import ConfigurationError, RunView, Section, hookimpl
from llmtk.contract import Models

Kernel = Literal["rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared"]
KERNELS: tuple[Kernel, ...] = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "relu_squared")
PATCHES = "liger_kernel.transformers.monkey_patch"
"""The module in which Liger-Kernel keeps, by type of model, what puts its kernels into one."""
INSTALL = "pip install 'llmtk-plugin-liger[kernels]'"


class Liger:
    """Puts Liger-Kernel's kernels into the model, and into a reference beside it."""

    class Options(Section):
        """Which kernels."""

        kernels: list[Kernel] | None = None
        """Those to use. By default all that Liger-Kernel has for the layers of the model."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.used: list[str] = []
        self.replaced: dict[str, dict[str, Any]] = {}
        """By module of transformers': what of it was replaced."""

    @hookimpl(wrapper=True)
    def build_models(self, run: RunView) -> Generator[None, Models, Models]:
        models = yield
        # A finished run's model is opened on any device, and computes the same without.
        if why_not(run.device) is None:
            for model in (models.root, *models.frozen.values()):
                self._put_into(causal_of(model))
        return models

    @hookimpl(wrapper=True)
    def build_optimizer(self, run: RunView) -> Generator[None, torch.optim.Optimizer, torch.optim.Optimizer]:
        if problem := why_not(run.device):  # whoever builds an optimizer is about to train
            raise ConfigurationError(f"plugins.liger: {problem}")
        return (yield)

    @hookimpl
    def extra_run_info(self, run: RunView) -> Mapping[str, Any]:
        return {"kernels": ", ".join(self.used)}

    @hookimpl
    def run_finished(self, run: RunView, error: BaseException | None) -> None:
        """Take back what was replaced in transformers' modules, which other runs of this process use too."""
        for module, names in self.replaced.items():
            vars(sys.modules[module]).update(names)
        self.replaced = {}

    def _put_into(self, model: Any) -> None:
        put = kernels_of(model.config.model_type)
        has = [name for name in KERNELS if name in inspect.signature(put).parameters]
        chosen = has if self.options.kernels is None else self.options.kernels
        if missing := [name for name in chosen if name not in has]:
            raise ConfigurationError(
                f"plugins.liger.kernels: Liger-Kernel has no {missing[0]} for {model.config.model_type} models. "
                f"It has: {', '.join(has)}"
            )
        # Whatever else it offers is a loss.
        switches = {name: name in chosen for name in inspect.signature(put).parameters if name != "model"}
        before = dict(vars(sys.modules[type(model).__module__]))
        put(model=model, **switches)
        after = vars(sys.modules[type(model).__module__])
        changed = {name: value for name, value in before.items() if after[name] is not value}
        self.replaced[type(model).__module__] = changed | self.replaced.get(type(model).__module__, {})
        self.used = list(chosen)


def why_not(device: torch.device) -> str | None:
    """Say why the kernels cannot be used on a device, and what to do; None where they can."""
    if device.type != "cuda":
        return f"Liger-Kernel's kernels run on CUDA devices, and this run computes on the {device.type}. Leave it out"
    try:
        importlib.import_module(PATCHES)
    except ImportError as error:
        return f"Liger-Kernel cannot be imported ({error}). Install it: {INSTALL}"
    return None


def causal_of(model: nn.Module) -> Any:
    """Return transformers' model, without an adapter's wrapper."""
    unwrap = getattr(model, "get_base_model", None)
    return model if unwrap is None else unwrap()


def kernels_of(model_type: str) -> Callable[..., None]:
    """Return what puts kernels into models of a type. ConfigurationError where Liger-Kernel has none for it."""
    known = importlib.import_module(PATCHES).MODEL_TYPE_TO_APPLY_LIGER_FN
    if model_type not in known:
        raise ConfigurationError(
            f"plugins.liger: Liger-Kernel has no kernels for {model_type} models. Leave the plugin out. It knows: "
            f"{', '.join(sorted(known))}"
        )
    found: Callable[..., None] = known[model_type]
    return found
