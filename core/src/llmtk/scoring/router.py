"""The router loss of a mixture-of-experts model: what keeps its experts evenly loaded.

Over the rows of N tokens in all layers, with E experts of which each token takes k (arXiv 2101.03961, equations 4-6):

    f_e = 1/N sum_t [e is taken by t]        P_e = 1/N sum_t p_t(e)        loss = E sum_e f_e P_e

It is transformers' `load_balancing_loss_func`: a product of two means over one forward's tokens, not a sum over them.
Forwards give it as `aux_loss`, transformers' own and the packed one alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

NAME = "aux_loss"
"""Under which name a forward's output holds it."""


def is_asked_for(root: nn.Module) -> bool:
    """Say whether the configuration of a model in a root has `output_router_logits`."""
    return any(_asks(module) for module in root.modules())


def coefficient(root: nn.Module) -> float | None:
    """Return what the outermost model that asks for a router loss multiplies it by; None where none has any."""
    for module in root.modules():
        if _asks(module):
            for name in ("router_aux_loss_coef", "aux_loss_coef"):
                if isinstance(value := getattr(module, name, None), float | int):
                    return float(value)
    return None


def loss_in(output: Any) -> Tensor | None:
    """Return the router loss in what a forward gave, if there is one."""
    loss = output.get(NAME) if isinstance(output, Mapping) else None
    return loss if isinstance(loss, Tensor) else None


def router_loss(layers: Sequence[Tensor], copies: Tensor, taken: int) -> Tensor:
    """Return the loss of router logits (T, experts), one tensor a layer; `copies` (T,) says how often a token counts.

    `taken` is k. A shared prefix counts once for each sequence that continues it, as if it were written out.
    """
    rows = len(layers) * copies.sum()
    shares, likelihoods = [], []
    for logits in layers:
        probabilities = logits.float().softmax(-1)
        weights = copies.to(probabilities)[:, None]
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(taken).indices, 1.0)
        shares.append((chosen * weights).sum(0).to(rows.device) / rows)
        likelihoods.append((probabilities * weights).sum(0).to(rows.device) / rows)
    experts = len(shares[0])
    return experts * (torch.stack(shares).sum(0) * torch.stack(likelihoods).sum(0)).sum()


def _asks(module: nn.Module) -> bool:
    config: Any = getattr(module, "config", None)
    if not hasattr(config, "get_text_config"):
        return False
    return bool(getattr(config.get_text_config(), "output_router_logits", False))
