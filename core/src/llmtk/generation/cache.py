"""Keys and values of sequences that are being written: a prompt's once, however many sequences continue it.

Like scoring, generation runs packed rows through the patched model: a prefill is a row of prompts, and a step is a row
of one token for each sequence. Both reach attention under the keyword of layouts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmtk.scoring.attention import cast
from llmtk.scoring.layout import Layout

GROWTH = 64
"""Positions by which there is room for more tokens of a sequence."""


@dataclass
class Layer:
    """One layer's keys and values.

    `prompt_keys` (prompts, key heads, longest, width) are padded behind their end; `keys` (slots, key heads, room,
    width) hold what sequences have written. The values have a width of their own.
    """

    prompt_keys: Tensor
    prompt_values: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, eq=False)
class Prefill(Layout):
    """A packed row of prompts, whose keys and values are kept. Its last tokens predict."""

    kept: dict[int, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict, repr=False)
    """By layer: keys and values (key heads, T, width)."""

    @classmethod
    def of_prompts(cls, prompts: Sequence[Sequence[int]], device: torch.device) -> Prefill:
        """Pack prompts."""
        lengths = [len(prompt) for prompt in prompts]
        positions = [position for length in lengths for position in range(length)]
        return cls(
            ids=torch.tensor([[token for prompt in prompts for token in prompt]], device=device),
            positions=torch.tensor([positions], device=device),
            lengths=lengths,
            prefixes=[-1] * len(prompts),
            predictors=torch.tensor(lengths, device=device).cumsum(0) - 1,
            copies=torch.ones(len(positions), dtype=torch.int64, device=device),
        )

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
        query, key, value = cast(query, key, value)
        self.kept[_index(module)] = key[0], value[0]
        return super().attend(module, query, key, value, **settings)


class Cache:
    """The keys and values of all layers, for sequences in slots 0 to `len(lengths) - 1`."""

    def __init__(self) -> None:
        self.layers: dict[int, Layer] = {}
        self.prompt_lengths: list[int] = []
        """Tokens of each prompt that is kept."""
        self.prompt_of: list[int] = []
        """Which of these prompts the sequence in each slot continues."""
        self.lengths: list[int] = []
        """Tokens that the sequence in each slot has written, and whose keys are here."""
        self.version = 0
        """Counts how often tensors gave way to others."""

    @property
    def room(self) -> int:
        """Tokens of a sequence that there is room for."""
        return next(iter(self.layers.values())).keys.shape[2]

    def add_prompts(self, prefill: Prefill) -> list[int]:
        """Keep more prompts; return where they are."""
        before = len(self.prompt_lengths)
        self.version += 1
        self.prompt_lengths += prefill.lengths
        longest = max(self.prompt_lengths)
        for index, (keys, values) in prefill.kept.items():
            if index not in self.layers:
                self.layers[index] = Layer(_room(keys), _room(values), _room(keys), _room(values))
            layer = self.layers[index]
            layer.prompt_keys = _with_more(layer.prompt_keys, torch.split(keys, prefill.lengths, dim=1), longest)
            layer.prompt_values = _with_more(layer.prompt_values, torch.split(values, prefill.lengths, dim=1), longest)
        return list(range(before, len(self.prompt_lengths)))

    def keep_prompts(self, kept: Sequence[int]) -> None:
        """Let all prompts but these go, which stand in this order from now on."""
        self.version += 1
        self.prompt_lengths = [self.prompt_lengths[prompt] for prompt in kept]
        self.prompt_of = [kept.index(prompt) for prompt in self.prompt_of]
        longest = max(self.prompt_lengths, default=0)
        for layer in self.layers.values():
            layer.prompt_keys = layer.prompt_keys[kept, :, :longest]
            layer.prompt_values = layer.prompt_values[kept, :, :longest]

    def add_sequences(self, prompts: Sequence[int]) -> None:
        """Give a slot to new sequences that continue these prompts."""
        self.prompt_of += prompts
        self.lengths += [0] * len(prompts)

    def remove(self, slots: Sequence[int]) -> None:
        """Free slots: the last sequences move into them."""
        for slot in sorted(slots, reverse=True):
            last = len(self.lengths) - 1
            if slot != last:
                for layer in self.layers.values() if self.lengths[last] else ():
                    layer.keys[slot] = layer.keys[last]
                    layer.values[slot] = layer.values[last]
                self.prompt_of[slot], self.lengths[slot] = self.prompt_of[last], self.lengths[last]
            del self.prompt_of[last], self.lengths[last]

    def reserve(self) -> None:
        """Make room for one more token of every sequence."""
        slots, length = len(self.lengths), max(self.lengths) + 1
        for layer in self.layers.values():
            if layer.keys.shape[0] < slots or layer.keys.shape[2] < length:
                self.version += 1
                wanted = max(slots, layer.keys.shape[0]), -(-length // GROWTH) * GROWTH
                layer.keys, layer.values = (_grown(kept, *wanted) for kept in (layer.keys, layer.values))


class Step:
    """One token for each sequence: a packed row whose tokens attend to their prompt and to their own sequence.

    It has what the patched model asks of a layout: `ids` and `positions` (1, R), `predictors` and `copies` (R,).

    With `spare` its tensors fit later steps too, which `fill` turns it into: there may be rows without a sequence, the
    last ones, whose logits mean nothing, and keys that nobody sees.
    """

    def __init__(self, cache: Cache, tokens: Sequence[int], device: torch.device, *, spare: bool = False) -> None:
        cache.reserve()
        self._cache, self._version = cache, cache.version
        self._size, self._prompts = len(tokens), len(cache.prompt_lengths)
        self._longest = cache.room if spare else max(cache.lengths) + 1
        self._most = max(Counter(cache.prompt_of).values())
        self._in_place = not spare and cache.prompt_of == [p for p in range(self._prompts) for _ in range(self._most)]
        self._numbers = torch.tensor(self._listed(tokens), device=device)
        cells = 0 if self._in_place else self._prompts * self._most
        ids, positions, self._at, self._back, self._cells = torch.split(self._numbers, [self._size] * 4 + [cells])
        self._rows = torch.arange(self._size, device=device)
        self._biases: dict[int | None, Tensor] = {}
        self.ids, self.positions = ids[None], positions[None]
        self.predictors = self._rows
        self.copies = torch.ones_like(self._rows)

    def fits(self, rows: int) -> bool:
        """Whether `fill` can turn this into a step of so many rows, of which it has not many more."""
        counts = Counter(self._cache.prompt_of)
        return (
            self._version == self._cache.version
            and self._size // 2 < rows <= self._size
            and max(counts.values()) <= self._most
        )

    def fill(self, tokens: Sequence[int]) -> None:
        """Become the step of the cache as it is now, in the same tensors. It must fit."""
        self._numbers.copy_(torch.tensor(self._listed(tokens)))
        self._biases.clear()

    def _listed(self, tokens: Sequence[int]) -> list[int]:
        """Return all numbers that a step consists of: tokens, positions, written, and the grid's cells.

        The grid has a row's cells beside those of its prompt: the row in each cell (prompts x most,), and the cell of
        each row. A cell without a row holds any, as does a row without a sequence.
        """
        cache, none = self._cache, [0] * (self._size - len(tokens))
        positions = [cache.prompt_lengths[p] + n for p, n in zip(cache.prompt_of, cache.lengths, strict=True)]
        placed = [0] * self._prompts
        cells, back = [0] * (self._prompts * self._most), []
        for row, prompt in enumerate(cache.prompt_of):
            back.append(prompt * self._most + placed[prompt])
            cells[back[-1]] = row
            placed[prompt] += 1
        listed = [[*tokens, *none], [*positions, *none], [*cache.lengths, *none], [*back, *none]]
        return [number for part in (*listed, [] if self._in_place else cells) for number in part]

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Attend: query (1, heads, R, width), key and value (1, key heads, R, width) to (1, R, heads, value width)."""
        query, key, value = cast(query, key, value)
        layer = self._cache.layers[_index(module)]
        layer.keys[self._rows, :, self._at] = key[0].transpose(0, 1)
        layer.values[self._rows, :, self._at] = value[0].transpose(0, 1)
        slots, key_heads = len(self._rows), key.shape[1]
        own_keys = layer.keys[:slots, :, : self._longest]
        own_values = layer.values[:slots, :, : self._longest]

        # (R, key heads, heads of the group, width)
        grouped = query[0].view(key_heads, -1, slots, query.shape[-1]).permute(2, 0, 1, 3)
        scores = torch.cat(
            [self._with_prompts(grouped, layer.prompt_keys, _scores), _scores(grouped, own_keys)], dim=-1
        )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if softcap:
            scores, scale = torch.tanh(scores.float() * (scale / softcap)), softcap
        # The bias is in float32, and so is the sum.
        weights = torch.add(self._bias(sliding_window, layer), scores, alpha=scale).softmax(-1).to(value.dtype)
        to_prompt, to_own = torch.split(weights, [layer.prompt_keys.shape[2], self._longest], dim=-1)
        attended = self._with_prompts(to_prompt, layer.prompt_values, torch.matmul) + to_own @ own_values
        return attended.reshape(1, slots, -1, attended.shape[-1])

    def _with_prompts(self, rows: Tensor, prompts: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Multiply each row (R, key heads, group, n) with its prompt's matrix (prompts, key heads, ., .).

        Rows of one prompt go into one product, so that its matrix is read once.
        """
        _, key_heads, group, width = rows.shape
        placed = rows if self._in_place else rows.index_select(0, self._cells)
        beside = placed.reshape(len(prompts), -1, key_heads, group, width).transpose(1, 2)
        multiplied = product(beside.flatten(2, 3), prompts)
        apart: Tensor = torch.unflatten(multiplied, 2, (-1, group)).transpose(1, 2).flatten(0, 1)
        return apart if self._in_place else apart.index_select(0, self._back)

    def _bias(self, window: int | None, layer: Layer) -> Tensor:
        """Return (R, 1, 1, longest prompt + longest sequence): 0, or minus infinity for keys not to be seen."""
        if window not in self._biases:
            device = self._at.device
            lengths, at = (self.positions[0] - self._at)[:, None], self._at[:, None]
            in_prompt = torch.arange(layer.prompt_keys.shape[2], device=device)[None]
            own = torch.arange(self._longest, device=device)[None]
            seen = torch.cat([in_prompt < lengths, own <= at], dim=1)
            if window is not None:
                seen &= torch.cat([in_prompt.expand(len(at), -1), lengths + own], dim=1) > lengths + at - window
            bias = torch.zeros(seen.shape, device=device).masked_fill_(~seen, -torch.inf)
            self._biases[window] = bias[:, None, None]
        return self._biases[window]


def _scores(queries: Tensor, keys: Tensor) -> Tensor:
    """Multiply queries (..., m, width) with keys (..., n, width) to (..., m, n).

    A CPU's kernels for bfloat16 are twice as fast with the larger matrix on the left.
    """
    return (keys @ queries.mT).mT


def _with_more(kept: Tensor, new: Sequence[Tensor], longest: int) -> Tensor:
    """Return (prompts, heads, longest, width): those kept, and new ones (heads, T, width) behind them."""
    joined = _grown(kept, len(kept) + len(new), longest)
    for index, prompt in enumerate(new, start=len(kept)):
        joined[index, :, : prompt.shape[1]] = prompt
    return joined


def _room(like: Tensor) -> Tensor:
    return like.new_zeros(0, like.shape[0], 0, like.shape[-1])


def _grown(kept: Tensor, slots: int, length: int) -> Tensor:
    grown = kept.new_zeros(slots, kept.shape[1], max(length, kept.shape[2]), kept.shape[3])
    grown[: kept.shape[0], :, : kept.shape[2]] = kept
    return grown


def _index(module: Any) -> int:
    """Return which layer's attention a module is; its own identity where it does not say."""
    index = getattr(module, "layer_idx", None)
    return id(module) if index is None else int(index)
