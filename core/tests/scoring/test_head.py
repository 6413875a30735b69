"""The fused head against closed forms in float64, and what it holds in memory."""

from __future__ import annotations

import math
import weakref
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llmtk.scoring import head, packed, padded
from llmtk.scoring.head import HeadShape, head_scores
from llmtk.scoring.proof import why_not_packed

from .kit import build, shared

TARGETS, WIDTH, VOCABULARY = 37, 24, 211
ALSO = ("entropy", "vocab_mean", "square_sum", "top1", "logsumexp")
SHAPES = [HeadShape(), HeadShape(scale=0.4), HeadShape(cap=2.5), HeadShape(scale=1.7, cap=1.5)]


def inputs(bias: bool, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TARGETS, WIDTH, generator=generator).to(dtype).requires_grad_()
    linear = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    for parameter in linear.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).mul(0.5).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TARGETS,), generator=generator)
    upstream = torch.randn(4, TARGETS, generator=generator)
    return hidden, linear, targets, upstream


def exact(hidden, linear, targets, upstream, shape):
    """Return values and gradients in float64, written as they are defined."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden, *linear.parameters())]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if len(leaves) > 2 else 0)
    logits = logits * shape.scale
    if shape.cap:
        logits = shape.cap * torch.tanh(logits / shape.cap)
    lse = logits.logsumexp(-1)
    logps = logits - lse[:, None]
    values = torch.stack([logps[range(TARGETS), targets], -(logps.exp() * logps).sum(-1), logps.mean(-1), lse])
    (values * upstream).sum().backward()
    squares = logps.detach().exp().square().sum(-1)
    return values.detach(), [leaf.grad for leaf in leaves], (logits.argmax(-1) == targets, squares)


def fused(hidden, linear, targets, upstream, shape, also=ALSO):
    found = head_scores(hidden, linear, targets, shape, frozenset(also))
    asked = zip((found.logps, found.entropy, found.vocab_mean, found.logsumexp), upstream, strict=True)
    sum((value * weight).sum() for value, weight in asked if value is not None).backward()
    return found, [leaf.grad for leaf in (hidden, *linear.parameters())]


def assert_near(found, expected, relative=1e-5):
    assert float((found.double() - expected).norm()) <= relative * float(expected.norm())


@pytest.mark.parametrize("tile", [2**30, 37 * 64, 37 * 7, 1], ids=["one tile", "4 tiles", "31 tiles", "a word a tile"])
@pytest.mark.parametrize(("shape", "bias"), list(product(SHAPES, [False, True])))
def test_values_and_gradients_are_the_closed_forms(shape, bias, tile, monkeypatch):
    """With gradients into log-prob, entropy, the vocabulary's mean and the sum of exponentials at once."""
    monkeypatch.setattr(head, "TILE_ELEMENTS", tile)
    values, wanted, (likeliest, squares) = exact(*inputs(bias), shape)
    found, gradients = fused(*inputs(bias), shape)
    assert_near(found.square_sum, squares)
    for value, expected in zip((found.logps, found.entropy, found.vocab_mean, found.logsumexp), values, strict=True):
        assert value.dtype == torch.float32
        assert_near(value.detach(), expected)
    assert torch.equal(found.top1, likeliest)
    assert len(gradients) == 2 + bias
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert_near(gradient, expected)


@pytest.mark.parametrize(
    "also", [(), ("entropy",), ("vocab_mean",), ("top1",), ("logsumexp",), ("entropy", "vocab_mean")]
)
def test_what_is_asked_for_alone_is_the_same(also, monkeypatch):
    monkeypatch.setattr(head, "TILE_ELEMENTS", 37 * 50)
    shape = SHAPES[3]
    hidden, linear, targets, upstream = inputs(True)
    asked = [True, *(name in also for name in ("entropy", "vocab_mean", "logsumexp"))]
    upstream = upstream * torch.tensor(asked)[:, None]
    values, wanted, _ = exact(hidden, linear, targets, upstream, shape)
    found, gradients = fused(hidden, linear, targets, upstream, shape, also)
    assert_near(found.logps.detach(), values[0])
    assert [found.entropy is not None, found.vocab_mean is not None] == ["entropy" in also, "vocab_mean" in also]
    assert (found.top1 is not None) == ("top1" in also)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert_near(gradient, expected)


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parts_of_the_head_get_no_gradient(frozen):
    _, wanted, _ = exact(*inputs(True), SHAPES[0])
    hidden, linear, targets, upstream = inputs(True)
    for name in frozen:
        getattr(linear, name).requires_grad_(False)
    _, gradients = fused(hidden, linear, targets, upstream, SHAPES[0])
    for name, gradient, expected in zip(("hidden", "weight", "bias"), gradients, wanted, strict=True):
        if name in frozen:
            assert gradient is None
        else:
            assert_near(gradient, expected)


@pytest.mark.parametrize("tile", [2**30, 37 * 10])
def test_a_zeroed_head_gives_the_logarithm_of_the_vocabulary(tile, monkeypatch):
    monkeypatch.setattr(head, "TILE_ELEMENTS", tile)
    hidden, linear, targets, _ = inputs(True)
    for parameter in linear.parameters():
        parameter.data.zero_()
    found = head_scores(hidden, linear, targets, HeadShape(), frozenset(ALSO))
    ln = torch.full((TARGETS,), math.log(VOCABULARY))
    for value, wanted in ((found.logps, -ln), (found.entropy, ln), (found.vocab_mean, -ln)):
        torch.testing.assert_close(value, wanted, rtol=3e-7, atol=0)


@pytest.mark.parametrize("tile", [2**30, 37 * 10])
@pytest.mark.parametrize("factor", [3, 10])
def test_entropy_of_confident_predictions_does_not_cancel(factor, tile, monkeypatch):
    """Logits up to 35 and 116, as of trained models: the entropy is small beside them."""
    monkeypatch.setattr(head, "TILE_ELEMENTS", tile)
    hidden, linear, targets, upstream = inputs(False)
    hidden = (hidden * factor).detach().requires_grad_()
    values, wanted, _ = exact(hidden, linear, targets, upstream, HeadShape())
    found, gradients = fused(hidden, linear, targets, upstream, HeadShape())
    for value, expected in zip((found.logps, found.entropy, found.vocab_mean), values[:3], strict=True):
        assert_near(value.detach(), expected)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert_near(gradient, expected)


def test_extreme_logits_are_finite():
    hidden, linear, targets, upstream = inputs(False)
    found, gradients = fused((hidden * 300).detach().requires_grad_(), linear, targets, upstream, HeadShape())
    assert found.logps.min() < -1000
    values = (found.logps, found.entropy, found.vocab_mean, found.logsumexp, gradients[1])
    assert all(torch.isfinite(value).all() for value in values)


def test_bfloat16_products_have_float32_sums():
    """Each value is as near to the exact one of the rounded inputs as products in bfloat16 allow."""
    shape = HeadShape()
    values, wanted, _ = exact(*inputs(False, torch.bfloat16), shape)
    found, gradients = fused(*inputs(False, torch.bfloat16), shape)
    assert found.logps.dtype == torch.float32
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 2
    assert_near(found.logps.detach(), values[0], 4e-3)
    for gradient, expected in zip(gradients, wanted, strict=True):
        assert_near(gradient.float(), expected, 1e-2)


# Memory


class Memory(TorchDispatchMode):
    """Counts the bytes of all tensors made while it is on, at their peak, and the largest tensor's."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage):
        key = storage._cdata
        if key in self.seen or any(key == known for known in self.given):
            return
        size = storage.nbytes()
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.largest = max(self.largest, size)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key, size):
        self.seen.discard(key)
        self.now -= size

    given: tuple[int, ...] = ()


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_peak_memory_grows_with_the_tile_and_not_with_tokens_times_vocabulary(vocabulary, monkeypatch):
    tile = 2**19
    monkeypatch.setattr(head, "TILE_ELEMENTS", tile)
    linear = nn.Linear(8, vocabulary, bias=False)
    peaks = []
    for targets in (64, 256):
        hidden = torch.randn(targets, 8, requires_grad=True)
        wanted = torch.randint(0, vocabulary, (targets,))
        linear.zero_grad()
        memory = Memory()
        memory.given = (linear.weight.untyped_storage()._cdata,)
        with memory:
            found = head_scores(hidden, linear, wanted, HeadShape(), frozenset(ALSO))
            (found.logps + found.entropy + found.vocab_mean).sum().backward()
        assert linear.weight.grad.any()
        peaks.append(memory.peak)
    weight = vocabulary * 8 * 4
    print(f"vocabulary {vocabulary}: peak {peaks[0] / 2**20:.1f} and {peaks[1] / 2**20:.1f} MiB, tile 2 MiB")
    # The weight's gradient, a handful of tiles, and a few numbers a target.
    assert peaks[1] <= weight + 8 * tile * 4 + 256 * 200
    assert peaks[1] <= 1.05 * peaks[0]
    assert peaks[1] < 256 * vocabulary * 4 / 2


@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_no_tensor_of_a_whole_model_is_as_large_as_the_logits(vocabulary, monkeypatch):
    monkeypatch.setattr(head, "TILE_ELEMENTS", 2**19)
    monkeypatch.setattr(packed, "TILE_ELEMENTS", 2**19)
    model = build("llama", vocab_size=vocabulary, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    batch = shared()
    logits = len(batch.target_tokens) * vocabulary * 4
    weight = vocabulary * 8 * 4

    def largest(work):
        model.zero_grad()
        with Memory() as memory:
            work().sum().backward()
        return memory.largest

    plain = largest(lambda: padded.score(model, batch).logps)
    assert plain >= logits, "the plain way shows what is measured"
    assert why_not_packed(model) is None
    assert logits > 2 * max(weight, 2**21)
    assert largest(lambda: packed.score(model, batch).logps) <= max(weight, 2**21)
    assert largest(lambda: packed.map_logits(model, batch, lambda z: z.logsumexp(-1), [])) <= max(weight, 2**21)
