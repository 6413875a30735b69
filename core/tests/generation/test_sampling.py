"""Generation, against transformers' own, against scoring, and against the distribution that it should draw from."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llmtk import Batch, Group, Sampling, Sequence
from llmtk.generation import generate
from llmtk.generation.sampling import choose
from llmtk.scoring import choose as choose_way
from llmtk.scoring.padded import score
from llmtk.training.randomness import Randomness

from .kit import told

PROMPTS = [[40, 50, 60], [70], [80, 81, 82, 83, 84, 85, 86], [90, 91], [70, 71, 72, 73]]


class Fixed(torch.nn.Module):
    """A model that says the same of every next token."""

    def __init__(self, probabilities):
        super().__init__()
        self.config = SimpleNamespace()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities, dtype=torch.float64).log().float())

    def forward(self, input_ids, **_):
        return SimpleNamespace(logits=self.logits.expand(len(input_ids), 1, -1), past_key_values=None)


def test_greedy_answers_are_those_of_transformers(either):
    """Equal lengths side by side and unequal ones, so that padding on the left must not be felt."""
    answers = generate(either, PROMPTS, Sampling(temperature=0, max_new_tokens=12))
    for prompt, (answer,) in zip(PROMPTS, answers, strict=True):
        whole = either.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
        )
        assert answer.tokens == whole[0, len(prompt) :].tolist()
        assert answer.stopped == "length"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_log_probs_are_those_of_scoring(either, temperature):
    answers = generate(either, PROMPTS, Sampling(n=2, temperature=temperature, max_new_tokens=10, seed=3))
    found = [(prompt, answer) for prompt, copies in zip(PROMPTS, answers, strict=True) for answer in copies]
    groups = [Group([Sequence(a.tokens, [True] * len(a.tokens), 0)], {}, [prompt]) for prompt, a in found]
    logps = torch.tensor([logp for _, answer in found for logp in answer.logps])
    with torch.no_grad():
        torch.testing.assert_close(logps, score(either, Batch.collate(groups)).logps, rtol=0, atol=2e-5)


def test_log_probs_are_those_of_the_distribution_sampled_from(model):
    """Under a temperature, with top_k: the log-softmax of the scaled logits of the k likeliest."""
    sampling = Sampling(temperature=0.7, top_k=5, max_new_tokens=6, seed=1)
    for prompt, (answer,) in zip(PROMPTS, generate(model, PROMPTS, sampling), strict=True):
        ids = torch.tensor([prompt + answer.tokens[:-1]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 :] / 0.7
        top = logits.topk(5)
        at = [indices.tolist().index(token) for indices, token in zip(top.indices, answer.tokens, strict=True)]
        wanted = top.values.log_softmax(-1)[range(6), at]
        torch.testing.assert_close(torch.tensor(answer.logps), wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_a_draw_does_not_depend_on_the_batch_around_it(either, batch_size):
    sampling = {"n": 3, "max_new_tokens": 12, "seed": 7, "top_p": 0.95}
    among_others = generate(either, PROMPTS, Sampling(batch_size=5, **sampling))
    other = generate(either, PROMPTS, Sampling(batch_size=batch_size, **sampling))
    assert [[a.tokens for a in copies] for copies in other] == [[a.tokens for a in copies] for copies in among_others]
    assert generate(either, PROMPTS[:1], Sampling(**sampling))[0][2].tokens == among_others[0][2].tokens


@pytest.mark.parametrize("packed", [True, False])
def test_with_seeds_a_prompts_completions_depend_on_it_and_its_seed_alone(either, packed):
    """Not on the prompts beside it, their order or number, nor on how many copies there are, nor on batch_size."""
    choose_way(either, lambda reason: [reason])
    settings = {"max_new_tokens": 12, "top_p": 0.95, "seed": 1}
    seeds = [11, 12, 13, 14, 15]
    everyone = told(generate(either, PROMPTS, Sampling(n=4, **settings), seeds, packed=packed))
    for prompts, n, batch_size in (([2], 4, 64), ([4, 0], 2, 3), ([3, 2, 1], 6, 1), ([1, 1], 1, 2)):
        sampling = Sampling(n=n, batch_size=batch_size, **(settings | {"seed": n}))
        found = generate(either, [PROMPTS[i] for i in prompts], sampling, [seeds[i] for i in prompts], packed=packed)
        for index, copies in zip(prompts, told(found), strict=True):
            assert copies[:4] == everyone[index][:n]
    other = told(generate(either, PROMPTS[:1], Sampling(n=4, **settings), [99], packed=packed))
    assert other[0] != everyone[0]


def test_seeds_are_one_for_each_prompt(model):
    with pytest.raises(ValueError, match="1 seeds for 5 prompts"):
        generate(model, PROMPTS, Sampling(), [3])
    assert len(generate(model, PROMPTS[:1], Sampling(max_new_tokens=3), [-5])[0][0].tokens) == 3


def test_copies_and_seeds_differ_and_a_seed_repeats(model):
    first, again, other = (generate(model, PROMPTS[:1], Sampling(n=4, seed=seed))[0] for seed in (0, 0, 1))
    texts = [tuple(answer.tokens) for answer in first + other]
    assert len(set(texts)) == 8
    assert first == again


def chi_square(counts: list[int], probabilities: list[float]) -> float:
    total = sum(counts)
    assert all(count == 0 for count, p in zip(counts, probabilities, strict=True) if p == 0)
    return sum((c - total * p) ** 2 / (total * p) for c, p in zip(counts, probabilities, strict=True) if p)


P = [0.4, 0.05, 0.3, 0.01, 0.14, 0.1]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, P),
        ({"temperature": 0.5}, [p**2 / sum(q**2 for q in P) for p in P]),
        ({"top_k": 3}, [0.4 / 0.84, 0, 0.3 / 0.84, 0, 0.14 / 0.84, 0]),
        ({"top_k": 99}, P),
        ({"top_p": 0.7001}, [0.4 / 0.84, 0, 0.3 / 0.84, 0, 0.14 / 0.84, 0]),
        ({"top_p": 0.69}, [4 / 7, 0, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [4 / 7, 0, 3 / 7, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(settings, wanted):
    answers = generate(Fixed(P), [[1]] * 40, Sampling(n=25, max_new_tokens=5, batch_size=1000, seed=11, **settings))
    drawn = [(token, logp) for copies in answers for a in copies for token, logp in zip(a.tokens, a.logps, strict=True)]
    assert len(drawn) == 5000
    counts = [sum(token == v for token, _ in drawn) for v in range(len(P))]
    assert chi_square(counts, wanted) < 25.7  # 5 degrees of freedom: one in 10,000 seeds is beyond
    for token, logp in drawn:
        assert logp == pytest.approx(math.log(wanted[token]), abs=1e-5)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 2), (0.5 - 1e-12, 2), (0.5, 4), (1 - 2**-53, 4)])
def test_a_draw_at_the_very_edge_never_takes_an_impossible_token(uniform, token):
    """Of two tokens with a half each; those before, between and behind them are impossible."""
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    drawn, logp = choose(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert drawn.tolist() == [token]
    assert logp.item() == pytest.approx(-math.log(2))


def test_draws_at_consecutive_positions_and_of_copies_are_independent():
    answers = generate(Fixed([0.5, 0.5]), [[1]] * 50, Sampling(n=20, max_new_tokens=3, batch_size=1000, seed=5))
    rows = [a.tokens for copies in answers for a in copies]
    triples = [sum(row == [i >> 2 & 1, i >> 1 & 1, i & 1] for row in rows) for i in range(8)]
    assert chi_square(triples, [1 / 8] * 8) < 29.9  # 7 degrees of freedom, one in 10,000
    neighbours = [(a[0].tokens[0], a[1].tokens[0]) for a in answers] + [
        (a[2].tokens[0], a[3].tokens[0]) for a in answers
    ]
    pairs = [neighbours.count((i >> 1, i & 1)) for i in range(4)]
    assert chi_square(pairs, [1 / 4] * 4) < 21.1  # 3 degrees of freedom


def test_a_stop_token_ends_a_completion_and_belongs_to_it():
    answers = generate(Fixed(P), [[1]] * 200, Sampling(max_new_tokens=8, stop_tokens=(4, 5), seed=2, batch_size=50))
    endings = set()
    for (answer,) in answers:
        stops = [token in (4, 5) for token in answer.tokens]
        assert len(answer.tokens) == len(answer.logps) <= 8
        assert not any(stops[:-1])
        assert (answer.stopped == "stop") == stops[-1]
        assert stops[-1] or len(answer.tokens) == 8
        endings.add(answer.stopped)
    assert endings == {"stop", "length"}


def test_a_stop_token_changes_nothing_before_it(model):
    free = generate(model, PROMPTS, Sampling(max_new_tokens=12, seed=4))
    stop = free[0][0].tokens[5]
    for (whole,), (cut,) in zip(
        free, generate(model, PROMPTS, Sampling(max_new_tokens=12, seed=4, stop_tokens=(stop,))), strict=True
    ):
        end = whole.tokens.index(stop) + 1 if stop in whole.tokens else 12
        assert cut.tokens == whole.tokens[:end]
        assert cut.logps == pytest.approx(whole.logps[:end], abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_and_the_global_generators_stay(model, training):
    model.train(training)
    before = torch.get_rng_state()
    generate(model, PROMPTS, Sampling(max_new_tokens=2))
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), before)


def test_each_modules_own_mode_stays(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    generate(model, PROMPTS, Sampling(max_new_tokens=2))
    assert [module.training for module in model.modules()] == modes


def test_a_prompt_without_tokens_is_refused(model):
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        generate(model, [[4], []], Sampling())


def test_answers_end_at_the_models_last_position(either):
    """A long prompt beside a short one: each gets the room that it has alone, and the same tokens."""
    prompts = [list(range(10, 70)), [70, 71], list(range(10, 73))]
    sampling = Sampling(temperature=0, max_new_tokens=8)
    together = generate(either, prompts, sampling)
    alone = [generate(either, [prompt], sampling)[0] for prompt in prompts]
    assert [[a.tokens for a in copies] for copies in together] == [[a.tokens for a in copies] for copies in alone]
    assert [len(copies[0].tokens) for copies in together] == [4, 8, 1]
    with pytest.raises(ValueError, match="prompt 0 has 64 tokens; 1 to 63"):
        generate(either, [list(range(10, 74))], sampling)


def test_no_prompts_give_no_completions(model):
    assert generate(model, [], Sampling()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 0},
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"batch_size": 0},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"start at 1"):
        Sampling(**settings)


def test_the_seeds_that_the_page_makes_follow_the_row_and_not_the_rank():
    """Of a row's place and of the round: whichever rank has the row, and others in the next round."""
    page = (Path(__file__).parents[3] / "docs" / "generation.md").read_text()
    (block,) = (text for text in re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S) if "def seeds_of" in text)
    exec(block, names := {})
    rows = [{"place": f"rows.jsonl:{number}"} for number in range(4)]
    one, *ranks = [SimpleNamespace(generator=Randomness(0, rank).generator) for rank in (0, 0, 1)]
    first, second = [names["seeds_of"](one, rows) for _ in range(2)]
    shares = [[names["seeds_of"](rank, rows[index::2]) for index, rank in enumerate(ranks)] for _ in range(2)]
    assert len({*first, *second}) == 8
    assert [seed for pair in zip(*shares[0], strict=True) for seed in pair] == first
    assert [names["seeds_of"](rank, []) for rank in ranks] == [[], []]
    assert shares[1][1] == second[1::2]
