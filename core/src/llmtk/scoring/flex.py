"""Attention over a packed row in one kernel, by torch's FlexAttention: for devices that it has a kernel for.

A token of segment s attends to the tokens of s and of the prefix that s continues, up to its own position, and inside
the layer's window. The row is cut into blocks of `BLOCK` tokens; the kernel leaves out pairs of blocks that cannot see
each other, and asks for single tokens only where a pair sees each other in part.

transformers' own function of this kind ignores the window, so FlexAttention is called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from llmtk.scoring.layout import Layout

BLOCK = 128
"""Tokens to a block, as FlexAttention's kernels have it."""
WIDTHS = (16, 256)
"""The narrowest head that its kernels take, and the widest whose tiles fit a device's shared memory."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BEYOND = ("s_aux", "position_bias")
"""What a layer may pass and these masks cannot express: attention sinks, and biases of their own."""
NOBODY = -1
COMPILING = {
    # Torch gives up at 8, in the whole process: with and without gradient, window and cap, for each shape of heads.
    "recompile_limit": 64,
    # Scales and caps are compiled in. The second value of one would else make it a variable, which kernels cannot have.
    "specialize_float": True,
}


@cache
def available(device: str) -> bool:
    """Say whether FlexAttention has a kernel with a backward pass for a type of device."""
    from torch.utils._triton import has_triton

    return device == "cuda" and has_triton()


def expresses(query: Tensor, value: Tensor, others: Mapping[str, Any]) -> bool:
    """Say whether `attend` can do what a layer asks for; `others` is what it passes beside window, scale and cap."""
    narrowest, widest = WIDTHS
    widths = query.shape[-1], value.shape[-1]
    return (
        available(query.device.type)
        and query.dtype in DTYPES
        and narrowest <= min(widths)
        and max(widths) <= widest
        and all(others.get(name) is None for name in BEYOND)
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, window: int | None, softcap: float
) -> Tensor:
    """Attend: query (1, heads, T, width), key and value (1, key heads, T, width) to (1, T, heads, value width)."""
    length = query.shape[2]
    size = bucket(length)
    kind = window, query.device
    if kind not in layout.masks:  # the first such layer makes it for all
        layout.masks[kind] = block_mask(layout, *kind)
    query, key, value = (F.pad(states, (0, 0, 0, size - length)) for states in (query, key, value))
    with torch._dynamo.config.patch(COMPILING):
        attended: Tensor = _kernel(query.device.type)(
            query,
            key,
            value,
            score_mod=_cap(softcap) if softcap else None,
            block_mask=layout.masks[kind],
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return attended[:, :, :length].transpose(1, 2)


def bucket(length: int) -> int:
    """Return the length to which a row is padded: at most an eighth more, and few of them, so as to compile seldom."""
    step = max(BLOCK, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


@cache
def _kernel(device: str) -> Any:
    # Uncompiled it holds all scores of the row at once: for tests alone. A part that did not compile would too, hence
    # the full graph.
    return torch.compile(flex_attention, fullgraph=True) if device == "cuda" else flex_attention


def _cap(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


@dataclass(frozen=True)
class _Row:
    """A row padded to its bucket: the segment of each token, the prefix that it continues, its position; (size,)."""

    segment: Tensor
    prefix: Tensor
    position: Tensor

    @classmethod
    def of(cls, layout: Layout) -> _Row:
        # From lists, on the CPU: the device need not be waited for.
        lengths, prefixes = torch.tensor(layout.lengths), torch.tensor(layout.prefixes)
        count, length = len(lengths), int(lengths.sum())
        padding = bucket(length) - length
        segment = torch.arange(count).repeat_interleave(lengths)
        behind = torch.where(prefixes >= 0, lengths[prefixes.clamp(min=0)], 0)
        position = torch.arange(length) + (behind - lengths.cumsum(0) + lengths)[segment]
        prefix = torch.where(prefixes >= 0, prefixes, NOBODY)[segment]
        # Each token of padding is a segment of its own, so that every query has a key.
        return cls(
            torch.cat([segment, torch.arange(count, count + padding)]),
            F.pad(prefix, (0, padding), value=NOBODY),
            F.pad(position, (0, padding)),
        )


def block_mask(layout: Layout, window: int | None, device: torch.device) -> BlockMask:
    """Return the mask of a row padded to its bucket, for layers with this window (None: all that is behind)."""
    row = _Row.of(layout)
    visible, full = _blocks(row, layout.prefixes, window)
    mask: BlockMask = BlockMask.from_kv_blocks(
        *_ordered(visible & ~full),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=_mask(row, window, device),
        seq_lengths=(len(row.segment), len(row.segment)),
    )
    return mask.to(device)


def _mask(row: _Row, window: int | None, device: torch.device) -> Callable[..., Tensor]:
    """Return which key each query sees, token by token."""
    segment, prefix, position = (part.int().to(device) for part in (row.segment, row.prefix, row.position))

    def everything(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = segment[k] == segment[q]
        return (own | (segment[k] == prefix[q])) & (position[k] <= position[q])

    if window is None:
        return everything
    # A tensor, since a number would be compiled in, once for each window.
    reach = torch.tensor(window, dtype=torch.int32).to(device)

    def windowed(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return everything(batch, head, q, k) & (position[q] - position[k] < reach)

    return windowed


def _blocks(row: _Row, prefixes: list[int], window: int | None) -> tuple[Tensor, Tensor]:
    """Return (blocks of queries, blocks of keys), twice: may any query see any key, does every one see every one."""
    segment, position = row.segment.view(-1, BLOCK), row.position.view(-1, BLOCK)
    count = len(prefixes)
    holds = torch.zeros(len(segment), count + 1)  # (blocks, segments), all padding in the last
    holds.scatter_(1, segment.clamp(max=count), 1.0)
    continuing = [index for index, prefix in enumerate(prefixes) if prefix >= 0]
    continued = [prefixes[index] for index in continuing]
    visible = ((holds @ holds.T).tril() + holds[:, continuing] @ holds[:, continued].T) > 0

    one = segment[:, 0] == segment[:, -1]
    related = (segment[:, :1] == segment[:, 0]) | (row.prefix.view(-1, BLOCK)[:, :1] == segment[:, 0])
    first, last = position.amin(1), position.amax(1)
    full = one[:, None] & one & related & (first[:, None] >= last)
    if window is not None:
        visible &= first[:, None] - last < window
        full &= last[:, None] - first < window
    return visible, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each block of queries, how many blocks of keys are set, and their indices before all others."""
    counts = blocks.sum(1, dtype=torch.int32)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True).int()
    return counts[None, None], indices[None, None]
