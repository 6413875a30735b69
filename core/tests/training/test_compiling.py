"""torch.compile: layers that give what they gave, and models that are left as they were, with the reason."""

from __future__ import annotations

import pytest
import torch

from llmtk import scoring
from llmtk.scoring import proof
from llmtk.training import compiling
from llmtk.training.compiling import compile_layers, layers_of

from .kit import GPT2, Lm, make, series


def alone(value):
    return [value]


def is_compiled(model):
    return [layer._compiled_call_impl is not None for layer in layers_of(model)]


def test_compiled_layers_score_as_before(model):
    scorer = scoring.choose(model, alone)
    batch = proof._probe(model.config)
    before = scorer.score(model, batch).logps
    assert compile_layers(model, scorer, alone, backend="eager") is None
    assert is_compiled(model) == [True, True]
    torch.testing.assert_close(scorer.score(model, batch).logps, before)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["", "padded is wanted"], ids=["packed", "padded"])
def test_a_run_with_compiled_layers_has_the_same_losses(tmp_path, capsys, way):
    losses = {}
    for backend in ("eager", None):
        how = {"scoring": "padded"} if way else {}
        settings = {"torch_compile_backend": backend, "logging_steps": 1, "max_steps": 2} | how
        run = make(tmp_path / str(backend), **settings)
        run.train()
        assert is_compiled(run.model) == [backend is not None] * 2
        losses[backend] = series(run, "loss")
    assert losses["eager"] == pytest.approx(losses[None], rel=1e-5)
    assert "compiled   the layers, proven on this model" in capsys.readouterr().out


@pytest.mark.slow
def test_inductor_gives_the_same(tmp_path):
    losses = []
    for compiles in (True, False):
        run = make(tmp_path / str(compiles), torch_compile=compiles, logging_steps=1, max_steps=3)
        run.train()
        assert run.forward.compiled is compiles
        losses.append(series(run, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_cannot_be_compiled_is_left_as_it_was_with_the_reason(tmp_path, capsys):
    run = make(tmp_path / "run", torch_compile_backend="no-such-thing", max_steps=1)
    run.train()
    assert not any(is_compiled(run.model))
    said = capsys.readouterr().out
    assert "train.torch_compile is left out, the model computes as without: it cannot be compiled (" in said
    assert "no-such-thing" in said
    assert "compiled  " not in said


def wrong_by(amount):
    """Return a backend that is off by a little in each result."""

    def backend(graph, inputs):
        def run(*arguments):
            return tuple(
                out * (1 + amount) if torch.is_tensor(out) and out.is_floating_point() else out
                for out in graph(*arguments)
            )

        return run

    return backend


def test_a_compiler_that_is_wrong_is_found_out(model):
    scorer = scoring.choose(model, alone)
    reason = compile_layers(model, scorer, alone, backend=wrong_by(0.3))
    assert "compiled log-probs are off by" in reason
    assert not any(is_compiled(model))


def test_a_reason_of_another_rank_holds_for_this_one_too(model, monkeypatch):
    monkeypatch.setattr(compiling, "_compiled", lambda *_: None)
    assert compile_layers(model, None, lambda mine: [mine, "no compiler"]) == "no compiler"


def test_layers_are_those_that_transformers_names(build):
    assert [type(layer).__name__ for layer in layers_of(build())] == ["LlamaDecoderLayer"] * 2
    assert [type(layer).__name__ for layer in layers_of(build(GPT2))] == ["GPT2Block"] * 2
    assert "does not say which modules" in compile_layers(torch.nn.Linear(1, 1), None, alone)


def test_asking_for_a_backend_or_a_mode_asks_for_compiling(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compiling, "compile_layers", lambda *arguments: asked.append(arguments[3:]) or "no")
    ways = ({"torch_compile": True}, {"torch_compile_mode": "max-autotune"}, {"torch_compile_backend": "x"}, {})
    for settings in ways:
        make(tmp_path / str(settings), Lm, max_steps=1, **settings)._set_up()
    assert asked == [(None, None), (None, "max-autotune"), ("x", None)]
