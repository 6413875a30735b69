"""What a forward pass keeps: fewer tensors than torch would, and gradients of the same bits."""

from __future__ import annotations

import contextlib
import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from llmtk.scoring import attention, kept, packed, padded
from llmtk.scoring.kept import keep_less
from llmtk.scoring.proof import why_not_packed

from .kit import adapted, build, gradients, shared, weigh

kept_less = partial(keep_less, torch.device("cpu"), size=kept.SMALL)


@pytest.fixture
def given(monkeypatch):
    """What backward passes are given of what was kept: storages, by their addresses."""
    storages = {}
    get = kept._kept

    def record(tensor, version):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return get(tensor, version)

    monkeypatch.setattr(kept, "_kept", record)
    return storages


class Layer(nn.Module):
    """A norm that three projections read, and a gate."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.randn(width))
        self.gate, self.up, self.down, self.other = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        scaled = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        normed = self.norm * scaled
        return self.down(F.silu(self.gate(normed)) * self.up(normed)) + self.other(normed)


def trained(model, loss, context):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16), context:
        value = loss()
    value.backward()
    return value.detach(), gradients(model)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert [name for name in found[1] if not torch.equal(found[1][name], expected[1][name])] == []


def test_casts_are_kept_once_and_products_not_at_all(given):
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(5, 8, requires_grad=True)
    row = 5 * 8
    trained(layer, lambda: layer(x).float().sum(), kept_less())
    sizes = sorted(storage.nbytes() for storage in given.values())
    # The cast of the norm; the gate before and behind its activation, and what it gates; x in float32. Beside them are
    # the weights' casts, and what is as long as a row or a column.
    assert [size for size in sizes if size in (2 * row, 4 * row)] == [2 * row] * 4 + [4 * row]


def test_gradients_of_a_layer_have_the_same_bits(given):
    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(3, 5, 8, requires_grad=True)
    expected = trained(layer, lambda: layer(x).float().sum(), contextlib.nullcontext())
    assert not given
    assert_same(trained(layer, lambda: layer(x).float().sum(), kept_less()), expected)
    assert given


@pytest.mark.parametrize("way", [packed, padded])
@pytest.mark.parametrize("tuning", ["full", "lora", "checkpointed"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "qwen3", "mixtral"])
def test_gradients_of_models_have_the_same_bits(kind, tuning, way):
    root = build(kind)
    if tuning == "lora":
        root = adapted(root)
    elif tuning == "checkpointed":
        # transformers 5.23 has another name for it, and warns of the one that 5.17 knows.
        enable = getattr(root, "activation_checkpointing_enable", None) or root.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if way is packed:
        assert why_not_packed(root) is None
    batch = shared()

    def loss():
        return (way.score(root, batch).logps * weigh(batch)).sum()

    expected = trained(root, loss, contextlib.nullcontext())
    assert_same(trained(root, loss, kept_less()), expected)


def test_what_was_written_to_is_an_error_as_it_is_without():
    x = torch.randn(5, requires_grad=True)
    with kept_less():
        grown = x.exp()
    grown.add_(1)
    with pytest.raises(RuntimeError, match=r"a \(5,\) tensor that the backward pass needs was written to"):
        grown.sum().backward()


def test_a_cast_that_was_written_to_is_not_taken_for_another():
    x = torch.randn(5, requires_grad=True)
    with kept_less():
        one, other = x.bfloat16(), x.bfloat16()
        with torch.no_grad():
            other.zero_()
        (one.square().sum() + other.square().sum()).backward()
    assert torch.equal(x.grad, 2 * x.detach().bfloat16().float())


def test_a_product_of_products_is_kept():
    """Or a chain of them would be multiplied again from its start at each link."""
    x, y, z = (torch.randn(5, requires_grad=True) for _ in range(3))
    with kept_less():
        product = (x * y) * z
        again = [kept._made_again({}, tensor) for tensor in (x * y, product)]
        product.square().sum().backward()
    assert [way is None for way in again] == [False, True]
    torch.testing.assert_close(x.grad, (2 * x * y.square() * z.square()).detach())


def test_nothing_outlives_its_graph():
    layer, x = Layer(), torch.randn(5, 8, requires_grad=True)
    leaf = weakref.ref(x)
    with torch.autocast("cpu", torch.bfloat16), kept_less():
        out = layer(x).float().exp()
    del x
    assert leaf() is not None
    del out
    assert leaf() is None


def test_a_cast_ends_with_the_node_that_keeps_it():
    """Not with the whole graph, so that the backward pass has room for gradients."""
    x = torch.randn(5, requires_grad=True)
    with kept_less():
        cast = x.bfloat16()
        one, other = cast.square(), cast.exp()
    packed_cast = weakref.ref(one.grad_fn._raw_saved_self.data)
    del cast
    assert packed_cast() is not None
    one.sum().backward()
    assert packed_cast() is None
    assert other.grad_fn is not None


@pytest.mark.parametrize(("device", "size"), [("cuda", kept.SMALL), ("cpu", kept.SMALL - 1)])
def test_it_keeps_out_of_the_way_of_accelerators_and_of_small_models(device, size):
    x = torch.randn(5, requires_grad=True)
    with keep_less(torch.device(device), size):
        out = x.exp()
    assert isinstance(out.grad_fn._raw_saved_result.data, torch.Tensor)


def test_attention_written_out_keeps_no_output_and_one_mask_for_many_lengths():
    attention._square.cache_clear()
    for length in (5, 17, 200):
        q, k, v = (torch.randn(heads, length, 8, dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2))
        out = attention._attend(q, k, v, 0.3, None, 0.0)
        sizes = [saved.shape for saved in out.grad_fn.saved_tensors]
        assert sizes == [(2, 2 * length, 8), (2, length, 8), (2, length, 8), (length, length)]
    assert attention._square.cache_info().currsize == 1
