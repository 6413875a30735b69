"""NEFTune: how large the noise is, that it is there in training and nowhere else, and that runs go on to the bit."""

from __future__ import annotations

import math

import pytest
import torch

from llmtk import Batch, ConfigurationError, Group, Sequence
from llmtk.run import Interrupted
from llmtk.scoring import packed, padded
from llmtk.training.neftune import EmbeddingNoise

from .kit import EVAL, Lm, assert_same_run, make, series, weights
from .test_resume import StopAt

ALPHA = 5.0
LENGTHS = (3, 11, 40)


class Noisy(Lm):
    honours = frozenset({"neftune_noise_alpha"})


def behind(*lengths, prefix=()):
    """Return a group of sequences of these lengths, behind a prefix or alone; every token but the first a target."""
    tokens = [torch.arange(length) % 90 for length in lengths]
    targets = [torch.arange(length) > 0 for length in lengths]
    index = 0 if prefix else None
    return Group([Sequence(*pair, index) for pair in zip(tokens, targets, strict=True)], {}, [prefix] if prefix else [])


def noise_on(model, batch, way):
    """Return the noise (tokens as they are fed, width) and the ids beside it, of one forward."""
    seen = []
    generator = torch.Generator().manual_seed(0)
    noise = EmbeddingNoise(model, ALPHA, lambda: generator)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, arguments, out: seen.append((arguments[0], out.detach())))

    def root(**inputs):
        with noise.on(batch, inputs):
            return model(**inputs)

    way.score(root, batch)
    ((ids, embedded),) = seen
    return ids, embedded - embeddings.weight.detach()[ids]


@pytest.mark.parametrize("way", [padded, packed])
def test_noise_is_scaled_by_each_sequences_own_length(model, way):
    if way is packed:
        packed.patch(model)
    batch = Batch.collate([behind(length) for length in LENGTHS])
    _, noise = noise_on(model, batch, way)
    width = noise.shape[-1]
    rows = noise if way is padded else torch.split(noise[0], [length - 1 for length in LENGTHS])
    for row, length in zip(rows, LENGTHS, strict=True):
        row, bound = row[: length - 1], ALPHA / math.sqrt(length * width)
        assert row.abs().max() <= bound * (1 + 1e-4)
        assert row.abs().max() > 0.9 * bound
        assert float(row.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert abs(float(row.mean())) < 0.2 * bound


def test_a_shared_prefix_has_the_noise_of_the_longest_behind_it(model):
    packed.patch(model)
    batch = Batch.collate([behind(4, 20, prefix=list(range(10)))])
    _, noise = noise_on(model, batch, packed)
    width = noise.shape[-1]
    for part, length in zip(torch.split(noise[0], [10, 3, 19]), (30, 14, 30), strict=True):
        assert 0.9 < float(part.abs().max()) / (ALPHA / math.sqrt(length * width)) <= 1 + 1e-4


def test_two_forwards_have_noise_of_their_own(model):
    batch = Batch.collate([behind(9)])
    generator = torch.Generator().manual_seed(0)
    noise, seen = EmbeddingNoise(model, ALPHA, lambda: generator), []
    for _ in range(2):
        with noise.on(batch, {}):
            seen.append(model(input_ids=torch.arange(9)[None]).logits)
    seen += [model(input_ids=torch.arange(9)[None]).logits for _ in range(2)]
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])


def test_noise_is_in_training_alone(tmp_path):
    """At a learning rate of zero, evaluations and what is exported are as without it, and losses are not."""
    settings = {"eval": EVAL, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1, "learning_rate": 0.0}
    noisy, plain = (make(tmp_path / str(alpha), Noisy, neftune_noise_alpha=alpha, **settings) for alpha in (9.0, None))
    for run in (noisy, plain):
        run.train()
    assert series(noisy, "eval_loss") == series(plain, "eval_loss")
    assert all(a != b for a, b in zip(series(noisy, "loss"), series(plain, "loss"), strict=True))
    assert torch.equal(weights(noisy)["model.embed_tokens.weight"], weights(plain)["model.embed_tokens.weight"])


def test_scoring_a_window_without_gradient_has_none(tmp_path):
    run = make(tmp_path / "run", Noisy, neftune_noise_alpha=9.0)
    run._set_up()
    window = run.hooks.prepare_batch(run.next_rows()).windows[0]
    assert torch.equal(run.score_window(window).logps, run.score_window(window).logps)
    assert not torch.equal(run.score(window).logps, run.score(window).logps)


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_a_run_with_noise_goes_on_to_the_bit(tmp_path, scoring):
    settings = {"neftune_noise_alpha": 5.0, "scoring": scoring, "logging_steps": 1, "gradient_checkpointing": True}
    whole = make(tmp_path / "whole", Noisy, **settings)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", Noisy, plugins=[StopAt(2)], **settings).train()
    parts = make(tmp_path / "parts", Noisy, resume="auto", **settings)
    parts.train()
    assert_same_run(whole, parts)


def test_an_adapter_hears_the_noise_too(tmp_path, folder):
    settings = {"model": folder, "sections": {"peft": {"r": 2}}, "logging_steps": 1, "max_steps": 1}
    losses = []
    for alpha in (5.0, None):
        run = make(tmp_path / str(alpha), Noisy, neftune_noise_alpha=alpha, **settings)
        run.train()
        losses += series(run, "loss")
    assert losses[0] != losses[1]


def test_stages_that_do_not_declare_it_refuse_it(tmp_path):
    with pytest.raises(ConfigurationError, match=r"neftune_noise_alpha: the stage lm does not use it"):
        make(tmp_path / "run", neftune_noise_alpha=5.0)
    for stage in ("sft", "pt"):
        make(tmp_path / stage, stage, neftune_noise_alpha=5.0)
