"""Batches: laid out, cut, saved and summed, against plain Python loops."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtk import Batch, Group, Mean, Round, Sequence
from llmtk.training.state import round_from_state, round_to_state


def random_group(rng: np.random.Generator, place: str) -> Group:
    prefixes = [rng.integers(0, 99, rng.integers(1, 5)) for _ in range(rng.integers(0, 3))]
    sequences = []
    for _ in range(rng.integers(1, 4)):
        length = rng.integers(1, 7)
        prefix = int(rng.integers(0, len(prefixes))) if prefixes and rng.random() < 0.7 else None
        targets = rng.random(length) < 0.6
        targets[0] &= prefix is not None
        sequences.append(Sequence(rng.integers(0, 99, length), targets, prefix))
    count = sum(int(sequence.targets.sum()) for sequence in sequences)
    return Group(
        sequences,
        {"tokens": count, "share": float(rng.random())},
        prefixes,
        per_group={"label": bool(rng.random() < 0.5), "pair": rng.random(2)},
        per_sequence={"rank": rng.integers(0, 9, len(sequences))},
        per_target={"teacher": rng.random((count, 2)), "hit": rng.random(count) < 0.5},
        place=place,
    )


def random_groups(seed: int) -> list[Group]:
    rng = np.random.default_rng(seed)
    return [random_group(rng, f"row {index}") for index in range(rng.integers(1, 6))]


def assert_same(a: Batch, b: Batch) -> None:
    for field in fields(Batch):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(mine, list):
            assert mine == other
            continue
        if isinstance(mine, torch.Tensor):
            mine, other = {"": mine}, {"": other}
        assert mine.keys() == other.keys()
        for name in mine:
            assert mine[name].dtype == other[name].dtype, (field.name, name)
            assert torch.equal(mine[name], other[name]), (field.name, name)


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=60, deadline=None)
@given(seeds, st.data())
def test_selected_groups_are_those_groups_collated(seed, data):
    groups = random_groups(seed)
    chosen = data.draw(st.permutations(range(len(groups))))[: data.draw(st.integers(1, len(groups)))]
    assert_same(Batch.collate(groups).select(chosen), Batch.collate([groups[index] for index in chosen]))


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_what_is_selected_twice_comes_back_whole(seed):
    batch = Batch.collate(random_groups(seed))
    middle = len(batch) // 2
    order = [*range(middle, len(batch)), *range(middle)]
    back = sorted(range(len(batch)), key=order.__getitem__)
    assert_same(batch.select(order).select(back), batch)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_indices_and_sums_are_those_of_loops_over_groups(seed):
    groups = random_groups(seed)
    batch = Batch.collate(groups)

    target_sequence, target_tokens, sequence_group, group_tokens, tokens = [], [], [], [], []
    for index, group in enumerate(groups):
        group_tokens.append(sum(map(len, group.prefixes)) + sum(len(s.tokens) for s in group.sequences))
        tokens += [token for prefix in group.prefixes for token in prefix.tolist()]
        for sequence in group.sequences:
            tokens += sequence.tokens.tolist()
            target_sequence += [len(sequence_group)] * int(sequence.targets.sum())
            target_tokens += sequence.tokens[sequence.targets].tolist()
            sequence_group.append(index)
    values = torch.rand(len(target_sequence), 3, dtype=torch.float64)
    sums = torch.zeros(len(sequence_group), 3, dtype=torch.float64)
    for sequence, value in zip(target_sequence, values, strict=True):
        sums[sequence] += value

    assert batch.tokens.tolist() == tokens
    assert batch.target_sequence.tolist() == target_sequence
    assert batch.target_tokens.tolist() == target_tokens
    assert batch.target_counts.tolist() == [target_sequence.count(s) for s in range(len(sequence_group))]
    assert batch.sequence_group.tolist() == sequence_group
    assert batch.group_tokens.tolist() == group_tokens
    assert torch.allclose(batch.sum_by_sequence(values), sums, rtol=1e-15, atol=0)
    assert batch.weights["tokens"].tolist() == [group.weights["tokens"] for group in groups]
    assert batch.per_target["hit"].tolist() == [hit for group in groups for hit in group.per_target["hit"]]
    assert batch.per_sequence["rank"].tolist() == [rank for group in groups for rank in group.per_sequence["rank"]]
    assert torch.equal(batch.per_group["pair"], torch.tensor(np.stack([group.per_group["pair"] for group in groups])))


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_a_round_comes_back_from_its_tensors_and_json(seed):
    groups = random_groups(seed)
    windows = [Batch.collate(groups), Batch.collate(groups[:1])]
    round = Round(windows, {"kl": Mean(torch.tensor(2.0), 3), "ppl": Mean(1.0, 2.0, then="exp")})
    again = round_from_state(*round_to_state(round))
    for mine, other in zip(again.windows, windows, strict=True):
        assert_same(mine, other)
    assert again.metrics == {"kl": Mean(2.0, 3.0), "ppl": Mean(1.0, 2.0, then="exp")}


def test_weights_are_counted_in_float64():
    huge = 2**53 - 1
    batch = Batch.collate([Group([Sequence([1], [False])], {"tokens": huge})])
    assert batch.weights["tokens"].dtype == torch.float64
    assert int(batch.weights["tokens"].sum()) == huge


def test_an_empty_batch_has_no_groups_and_survives_being_cut_and_saved():
    empty = Batch.collate([])
    assert len(empty) == len(empty.tokens) == len(empty.target_counts) == 0
    assert_same(empty.select([]), empty)
    tensors, json = empty.to_state("a/")
    assert_same(Batch.from_state("a/", tensors, json), empty)


def test_a_column_without_values_in_one_group_keeps_its_type():
    def group(ids, targets):
        return Group([Sequence(ids, targets)], {}, per_target={"teacher": [7] * sum(targets)})

    batch = Batch.collate([group([1], [False]), group([1, 2, 3], [False, True, True])])
    assert batch.per_target["teacher"].dtype == torch.int64
    assert batch.per_target["teacher"].tolist() == [7, 7]


SOUND = Sequence([1, 2, 3], [False, True, True])


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([Group([Sequence([1, 2], [False])], {}, place="a.jsonl:7")], r"differ in shape \(a.jsonl:7\)"),
        ([Group([Sequence([1, 2], [True, True])], {}, place="a.jsonl:7")], r"first token .* \(a.jsonl:7\)"),
        ([Group([Sequence([1, 2], [True, True], prefix=0)], {}, [[]], place="b")], r"first token .*\(b\)"),
        ([Group([Sequence([], [])], {}, place="b")], r"no tokens \(b\)"),
        ([Group([Sequence([1], [False], prefix=1)], {}, [[5]])], "prefix 1 of 1"),
        ([Group([Sequence([1], [False], prefix=-1)], {}, [[5]])], "prefix -1 of 1"),
        ([Group([SOUND], {"tokens": 2}), Group([SOUND], {"pairs": 1})], "differ in columns"),
        (
            [Group([SOUND], {}, per_sequence={"a": [1, 2]}, place="c")],
            r"column 'a' has 2 values for 1 sequences.*\(c\)",
        ),
        ([Group([SOUND], {}, per_target={"a": [1.0]}, place="c")], r"column 'a' has 1 values for 2 target.*\(c\)"),
    ],
)
def test_groups_that_do_not_fit_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        Batch.collate(groups)
