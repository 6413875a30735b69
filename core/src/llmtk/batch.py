"""What a stage hands to the loop: sequences in groups, groups in windows, windows in a round.

A stage describes each example as a `Group` of sequences. `Batch.collate` lays groups out flat, without padding; the
loop cuts a window's batch into micro-batches with `Batch.select`. Everything here is tensors and JSON, so that a
checkpoint may fall between any two windows of a round. How a batch is computed is the scoring's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, update_wrapper
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array = np.ndarray[Any, Any]
Tokens = Tensor | Array | SequenceOf[int]
Values = Tensor | Array | SequenceOf[Any]


def _on_host(compute: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """Work a property out on the CPU: how long it is, an accelerator would have to be waited for."""

    def get(batch: Batch) -> Tensor:
        host = batch.host
        if host is batch:
            return compute(batch)
        found: Tensor = getattr(host, compute.__name__)
        return found.to(batch.tokens.device, non_blocking=True)

    return update_wrapper(get, compute)


@dataclass(frozen=True)
class Sequence:
    """Tokens to run through the model, and which of them are scored.

    `tokens` and `targets` have shape (length,). A target is predicted from all that stands before it, so the first
    token of a sequence without a prefix cannot be one. `prefix` is an index into the group's prefixes.
    """

    tokens: Tokens
    targets: Tensor | Array | SequenceOf[bool]
    prefix: int | None = None

    @classmethod
    def ended(cls, tokens: Tokens, prefix: int | None = None) -> Sequence:
        """Return all the tokens (length,), and an end behind them that alone is a target: what is judged as a whole.

        What would predict the end is the last of the tokens, so that `run.values` gives the value there: a reward. The
        end is of no meaning (token 0) and, like the last token of any sequence, never fed to the model.
        """
        whole = torch.as_tensor(tokens, dtype=torch.int64)
        return cls(F.pad(whole, (0, 1)), torch.arange(len(whole) + 1) == len(whole), prefix)


@dataclass(frozen=True)
class Group:
    """Sequences that stay together: one dialogue, a pair, the G completions of a prompt. Never split.

    `weights` are this group's shares of the denominators that terms name (`{"tokens": 17, "pairs": 1}`). Columns hold
    one value per group, one per sequence (a list), or one per target token (a tensor (targets of the group, ...)).
    `place` says where the row came from, for messages, and for who tells sources apart (`llmtk.data.source_of`).
    """

    sequences: SequenceOf[Sequence]
    weights: Mapping[str, float]
    prefixes: SequenceOf[Tokens] = ()
    per_group: Mapping[str, Any] = field(default_factory=dict)
    per_sequence: Mapping[str, Values] = field(default_factory=dict)
    per_target: Mapping[str, Values] = field(default_factory=dict)
    place: str = ""


@dataclass(frozen=True, eq=False)
class Batch:
    """Groups laid out flat: their prefixes and sequences are segments of one row of tokens.

    Shapes: `tokens`, `targets` (tokens,); `segment_lengths`, `segment_group`, `segment_prefix` (segments,), the last
    holding the segment that a sequence continues, -1 where it stands alone and -2 for a prefix itself; `weights` and
    `per_group` (groups, ...); `per_sequence` (sequences, ...); `per_target` (targets, ...), in the order of tokens.
    """

    tokens: Tensor
    targets: Tensor
    segment_lengths: Tensor
    segment_group: Tensor
    segment_prefix: Tensor
    weights: dict[str, Tensor]
    per_group: dict[str, Tensor]
    per_sequence: dict[str, Tensor]
    per_target: dict[str, Tensor]
    places: list[str]

    @classmethod
    def collate(cls, groups: SequenceOf[Group]) -> Batch:
        """Lay groups out. They must agree in the names of their weights and columns; ValueError otherwise."""
        tokens: list[Tensor] = []
        targets: list[Tensor] = []
        group_of: list[int] = []
        prefix_of: list[int] = []
        for index, group in enumerate(groups):
            first = len(tokens)
            for prefix in group.prefixes:
                tokens.append(torch.as_tensor(prefix, dtype=torch.int64))
                targets.append(torch.zeros(len(tokens[-1]), dtype=torch.bool))
                prefix_of.append(-2)
            for sequence in group.sequences:
                tokens.append(torch.as_tensor(sequence.tokens, dtype=torch.int64))
                targets.append(torch.as_tensor(sequence.targets, dtype=torch.bool))
                prefix_of.append(-1 if sequence.prefix is None else first + sequence.prefix)
                _check_sequence(group, sequence, tokens[-1], targets[-1])
            group_of += [index] * (len(tokens) - first)
            _check_columns(group, targets[first:])
        return cls(
            tokens=torch.cat(tokens) if tokens else torch.zeros(0, dtype=torch.int64),
            targets=torch.cat(targets) if targets else torch.zeros(0, dtype=torch.bool),
            segment_lengths=torch.tensor([len(t) for t in tokens], dtype=torch.int64),
            segment_group=torch.tensor(group_of, dtype=torch.int64),
            segment_prefix=torch.tensor(prefix_of, dtype=torch.int64),
            weights=_column([g.weights for g in groups], dtype=torch.float64),
            per_group=_column([g.per_group for g in groups]),
            per_sequence=_joined([g.per_sequence for g in groups]),
            per_target=_joined([g.per_target for g in groups]),
            places=[g.place for g in groups],
        )

    def __len__(self) -> int:
        """Return the number of groups."""
        return len(self.places)

    @property
    def host(self) -> Batch:
        """This batch on the CPU: the one that was moved to the device, without a copy back."""
        moved: Batch | None = self.__dict__.get("_moved")
        return moved if moved is not None else self.to("cpu")

    @cached_property
    def is_sequence(self) -> Tensor:
        """(segments,) bool: false for prefixes."""
        return self.segment_prefix != -2

    @cached_property
    def segment_starts(self) -> Tensor:
        """(segments,) int64: the index of each segment's first token."""
        return self.segment_lengths.cumsum(0) - self.segment_lengths

    @cached_property
    @_on_host
    def sequence_group(self) -> Tensor:
        """(sequences,) int64: the group of each sequence."""
        return self.segment_group[self.is_sequence]

    @cached_property
    @_on_host
    def target_sequence(self) -> Tensor:
        """(targets,) int64: the sequence that each target token belongs to."""
        sequence_of_segment = self.is_sequence.cumsum(0) - 1
        return sequence_of_segment.repeat_interleave(self.segment_lengths)[self.targets]

    @cached_property
    @_on_host
    def target_counts(self) -> Tensor:
        """(sequences,) int64: target tokens of each sequence."""
        return torch.bincount(self.target_sequence, minlength=int(self.is_sequence.sum()))

    @cached_property
    @_on_host
    def target_positions(self) -> Tensor:
        """(targets,) int64: where in `tokens` each target stands."""
        return self.targets.nonzero().flatten()

    @cached_property
    def target_tokens(self) -> Tensor:
        """(targets,) int64: the token at each target position."""
        return self.tokens[self.target_positions]

    @cached_property
    def group_tokens(self) -> Tensor:
        """(groups,) int64: tokens of each group, prefixes counted once. What a token budget counts."""
        return _sum_by(self.segment_group, self.segment_lengths, len(self))

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """Add up per-target values: (targets,) to (sequences,)."""
        return _sum_by(self.target_sequence, values, len(self.sequence_group))

    def targets_of(self, groups: SequenceOf[int]) -> Tensor:
        """(targets of these groups,) int64: their places among all targets, group after group."""
        target_group = self.sequence_group[self.target_sequence]
        return _members(target_group, torch.as_tensor(groups, dtype=torch.int64), len(self))

    def select(self, groups: SequenceOf[int]) -> Batch:
        """Return a batch of these groups alone, in this order."""
        chosen = torch.as_tensor(groups, dtype=torch.int64)
        segments = _members(self.segment_group, chosen, len(self))
        sequences = _members(self.sequence_group, chosen, len(self))
        targets = _members(self.target_sequence, sequences, len(self.sequence_group))
        lengths = self.segment_lengths[segments]
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        tokens = self.segment_starts[segments].repeat_interleave(lengths) + within
        new_index = torch.full((len(self.segment_lengths),), -1)
        new_index[segments] = torch.arange(len(segments))
        prefix = self.segment_prefix[segments]
        new_group = torch.full((len(self),), -1)
        new_group[chosen] = torch.arange(len(chosen))
        return Batch(
            tokens=self.tokens[tokens],
            targets=self.targets[tokens],
            segment_lengths=lengths,
            segment_group=new_group[self.segment_group[segments]],
            segment_prefix=torch.where(prefix >= 0, new_index[prefix.clamp(min=0)], prefix),
            weights={name: column[chosen] for name, column in self.weights.items()},
            per_group={name: column[chosen] for name, column in self.per_group.items()},
            per_sequence={name: column[sequences] for name, column in self.per_sequence.items()},
            per_target={name: column[targets] for name, column in self.per_target.items()},
            places=[self.places[index] for index in chosen.tolist()],
        )

    def with_columns(
        self,
        *,
        per_group: Mapping[str, Tensor] | None = None,
        per_sequence: Mapping[str, Tensor] | None = None,
        per_target: Mapping[str, Tensor] | None = None,
    ) -> Batch:
        """Return this batch with more columns, (groups, ...) or (sequences, ...) or (targets, ...); else ValueError."""
        targets = int(self.targets.sum())
        sizes = {"per_group": len(self), "per_sequence": len(self.sequence_group), "per_target": targets}
        added = {"per_group": per_group or {}, "per_sequence": per_sequence or {}, "per_target": per_target or {}}
        for kind, columns in added.items():
            for name, column in columns.items():
                if len(column) != sizes[kind]:
                    raise ValueError(f"the column {name!r} has {len(column)} values, {kind} it takes {sizes[kind]}")
        device = self.tokens.device
        moved = {kind: {n: column.to(device) for n, column in columns.items()} for kind, columns in added.items()}
        return replace(self, **{kind: getattr(self, kind) | columns for kind, columns in moved.items()})

    def to(self, device: torch.device | str) -> Batch:
        """Return this batch with every tensor on the device."""
        if self.tokens.device == torch.device(device):
            return self
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=True))
        if self.tokens.device.type == "cpu":
            moved.__dict__["_moved"] = self
        return moved

    def pin_memory(self) -> Batch:
        """Return this batch in pinned memory, from which copies to a CUDA device run beside its work."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Batch:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Batch(**{name: _apply(fn, value) for name, value in values.items()})

    def to_state(self, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return (tensors named with the prefix, JSON), from which `from_state` makes this batch again."""
        tensors: dict[str, Tensor] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                tensors[f"{prefix}{f.name}"] = value
            elif isinstance(value, dict):
                tensors |= {f"{prefix}{f.name}/{name}": column for name, column in value.items()}
        return tensors, {"places": self.places}

    @classmethod
    def from_state(cls, prefix: str, tensors: Mapping[str, Tensor], json: Mapping[str, Any]) -> Batch:
        """Make a batch from what `to_state` gave."""
        values: dict[str, Any] = {name: {} for name in ("weights", "per_group", "per_sequence", "per_target")}
        for key, tensor in tensors.items():
            if key.startswith(prefix):
                name, _, column = key.removeprefix(prefix).partition("/")
                if column:
                    values[name][column] = tensor
                else:
                    values[name] = tensor
        return cls(**values, places=list(json["places"]))


@dataclass(frozen=True)
class Mean:
    """A metric as a sum and a count, so that means over micro-batches, ranks and steps are exact.

    `then="exp"` applies the exponential after the division (perplexity from a sum of negative log-probs). `then="max"`
    is no mean: of several, the one with the largest sum is kept (`Mean.largest`).
    """

    sum: Tensor | float
    count: Tensor | float
    then: Literal["identity", "exp", "max"] = "identity"

    @classmethod
    def largest(cls, value: Tensor | float) -> Mean:
        """Make a metric that is the largest value over micro-batches, ranks and the steps of a line of the log."""
        return cls(value, 1, "max")


@dataclass(frozen=True)
class Term:
    """One term of a loss: a SUM over the micro-batch, the weight that divides it, and its coefficient.

    The loop divides by the named weight's total over the whole window and all ranks, so no stage ever averages.
    """

    sum: Tensor
    per: str
    coefficient: float = 1.0


@dataclass(frozen=True)
class LossOutput:
    """The terms and metrics of one micro-batch. `scores` hands on what was computed, for plugins that add a term."""

    terms: dict[str, Term]
    metrics: dict[str, Mean] = field(default_factory=dict)
    scores: Any = None


@dataclass(frozen=True)
class Round:
    """What `prepare_batch` answers: windows, each of which becomes one optimizer step, and metrics of making them."""

    windows: list[Batch]
    metrics: dict[str, Mean] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: SequenceOf[Group]) -> Round:
        """Make a round of one window: what offline stages answer."""
        return cls([Batch.collate(groups)])


def _check_sequence(group: Group, sequence: Sequence, tokens: Tensor, targets: Tensor) -> None:
    where = f" ({group.place})" if group.place else ""
    if tokens.shape != targets.shape or tokens.ndim != 1:
        raise ValueError(f"tokens {tuple(tokens.shape)} and targets {tuple(targets.shape)} differ in shape{where}")
    if sequence.prefix is not None and not 0 <= sequence.prefix < len(group.prefixes):
        raise ValueError(f"prefix {sequence.prefix} of {len(group.prefixes)} prefixes{where}")
    before = 0 if sequence.prefix is None else len(group.prefixes[sequence.prefix])
    if before + len(tokens) == 0:
        raise ValueError(f"a sequence without a prefix has no tokens{where}")
    if before == 0 and bool(targets[0]):
        raise ValueError(f"the first token of a sequence without a prefix cannot be a target{where}")


def _check_columns(group: Group, targets: SequenceOf[Tensor]) -> None:
    where = f" ({group.place})" if group.place else ""
    kinds = (
        ("sequences", group.per_sequence, len(group.sequences)),
        ("target tokens", group.per_target, sum(int(t.sum()) for t in targets) if group.per_target else 0),
    )
    for kind, columns, wanted in kinds:
        for name, values in columns.items():
            if len(values) != wanted:
                raise ValueError(f"the column {name!r} has {len(values)} values for {wanted} {kind}{where}")


def _names(columns: SequenceOf[Mapping[str, Any]]) -> list[str]:
    names = sorted(columns[0]) if columns else []
    for column in columns:
        if sorted(column) != names:
            raise ValueError(f"groups of one window differ in columns: {names} and {sorted(column)}")
    return names


def _column(columns: SequenceOf[Mapping[str, Any]], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Stack one value per group: {name: (groups, ...)}."""
    return {
        name: torch.stack([torch.as_tensor(column[name], dtype=dtype) for column in columns])
        for name in _names(columns)
    }


def _joined(columns: SequenceOf[Mapping[str, Values]]) -> dict[str, Tensor]:
    """Join values per sequence or target: {name: (all of them, ...)}."""
    joined = {}
    for name in _names(columns):
        values = [torch.as_tensor(column[name]) for column in columns]
        # An empty list has no type: torch takes it for float32, and the whole column would become that.
        joined[name] = torch.cat([value for value in values if len(value)] or values)
    return joined


def _sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    return values.new_zeros(size, *values.shape[1:]).index_add(0, index, values)


def _members(group_of: Tensor, chosen: Tensor, groups: int) -> Tensor:
    """Return the indices of all members of the chosen groups, group after group, members in their own order.

    Members of a group stand next to each other, so each group is a range.
    """
    counts = torch.bincount(group_of, minlength=groups)
    starts = counts.cumsum(0) - counts
    counts, starts = counts[chosen], starts[chosen]
    within = torch.arange(int(counts.sum()), device=counts.device)
    within -= (counts.cumsum(0) - counts).repeat_interleave(counts)
    return starts.repeat_interleave(counts) + within


def _apply(fn: Any, value: Any) -> Any:
    if isinstance(value, Tensor):
        return fn(value)
    return {name: fn(tensor) for name, tensor in value.items()} if isinstance(value, dict) else value
