"""Packed generation against the plain way and against scoring; how many tokens it computes; odd combinations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmtk.generation import Sampling, cache, generate
from llmtk.generation.cache import Prefill, Step
from llmtk.scoring import packed, padded

from .kit import (
    PACKED,
    PROMPTS,
    VOCABULARY,
    WINDOW,
    adapted,
    batch_of,
    build,
    forwards,
    logps_of,
    patched,
    rescored,
    told,
    write,
)

TOLERANCE = 2e-5
"""Between log-probs in float32."""


@pytest.fixture(scope="module")
def llama():
    return patched(build("llama"))


def same(found, expected):
    assert told(found) == told(expected)
    torch.testing.assert_close(logps_of(found), logps_of(expected), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_writes_what_the_plain_way_writes_and_scoring_says_the_same(kind, tuning):
    """Completions and one prompt are longer than the windows; some end early, and others take their places."""
    root = build(kind) if tuning == "full" else adapted(build(kind))
    stops = tuple(range(0, VOCABULARY, 17))
    settings = Sampling(n=3, max_new_tokens=2 * WINDOW, batch_size=4, seed=3, stop_tokens=stops)
    plain = generate(root, PROMPTS, replace(settings, batch_size=64))
    assert {answer.stopped for copies in plain for answer in copies} == {"stop", "length"}
    found = generate(patched(root), PROMPTS, settings, packed=True)
    same(found, plain)
    torch.testing.assert_close(logps_of(found), rescored(root, PROMPTS, found), rtol=0, atol=TOLERANCE)


def test_a_heads_bias_is_felt():
    root = patched(build("phi", PACKED["llama"]))
    assert root.lm_head.bias.abs().max() > 0.1
    settings = {"n": 2, "max_new_tokens": 8}
    same(write(root, **settings), generate(root, PROMPTS, Sampling(**settings)))


@pytest.mark.parametrize("way", [padded, packed])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])
def test_log_probs_of_a_whole_distribution_are_those_of_scoring_at_its_temperature(kind, way):
    root = patched(build(kind))
    settings = {"n": 2, "temperature": 0.6, "max_new_tokens": 6}
    assert Sampling(**settings).is_whole
    found = write(root, **settings)
    with torch.no_grad():
        expected = way.score(root, batch_of(PROMPTS, found), temperature=0.6).logps
    torch.testing.assert_close(logps_of(found), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_what_is_cut_is_no_whole_distribution(llama, cut):
    assert not Sampling(**cut).is_whole
    assert not Sampling(temperature=0).is_whole
    found = write(llama, max_new_tokens=6, **cut)
    assert (logps_of(found) - rescored(llama, PROMPTS, found)).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", [{"sliding_window": None}, {"softcap": None}])
def test_windows_and_caps_are_felt_in_what_is_compared(wrong, monkeypatch):
    """Else the test above could not fail."""
    root = patched(build("gemma2"))
    attend = Step.attend
    monkeypatch.setattr(Step, "attend", lambda self, *states, **settings: attend(self, *states, **(settings | wrong)))
    found = write(root, n=3, max_new_tokens=2 * WINDOW, batch_size=4, seed=3)
    assert (logps_of(found) - rescored(root, PROMPTS, found)).abs().max() > 1e-2


def test_each_prompt_is_computed_once_and_each_token_once(llama):
    """A completion's last token predicts nothing, and is not computed."""
    with forwards(llama) as seen:
        answers = write(llama, n=5, max_new_tokens=9, batch_size=3, seed=1)
    prefills = [layout for layout in seen if isinstance(layout, Prefill)]
    fed = [row for layout in prefills for row in torch.split(layout.ids[0], layout.lengths)]
    assert sorted(row.tolist() for row in fed) == sorted(PROMPTS)
    tokens = sum(layout.ids.shape[1] for layout in seen if isinstance(layout, Step))
    assert tokens == sum(len(answer.tokens) - 1 for copies in answers for answer in copies)


def test_what_ends_leaves_and_what_waits_enters(llama):
    free = write(llama, n=4, max_new_tokens=12, seed=2)
    stops = tuple({copies[0].tokens[2] for copies in free})
    with forwards(llama) as seen:
        answers = write(llama, n=4, max_new_tokens=12, seed=2, stop_tokens=stops, batch_size=4)
    assert told(answers) == told(generate(llama, PROMPTS, Sampling(n=4, max_new_tokens=12, seed=2, stop_tokens=stops)))
    rows = [layout.ids.shape[1] for layout in seen if isinstance(layout, Step)]
    assert max(rows) == 4
    assert sum(rows) == sum(len(answer.tokens) - 1 for copies in answers for answer in copies)
    # Twenty completions by fours: had nobody entered before all four were done, there would be as many steps as the
    # longest of each four has tokens.
    lengths = [
        len(a.tokens) - 1
        for _, copies in sorted(zip(PROMPTS, answers, strict=True), key=lambda pair: -len(pair[0]))
        for a in copies
    ]
    assert len(rows) < sum(max(lengths[start : start + 4]) for start in range(0, 20, 4))


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_a_draw_does_not_depend_on_the_batch_around_it(kind, batch_size):
    root = patched(build(kind))
    settings = {"n": 6, "max_new_tokens": 10, "seed": 7, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}
    same(write(root, batch_size=batch_size, **settings), generate(root, PROMPTS, Sampling(batch_size=30, **settings)))


def test_more_copies_than_there_is_room_for_side_by_side(llama):
    with forwards(llama) as seen:
        found = write(llama, PROMPTS[:1], n=10, max_new_tokens=5, batch_size=3)
    assert sum(isinstance(layout, Prefill) for layout in seen) == 1
    same(found, generate(llama, PROMPTS[:1], Sampling(n=10, max_new_tokens=5)))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_sequences_may_end_with_their_very_first_token(llama, batch_size):
    """All of them, then some of them."""
    everything = tuple(range(VOCABULARY))
    with forwards(llama) as seen:
        found = write(llama, n=2, max_new_tokens=5, stop_tokens=everything, batch_size=batch_size)
    assert [answer.stopped for copies in found for answer in copies] == ["stop"] * 10
    assert all(len(answer.tokens) == 1 for copies in found for answer in copies)
    assert all(isinstance(layout, Prefill) for layout in seen)
    half = {"n": 4, "max_new_tokens": 6, "stop_tokens": everything[::2], "seed": 5}
    same(write(llama, batch_size=batch_size, **half), generate(llama, PROMPTS, Sampling(**half)))
    same(write(llama, n=3, max_new_tokens=1), generate(llama, PROMPTS, Sampling(n=3, max_new_tokens=1)))


def test_prompts_of_very_different_lengths_stand_side_by_side():
    root = patched(build("mistral"))
    prompts = [[5], list(range(3, 93)), [6, 7], list(range(10, 60)), [8] * 9]
    settings = {"n": 3, "max_new_tokens": 12, "seed": 1}
    found = write(root, prompts, batch_size=4, **settings)
    same(found, generate(root, prompts, Sampling(batch_size=4, **settings)))
    torch.testing.assert_close(logps_of(found), rescored(root, prompts, found), rtol=0, atol=TOLERANCE)


def test_prompts_that_nobody_continues_leave_the_cache_while_others_go_on(llama, monkeypatch):
    kept = []
    keep = cache.Cache.keep_prompts

    def keep_prompts(self, prompts):
        keep(self, prompts)
        kept.append((len(prompts), len(self.lengths), self.layers[0].prompt_keys.shape))

    monkeypatch.setattr(cache.Cache, "keep_prompts", keep_prompts)
    prompts = [*PROMPTS, *([token] * 3 for token in range(3, 20))]
    free = write(llama, prompts, max_new_tokens=20, seed=9)
    stops = tuple({copies[0].tokens[3] for copies in free})
    settings = {"n": 2, "max_new_tokens": 20, "seed": 9, "stop_tokens": stops}
    found = write(llama, prompts, batch_size=40, **settings)
    same(found, generate(llama, prompts, Sampling(**settings)))
    torch.testing.assert_close(logps_of(found), rescored(llama, prompts, found), rtol=0, atol=TOLERANCE)
    assert any(0 < prompts_left < len(prompts) and sequences for prompts_left, sequences, _ in kept)
    assert all(shape[0] == prompts_left for prompts_left, _, shape in kept)
    assert kept[-1][:2] == (0, 0)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_completions_outgrow_the_room_that_there_was(kind, monkeypatch):
    """Room is kept for 64 tokens at first; the prompts leave 90 and more."""
    root = patched(build(kind))
    rooms = []
    reserve = cache.Cache.reserve
    monkeypatch.setattr(
        cache.Cache, "reserve", lambda self: (reserve(self), rooms.append(self.layers[0].keys.shape[2]))
    )
    prompts = [[5, 6], [7] * 20]
    found = write(root, prompts, n=2, max_new_tokens=90, seed=4, batch_size=3)
    assert {64, 128} <= set(rooms)
    assert [len(answer.tokens) for copies in found for answer in copies] == [90] * 4
    torch.testing.assert_close(logps_of(found), rescored(root, prompts, found), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_completions_end_at_the_models_last_position(kind):
    last = {"n_positions": 24} if kind == "gpt2" else {"max_position_embeddings": 24}
    root = patched(build(kind, **last))
    prompts = [[5] * 20, [6], [7] * 23]
    found = write(root, prompts, n=2, max_new_tokens=8)
    assert [[len(answer.tokens) for answer in copies] for copies in found] == [[4, 4], [8, 8], [1, 1]]
    same(found, generate(root, prompts, Sampling(n=2, max_new_tokens=8)))
    with pytest.raises(ValueError, match="prompt 1 has 24 tokens; 1 to 23"):
        write(root, [[5], [6] * 24])


def test_prefills_of_many_tokens_are_cut(llama, monkeypatch):
    monkeypatch.setattr("llmtk.generation.packed.PREFILL_TOKENS", 6)
    with forwards(llama) as seen:
        found = write(llama, n=2, max_new_tokens=4, seed=1)
    assert sum(isinstance(layout, Prefill) for layout in seen) > 1
    same(found, generate(llama, PROMPTS, Sampling(n=2, max_new_tokens=4, seed=1)))


def test_no_prompts_give_no_completions_and_no_forward(llama):
    with forwards(llama) as seen:
        assert write(llama, []) == []
    assert not seen


def test_modes_gradients_and_the_global_generators_stay(llama):
    llama.train()
    llama.model.layers[0].eval()
    modes = [module.training for module in llama.modules()]
    before = torch.get_rng_state()
    write(llama, max_new_tokens=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in llama.modules()] == modes
    llama.eval()
    assert all(parameter.grad is None for parameter in llama.parameters())
