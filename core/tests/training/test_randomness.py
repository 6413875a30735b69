"""Generators: one for each purpose, kept in checkpoints, undisturbed by what is done aside."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from llmtk.training.randomness import Randomness, derive


def draws(randomness: Randomness, *purposes: str) -> list[float]:
    """Draw from every generator that a run has."""
    own = [torch.rand(1, generator=randomness.generator(purpose)).item() for purpose in purposes]
    return [*own, torch.rand(1).item(), np.random.normal(), np.random.rand(), random.random(), random.gauss(0, 1)]


def saved(randomness: Randomness):
    """Return the state as a checkpoint would give it back."""
    tensors, rest = randomness.state()
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(rest))


def test_purposes_ranks_and_seeds():
    def first(seed, rank):
        return dict(zip(("data", "noise", "global"), draws(Randomness(seed, rank), "data", "noise"), strict=False))

    base, rank, seed = first(0, 0), first(0, 1), first(1, 0)
    assert len({*base.values(), *seed.values()}) == 6
    # A purpose's own generator is equal on all ranks; the global ones (dropout) are not.
    assert (rank["data"], rank["noise"]) == (base["data"], base["noise"])
    assert rank["global"] != base["global"]


def test_a_purpose_is_independent_of_whether_others_are_drawn_from():
    alone, among = Randomness(0, 0), Randomness(0, 0)
    draws(among, "other")
    assert torch.rand(5, generator=alone.generator("mine")).equal(torch.rand(5, generator=among.generator("mine")))


def test_derived_seeds_fit_every_generator():
    seeds = {derive(seed, purpose) for seed in (0, 1, -1, 2**63) for purpose in ("a", "b")}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("before", range(3))
def test_all_draws_go_on_from_a_state_that_was_json(before):
    """At any number of draws before: numpy and Python keep a spare normal number at odd ones."""
    randomness = Randomness(7, 1)
    for _ in range(before):
        draws(randomness, "a")
    state = saved(randomness)
    first = [draws(randomness, "a", "b") for _ in range(3)]
    again = Randomness(99, 0)
    draws(again, "a", "b")
    again._seed = 7
    again.restore(*state)
    assert [draws(again, "a", "b") for _ in range(3)] == first


def test_what_is_done_aside_is_not_felt():
    randomness = Randomness(7, 0)
    draws(randomness, "a")
    state = saved(randomness)
    wanted = [draws(randomness, "a", "b") for _ in range(2)]

    randomness.restore(*state)
    with randomness.aside("evaluation"):
        inside = [draws(randomness, "a", "b", "c"), draws(randomness, "a")]
        with randomness.aside("samples"):
            draws(randomness, "a", "d")
        inside.append(draws(randomness, "a"))
    assert [draws(randomness, "a", "b") for _ in range(2)] == wanted

    randomness.restore(*state)
    with randomness.aside("evaluation"):  # what is inside repeats, with a nested one or without
        assert [draws(randomness, "a", "b", "c"), draws(randomness, "a"), draws(randomness, "a")] == inside
    with randomness.aside("other"):
        assert draws(randomness, "a", "b", "c") != inside[0]


def test_what_fails_aside_is_not_felt_either():
    randomness = Randomness(7, 0)
    state = saved(randomness)
    wanted = draws(randomness, "a")
    randomness.restore(*state)

    def fail():
        with randomness.aside("evaluation"):
            draws(randomness, "a")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert draws(randomness, "a") == wanted
