"""Attention over a packed row: each segment attends to its prefix and causally to itself.

Registered with transformers under a name of its own. A call without a layout (generation, a padded batch) goes to the
implementation that the model had before, masks included.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtk.scoring import flex

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmtk.scoring.layout import Behind, Grid, Layout

LAYOUT = "llmtk_layout"
"""The keyword under which a layout travels through a model's layers to this function."""
PREFIX = "llmtk_"

LONG = 768
"""Keys from which torch's own kernel is faster on a CPU than attention written out."""
MASK = 256
"""Masks are kept in multiples of this many keys."""


def register(implementation: str) -> str:
    """Make packed attention known beside an implementation of transformers'; return the name that selects both."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    name = PREFIX + implementation
    if name not in AttentionInterface():
        plain = _plain(implementation)

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
            layout = kwargs.pop(LAYOUT, None)
            if layout is None:
                return plain(module, query, key, value, *args, **kwargs)
            return layout.attend(module, query, key, value, **kwargs), None

        AttentionInterface.register(name, attention)
        if implementation in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[implementation])
    return name


def _plain(implementation: str) -> Callable[..., Any]:
    """Return transformers' function of that name; `eager` stands in each model's own module."""
    from transformers import AttentionInterface

    if implementation != "eager":
        return AttentionInterface()[implementation]  # type: ignore[no-any-return]

    def eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **kwargs)

    return eager


def cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cast to autocast's dtype, as torch's own attention does. Rotary embeddings come out in float32."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> Tensor:
    """Attend: query (1, heads, T, width), key and value (1, key heads, T, width) to (1, T, heads, value width).

    NotImplementedError for dropout, which the padded way has to do.
    """
    if dropout:
        raise NotImplementedError("dropout in packed attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = cast(query, key, value)
    if flex.expresses(query, value, others):
        return flex.attend(query, key, value, layout, scale, sliding_window, softcap or 0.0)
    if layout.grid is not None and layout.grid.longest < LONG:
        return _attend_grid(query[0], key[0], value[0], layout.grid, scale, sliding_window, softcap or 0.0)
    if (found := layout.grids) is not None and max(grid.key_cells.shape[1] for grid in found[0]) < LONG:
        return _attend_grids(query[0], key[0], value[0], *found, scale, sliding_window, softcap or 0.0)
    # `split`, since its backward pass is one copy; slices would each fill a whole row with zeros.
    queries = torch.split(query[0], layout.lengths, dim=1)
    keys = torch.split(key[0], layout.lengths, dim=1)
    values = torch.split(value[0], layout.lengths, dim=1)
    outputs = []
    for segment, prefix in enumerate(layout.prefixes):
        q, k, v = queries[segment], keys[segment], values[segment]
        if not q.shape[1]:
            outputs.append(q.new_zeros(q.shape[0], 0, v.shape[-1]))
            continue
        if prefix >= 0:
            k, v = torch.cat([keys[prefix], k], 1), torch.cat([values[prefix], v], 1)
        outputs.append(_attend(q, k, v, scale, sliding_window, softcap or 0.0))
    return torch.cat(outputs, 1).transpose(0, 1)[None]


def _attend_grid(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, scale: float, window: int | None, softcap: float
) -> Tensor:
    """Attend in all segments at once: (heads, T, width) to (1, T, heads, value width)."""

    def rows(states: Tensor, key_heads: int) -> Tensor:
        """Return (key heads x segments x heads of the group, longest, width)."""
        if grid.cells is not None:
            states = states.index_select(1, grid.cells)
        split = states.reshape(key_heads, -1, grid.segments, grid.longest, states.shape[-1])
        return split.transpose(1, 2).reshape(-1, grid.longest, states.shape[-1])

    heads, key_heads = query.shape[0], key.shape[0]
    if _is_native(query, grid.longest, grid.longest, window, softcap):

        def batched(states: Tensor) -> Tensor:
            """Return (segments, heads, longest, width)."""
            states = states if grid.cells is None else states.index_select(1, grid.cells)
            return torch.unflatten(states, 1, (grid.segments, grid.longest)).transpose(0, 1)

        native = F.scaled_dot_product_attention(
            batched(query), batched(key), batched(value), is_causal=True, scale=scale, enable_gqa=heads != key_heads
        )
        flat = native.transpose(1, 2).flatten(0, 1)
        return (flat if grid.back is None else flat.index_select(0, grid.back))[None]
    attended = _attend(rows(query, key_heads), rows(key, key_heads), rows(value, key_heads), scale, window, softcap)
    split = attended.view(key_heads, grid.segments, heads // key_heads, grid.longest, -1)
    output = split.transpose(1, 2).reshape(heads, grid.segments * grid.longest, -1)
    if grid.back is not None:
        output = output.index_select(1, grid.back)
    return output.transpose(0, 1)[None]


def _attend_grids(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grids: list[Behind],
    back: Tensor,
    scale: float,
    window: int | None,
    softcap: float,
) -> Tensor:
    """Attend in all segments that stand alone at once, and in all that stand behind a prefix: (heads, T, width)."""
    outputs = []
    for grid in grids:
        segments = len(grid.cells)

        def rows(states: Tensor, cells: Tensor, segments: int = segments) -> Tensor:
            """Return (key heads x segments, heads of the group x length, width)."""
            picked = states.index_select(1, cells.flatten().to(states.device))
            split = picked.view(key.shape[0], -1, segments, cells.shape[1], states.shape[-1])
            return split.transpose(1, 2).reshape(key.shape[0] * segments, -1, states.shape[-1])

        # Rows of a key head's segments stand behind each other, and so do their biases.
        bias = grid.bias(window, query.device).repeat(key.shape[0], 1, 1, 1)
        written: Any = _Written.apply
        attended = written(
            rows(query, grid.cells), rows(key, grid.key_cells), rows(value, grid.key_cells), bias, scale, softcap
        )
        split = attended.view(key.shape[0], segments, -1, grid.cells.shape[1], attended.shape[-1])
        outputs.append(split.transpose(1, 2).reshape(query.shape[0], -1, attended.shape[-1]))
    return torch.cat(outputs, 1).index_select(1, back.to(query.device)).transpose(0, 1)[None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float) -> Tensor:
    """Attend from the last `len(q)` of the keys: (heads, queries, width), (key heads, keys, width)."""
    queries, keys = q.shape[1], k.shape[1]
    windowed = window is not None and keys > window
    plain = queries == keys and not windowed
    if _is_native(q, queries, keys, window, softcap) or (keys >= LONG and not softcap):
        mask = None if plain else _bias(queries, keys, window, q.device).to(q.dtype)
        attended: Tensor = F.scaled_dot_product_attention(
            q[None],
            k[None],
            v[None],
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=q.shape[0] != k.shape[0],
        )
        return attended[0]
    written: Any = _Written.apply
    # The corner of a mask that many lengths share: one for each length would pile up over a run.
    square = _square(-(-keys // MASK) * MASK, window if windowed else None, q.device)
    return written(q, k, v, square[keys - queries : keys, :keys], scale, softcap)  # type: ignore[no-any-return]


def _is_native(q: Tensor, queries: int, keys: int, window: int | None, softcap: float) -> bool:
    """Say whether torch's own kernel does it, and best: on a CPU it is slow for short segments in bfloat16."""
    plain = queries == keys and (window is None or keys <= window) and not softcap
    return plain and q.dtype == torch.float32


@lru_cache(maxsize=8)
def _square(length: int, window: int | None, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a later backward pass may use it
        return _bias(length, length, window, device)


def _bias(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return (queries, keys): 0, or minus infinity for keys a query must not see. The queries are the last keys."""
    at = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    unseen = (key > at) if window is None else (key > at) | (key <= at - window)
    return torch.zeros(queries, keys, device=device).masked_fill_(unseen, -torch.inf)


class _Written(torch.autograd.Function):
    """Attention written out, for short segments: the backward pass computes probabilities and outputs again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, softcap: float) -> Tensor:
        # Query heads that share a key head stand below each other: one product for all of them.
        grouped = q.reshape(k.shape[0], -1, q.shape[-1])
        probabilities, _ = _probabilities(grouped, k, bias, scale, softcap)
        output = probabilities.to(v.dtype) @ v
        ctx.save_for_backward(grouped, k, v, bias)
        ctx.scale, ctx.softcap, ctx.shape = scale, softcap, q.shape
        return output.view(*q.shape[:2], v.shape[-1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, bias = ctx.saved_tensors
        d_output = gradients[0].reshape(*q.shape[:2], v.shape[-1])
        probabilities, capped = _probabilities(q, k, bias, ctx.scale, ctx.softcap)
        weights = probabilities.to(v.dtype)
        output = weights @ v
        d_v = weights.transpose(1, 2) @ d_output
        d_scores = (d_output @ v.transpose(1, 2)).float()
        d_scores -= (d_output.float() * output.float()).sum(-1, keepdim=True)
        d_scores *= probabilities
        if capped is not None:
            d_scores *= 1 - (capped / ctx.softcap).square_()
        product = d_scores.mul_(ctx.scale).to(q.dtype)
        d_q = (product @ k).view(ctx.shape)
        return d_q, product.transpose(1, 2) @ q, d_v, None, None, None


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Return attention weights (key heads, group x queries, keys) in float32, and the capped scores if there is a cap.

    By torch's own softmax: on a CPU an exponential of minus infinity by itself is many times slower.
    """
    scores = (q @ k.transpose(1, 2)).float().mul_(scale)
    capped = torch.tanh_(scores.div_(softcap)).mul_(softcap) if softcap else None
    grouped = (scores if capped is None else capped).view(k.shape[0], -1, *bias.shape[-2:])
    hidden = grouped.add_(bias) if capped is None else grouped + bias
    return hidden.view(scores.shape).softmax(-1), capped
