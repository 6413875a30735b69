"""torch.compile for the layers of a model: each by itself, in place, and only where it changes nothing but the time.

Layers, not the root: names of weights, hooks and wrappers stay as they are, all layers of a kind share what is compiled
once, and the layout of a packed row, new at each batch, stays outside. So does packed attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llmtk.scoring import packed, proof
from llmtk.scoring.attention import PREFIX

if TYPE_CHECKING:
    from llmtk.scoring import Scorer

Gather = Callable[[Any], list[Any]]


def compile_layers(
    root: nn.Module, scorer: Scorer, gather: Gather, backend: str | None = None, mode: str | None = None
) -> str | None:
    """Compile a root's layers, and return None; or leave them as they were, on all ranks, and return why.

    `backend` and `mode` are torch.compile's. Log-probs and gradients of random sequences must be those of before, as
    near as scoring's own proof asks.
    """
    layers = layers_of(root)
    unknown = "it does not say which modules its layers are"
    reason = _compiled(root, layers, scorer, backend, mode) if layers else unknown
    reason = next(filter(None, gather(reason)), None)
    if reason:
        for layer in layers:
            layer._compiled_call_impl = None
    return reason


def layers_of(root: nn.Module) -> list[Any]:
    """Return the repeated layers of a root, as transformers names them; none for a model of another kind."""
    kinds = {kind for module in root.modules() for kind in getattr(module, "_no_split_modules", None) or ()}
    return [module for module in root.modules() if type(module).__name__ in kinds]


def _compiled(root: nn.Module, layers: list[Any], scorer: Scorer, backend: str | None, mode: str | None) -> str | None:
    try:
        model = packed.causal_model(root)
        device = next(model.parameters()).device
        batch = proof._probe(model.config.get_text_config()).to(device)
        watched = proof._watched(root)
        near, near_gradient = _tolerance(root)

        def measured() -> list[torch.Tensor]:
            with proof.evaluating(root), proof._generators_kept(device):
                return proof._score(lambda forward, batch: scorer.score(forward, batch).logps, root, batch, watched)

        logps, _, *gradients = measured()
        _keep_attention_outside(model.config._attn_implementation)
        for layer in layers:
            layer.compile(backend=backend or "inductor", mode=mode, dynamic=True)
        found, _, *found_gradients = measured()
    except Exception as error:  # no compiler, or a model that it cannot read: the run goes on without
        return f"it cannot be compiled ({proof._short(error)})"
    distance = proof._distance(found, logps)
    if distance > near:
        return f"compiled log-probs are off by {distance:.1e}, more than {near:.0e}"
    floor = 1e-4 * max((float(gradient.norm()) for gradient in gradients), default=0.0)
    pairs = zip(found_gradients, gradients, strict=True)
    distance = max((proof._distance(mine, expected, floor) for mine, expected in pairs), default=0.0)
    if distance > near_gradient:
        return f"compiled gradients are off by {distance:.1e}, more than {near_gradient:.0e}"
    return None


def _tolerance(root: nn.Module) -> tuple[float, float]:
    coarsest = max((parameter.dtype for parameter in root.parameters()), key=proof._coarseness)
    return proof.TOLERANCE.get(coarsest, proof.TOLERANCE[torch.bfloat16])


def _keep_attention_outside(implementation: str | None) -> None:
    """Let what is compiled end before packed attention and begin anew behind it: each row is laid out otherwise."""
    from transformers import AttentionInterface

    if implementation is not None and implementation.startswith(PREFIX):
        attend = AttentionInterface()[implementation]
        if not getattr(attend, "_torchdynamo_disable", False):
            AttentionInterface.register(implementation, torch.compiler.disable(attend))  # type: ignore[no-untyped-call]
