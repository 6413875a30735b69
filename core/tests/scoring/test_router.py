"""The router loss of mixture-of-experts models: transformers' own, packed or padded."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from llmtk.scoring import packed, padded, router
from llmtk.scoring.layout import Layout
from llmtk.scoring.proof import why_not_packed

from .kit import PACKED, TINY, adapted, alone, assert_near, build, gradients, shared, weigh

MOE = TINY | {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 8,
    "output_router_logits": True,
}
KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "ernie4_5_moe", "minimax_m2")
BATCHES = (alone, shared)


def hear(way, root, batch, also=0.0):
    """Return the router loss of scoring a batch, and the gradients of it and some of the log-probs."""
    heard = []

    def forward(**inputs):
        output = root(**inputs)
        heard.append(router.loss_in(output))
        return output

    root.zero_grad(set_to_none=True)
    logps = way.score(forward, batch).logps
    (loss,) = heard
    (loss + also * (logps * weigh(batch)).sum()).backward()
    found = {"logps": loss.detach()[None]} | gradients(root)
    root.zero_grad(set_to_none=True)
    return found


def routed(found, expected):
    """Keep what the router loss alone has a gradient for: the last layer's experts and the head have none."""
    whole = max(float(gradient.norm()) for name, gradient in expected.items() if name != "logps")
    names = [name for name, value in expected.items() if float(value.norm()) > 1e-4 * whole]
    assert all(float(found[name].norm()) <= 2e-4 * whole for name in expected if name not in names)
    return {name: found[name] for name in names}, {name: expected[name] for name in names}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("taken", [1, 2, 3])
def test_it_is_transformers_loss_over_the_tokens_that_count(taken, masked):
    generator = torch.Generator().manual_seed(taken)
    layers = tuple(torch.randn(14, 5, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]) if masked else None
    expected = load_balancing_loss_func(layers, 5, taken, mask)
    copies = mask.flatten() if masked else torch.ones(14, dtype=torch.int64)
    found = router.router_loss(layers, copies, taken)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(torch.autograd.grad(found, layers), torch.autograd.grad(expected, layers), strict=True):
        torch.testing.assert_close(mine, theirs)
    repeated = torch.arange(14).repeat_interleave(torch.arange(14))
    copied = load_balancing_loss_func(tuple(layer[repeated] for layer in layers), 5, taken)
    torch.testing.assert_close(router.router_loss(layers, torch.arange(14), taken), copied)


def test_a_token_counts_for_each_sequence_that_reads_it():
    batch = shared()
    layout = Layout.of(batch)
    segments = torch.split(layout.copies, layout.lengths)
    found = [set(segment.tolist()) for segment in segments]
    # 20 alone; a prefix of two; 5 alone; prefixes of two and one and none, and one-token sequences, which are not fed.
    assert found == [{1}, {2}, {1}, {1}, {1}, {2}, {1}, {0}, set(), {1}, {1}, {1}, {1}, set()]


@pytest.mark.parametrize("tuning", ["full", "lora", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_is_the_models_own(kind, tuning):
    root = build(kind, MOE)
    root = adapted(root) if tuning == "lora" else root
    expected = [hear(padded, root, batch(), also) for batch in BATCHES for also in (0, 1e-2)]
    assert float(expected[0]["logps"]) != pytest.approx(2.0, abs=1e-3), "balanced experts would have this one"
    measured = {}
    assert why_not_packed(root, measured) is None
    assert measured["router loss of a tiny twin of it"] < 1e-5
    if tuning == "checkpointed":
        root.gradient_checkpointing_enable({"use_reentrant": False})
        root.train()
    found = [hear(packed, root, batch(), also) for batch in BATCHES for also in (0, 1e-2)]
    for mine, theirs in zip(found, expected, strict=True):
        assert_near(*routed(mine, theirs))


def test_it_is_there_only_where_the_configuration_asks_for_it():
    for kind, fields in (("mixtral", PACKED["mixtral"]), ("llama", TINY | {"output_router_logits": True})):
        root = build(kind, fields)
        assert router.coefficient(root) is None
        assert router.is_asked_for(root) == (kind == "llama")
        assert why_not_packed(root) is None
        for way in (packed, padded):
            assert way.score(lambda root=root, **inputs: check_none(root(**inputs)), alone()).logps.isfinite().all()
    assert router.coefficient(build("mixtral", MOE | {"router_aux_loss_coef": 0.3})) == 0.3
    assert router.coefficient(build("jetmoe", MOE | {"aux_loss_coef": 0.2})) == 0.2


def check_none(output):
    assert router.loss_in(output) is None
    return output


@pytest.mark.parametrize("wrong", ["prefixes once", "another choice", "no gradient"])
def test_a_wrong_one_is_caught(wrong, monkeypatch):
    right = router.router_loss
    breaks = {
        "prefixes once": lambda layers, copies, taken: right(layers, copies.clamp(max=1), taken),
        "another choice": lambda layers, copies, taken: right(layers, copies, taken - 1),
        "no gradient": lambda layers, copies, taken: right(layers, copies, taken).detach(),
    }
    root = build("mixtral", MOE)
    assert why_not_packed(copy.deepcopy(root)) is None
    monkeypatch.setattr(router, "router_loss", breaks[wrong])
    kind = "packed gradients" if wrong == "no gradient" else "the packed router loss"
    assert kind in why_not_packed(root)
