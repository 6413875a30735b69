"""One draw: the distribution against transformers' own processors, and the search for a token in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmtk.generation import Sampling
from llmtk.generation.sampling import CHUNK, choose, uniform_numbers

DRAWS = 4000


def logits_of(vocabulary: int, seed: int = 0, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def grid(rows: int) -> torch.Tensor:
    """Return numbers in [0, 1) at equal distances."""
    return (torch.arange(rows, dtype=torch.float64) + 0.5) / rows


@pytest.mark.parametrize(
    ("settings", "processors"),
    [
        ({"min_p": 0.1}, [MinPLogitsWarper(0.1)]),
        ({"min_p": 1.0}, [MinPLogitsWarper(1.0)]),
        ({"min_p": 0.02, "temperature": 1.7}, [TemperatureLogitsWarper(1.7), MinPLogitsWarper(0.02)]),
        ({"repetition_penalty": 1.3}, [RepetitionPenaltyLogitsProcessor(1.3)]),
        ({"repetition_penalty": 0.6}, [RepetitionPenaltyLogitsProcessor(0.6)]),
        (
            {"repetition_penalty": 2.0, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05},
            [
                RepetitionPenaltyLogitsProcessor(2.0),
                TemperatureLogitsWarper(0.8),
                TopKLogitsWarper(30),
                TopPLogitsWarper(0.9),
                MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_the_distribution_is_that_of_transformers(settings, processors):
    """Of draws at equal distances, each token has its share to within one."""
    logits, before = logits_of(60), [3, 3, 17, 40]
    wanted = LogitsProcessorList(processors)(torch.tensor([before]), logits).log_softmax(-1)[0]
    assert not torch.allclose(wanted, logits.log_softmax(-1)[0])
    tokens, logps = choose(logits.expand(DRAWS, -1), grid(DRAWS), Sampling(**settings), [before] * DRAWS)
    torch.testing.assert_close(logps, wanted[tokens], rtol=0, atol=1e-5)
    counts = torch.bincount(tokens, minlength=60)
    assert (counts - DRAWS * wanted.exp()).abs().max() <= 1.01


def test_each_row_is_penalised_for_its_own_tokens():
    logits = logits_of(20).expand(2, -1)
    before = [[1, 2], [3]]
    tokens, logps = choose(logits, torch.tensor([0.3, 0.3]).double(), Sampling(repetition_penalty=5.0), before)
    for row in range(2):
        alone = choose(
            logits[:1], torch.tensor([0.3]).double(), Sampling(repetition_penalty=5.0), before[row : row + 1]
        )
        assert (tokens[row], logps[row]) == (alone[0][0], alone[1][0])


def test_the_likeliest_token_is_so_after_the_penalty():
    logits = torch.tensor([[2.0, 1.9, -1.0]])
    token, logp = choose(logits, torch.tensor([0.9]).double(), Sampling(temperature=0, repetition_penalty=2.0), [[0]])
    assert token.tolist() == [1]
    assert logp.item() == pytest.approx(torch.tensor([1.0, 1.9, -1.0]).log_softmax(-1)[1].item())


@pytest.mark.parametrize("vocabulary", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 5 * CHUNK + 37])
@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_the_search_in_chunks_finds_what_one_sum_over_all_finds(vocabulary, spread):
    logits = logits_of(vocabulary, seed=1, spread=spread)
    logits[0, vocabulary // 2 + 1 :: 3] = -torch.inf
    uniform = torch.from_numpy(np.random.default_rng(0).random(2000))
    tokens, logps = choose(logits.expand(2000, -1), uniform, Sampling())
    sums = logits.double().softmax(-1)[0].cumsum(0)
    wanted = torch.searchsorted(sums, uniform * sums[-1], right=True)
    assert torch.equal(tokens, wanted)
    torch.testing.assert_close(logps, logits.log_softmax(-1)[0, tokens], rtol=0, atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("only", [0, CHUNK - 1, CHUNK, 2 * CHUNK, 2 * CHUNK + 4])
def test_the_only_possible_token_is_drawn_wherever_it_stands(only, uniform):
    logits = torch.full((1, 2 * CHUNK + 5), -torch.inf)
    logits[0, only] = 3.0
    token, logp = choose(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert token.tolist() == [only]
    assert logp.item() == 0


@pytest.mark.parametrize("vocabulary", [5, CHUNK, 2 * CHUNK + 5])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_a_token_and_a_log_prob_that_is_not_finite(vocabulary, bad, temperature):
    """A row of a batch must not bring the others down, nor one rank all of them."""
    logits = logits_of(vocabulary).repeat(2, 1)
    logits[0, 1] = bad
    tokens, logps = choose(logits, torch.tensor([0.7, 0.7]).double(), Sampling(temperature=temperature))
    assert 0 <= tokens[0] < vocabulary
    assert logps[0].isnan()
    alone = choose(logits[1:], torch.tensor([0.7]).double(), Sampling(temperature=temperature))
    assert (tokens[1], logps[1]) == (alone[0][0], alone[1][0])


def test_random_numbers_are_those_of_seed_and_sequence_at_any_length():
    long = uniform_numbers(Sampling(max_new_tokens=50), 3, 4)
    assert np.array_equal(uniform_numbers(Sampling(max_new_tokens=7, n=9, batch_size=1), 3, 4), long[:7])
    others = [uniform_numbers(Sampling(max_new_tokens=50), *pair) for pair in ((4, 3), (3, 5), (-3, 4), (2**64 - 1, 4))]
    assert len({tuple(numbers) for numbers in (long, *others)}) == 5
