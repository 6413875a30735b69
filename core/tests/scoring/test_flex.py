"""FlexAttention over packed rows, run uncompiled on the CPU: values and gradients, masks, and when it is chosen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex

from llmtk import Batch
from llmtk.scoring import attention, flex, packed, padded
from llmtk.scoring.layout import Layout
from llmtk.scoring.proof import why_not_packed

from .kit import MIXED, PACKED, TINY, Source, adapted, alone, assert_near, build, measure, shared

HEADS, WIDTH = 4, 16


@pytest.fixture
def on_cpu(monkeypatch):
    """Choose FlexAttention on the CPU; returns the lengths of the rows that it is called with.

    Torch refuses a backward pass there at the door, though the operator, without a kernel, has one.
    """
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(torch_flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex, "available", lambda device: device == "cpu")
    return count_calls(monkeypatch, torch_flex.flex_attention)


def count_calls(monkeypatch, kernel):
    lengths = []

    def counted(query, *args, **kwargs):
        lengths.append(query.shape[2])
        return kernel(query, *args, **kwargs)

    monkeypatch.setattr(flex, "_kernel", lambda device: counted)
    return lengths


def rows(*lengths, prefixes=(), seed=0):
    return Source(seed).group(*lengths, prefixes=prefixes)


ROWS = {
    "one segment": [rows(40)],
    "segments alone": [rows(20), rows(5), rows(2), rows(31), rows(60)],
    "shared prefixes": [rows(20), rows((12, 0), (17, 0), prefixes=(15,)), rows((1, 0), (9, 1), 7, prefixes=(11, 4, 6))],
    "segments over several blocks": [rows(300), rows(7), rows(290)],
    "a long prefix": [rows(30), rows((150, 0), (40, 0), (200, 0), prefixes=(280,)), rows(9)],
    "a full block, no padding": [rows(65), rows(65)],
    "many short ones": [rows(3 + index % 7, seed=index) for index in range(90)],
}


def dense(query, key, value, layout, scale, window, softcap):
    """Attend as the definition says, all scores at once, in float64, pair by pair of tokens."""
    token = [(s, i) for s, length in enumerate(layout.lengths) for i in range(length)]
    position = layout.positions[0].tolist()

    def sees(q, k):
        ours, theirs = token[q][0], token[k][0]
        ahead = position[q] - position[k]
        return theirs in (ours, layout.prefixes[ours]) and ahead >= 0 and (window is None or ahead < window)

    mask = torch.tensor([[sees(q, k) for k in range(len(token))] for q in range(len(token))])
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)


def run(attend, layout, key_heads, value_width, dtype=torch.float32, **asked):
    """Return what attention gives, and the gradients of a weighted sum of it."""
    generator = torch.Generator().manual_seed(1)
    length = layout.ids.shape[1]
    shapes = (HEADS, WIDTH), (key_heads, WIDTH), (key_heads, value_width)
    states = [torch.randn(1, h, length, w, generator=generator).to(dtype).requires_grad_() for h, w in shapes]
    weights = torch.randn(1, length, HEADS, value_width, generator=generator)
    attended = attend(*states, layout, **asked)
    gradients = torch.autograd.grad((attended * weights.to(dtype)).sum(), states)
    return {"logps": attended.detach(), **dict(zip(("query", "key", "value"), gradients, strict=True))}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize(
    ("window", "softcap", "key_heads", "value_width"),
    [(None, 0.0, 4, 16), (9, 0.0, 2, 16), (None, 1.5, 1, 16), (140, 1.5, 2, 32)],
)
def test_it_is_what_the_definition_says(on_cpu, name, window, softcap, key_heads, value_width):
    asked = {"scale": 0.4, "window": window, "softcap": softcap}
    batch = Batch.collate(ROWS[name])
    layout = Layout.of(batch)
    found = run(flex.attend, layout, key_heads, value_width, **asked)
    assert on_cpu == [flex.bucket(layout.ids.shape[1])]
    assert_near(found, run(dense, layout, key_heads, value_width, torch.float64, **asked), 2e-6)

    def by_segment(*states, scale, window, softcap):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flex, "available", lambda device: False)
            return attention.packed_attention(None, *states, scaling=scale, sliding_window=window, softcap=softcap)

    assert_near(found, run(by_segment, layout, key_heads, value_width, **asked), 2e-6)


@pytest.mark.parametrize("window", [None, 1, 9, 128, 200])
@pytest.mark.parametrize("name", ROWS)
def test_blocks_leave_out_nothing_and_skip_the_test_of_tokens_only_where_all_are_seen(name, window):
    """The kernel believes the blocks, where the uncompiled operator used here asks for every token."""
    layout = Layout.of(Batch.collate(ROWS[name]))
    mask = flex.block_mask(layout, window, torch.device("cpu"))
    size = flex.bucket(layout.ids.shape[1])
    exact = torch_flex.create_block_mask(mask.mask_mod, 1, 1, size, size, device="cpu", BLOCK_SIZE=flex.BLOCK)

    def cells(counts, indices):
        blocks = torch.zeros(size // flex.BLOCK, size // flex.BLOCK, dtype=torch.bool)
        for row, (count, columns) in enumerate(zip(counts[0, 0], indices[0, 0], strict=True)):
            blocks[row, columns[:count].long()] = True
        return blocks

    partly, fully = cells(mask.kv_num_blocks, mask.kv_indices), cells(mask.full_kv_num_blocks, mask.full_kv_indices)
    seen = cells(exact.kv_num_blocks, exact.kv_indices), cells(exact.full_kv_num_blocks, exact.full_kv_indices)
    assert not (partly & fully).any()
    assert not ((seen[0] | seen[1]) & ~(partly | fully)).any(), "no block is left out of which a token is seen"
    assert not (fully & ~seen[1]).any(), "no block counts as seen in full of which a token is not"
    transposed = cells(mask.q_num_blocks, mask.q_indices), cells(mask.full_q_num_blocks, mask.full_q_indices)
    assert torch.equal(transposed[0].T, partly)
    assert torch.equal(transposed[1].T, fully)


def test_blocks_save_work():
    layout = Layout.of(Batch.collate([rows(1025), rows((513, 0), (513, 0), prefixes=(1024,)), rows(1025)]))
    mask = flex.block_mask(layout, None, torch.device("cpu"))
    # Four segments and a prefix of 8, 8, 4, 4 and 8 blocks: triangles, and the prefix under both that continue it.
    assert int((mask.kv_num_blocks + mask.full_kv_num_blocks).sum()) == 3 * 36 + 2 * 10 + 2 * 4 * 8
    assert int(mask.kv_num_blocks.sum()) == 32, "the diagonal is all that is seen in part"
    narrow = flex.block_mask(layout, 128, torch.device("cpu"))
    assert int((narrow.kv_num_blocks + narrow.full_kv_num_blocks).sum()) == 3 * 15 + 2 * 7 + 2


def test_positions_are_the_layouts():
    for batch in (alone(), shared()):
        layout = Layout.of(batch)
        assert torch.equal(flex._Row.of(layout).position[: layout.ids.shape[1]], layout.positions[0])


def test_buckets_are_few_and_little_longer():
    lengths = range(1, 70_000)
    buckets = {flex.bucket(length) for length in lengths}
    assert all(size % flex.BLOCK == 0 for size in buckets)
    assert all(0 <= flex.bucket(length) - length < max(flex.BLOCK, length / 8 + 1) for length in lengths)
    assert len([size for size in buckets if 8192 < size <= 16384]) == 8


def test_padding_has_finite_gradients(on_cpu):
    layout = Layout.of(Batch.collate([rows(3)]))
    states = [torch.full((1, 2, 2, WIDTH), 3e4).half().requires_grad_() for _ in range(3)]
    flex.attend(*states, layout, 1.0, None, 0.0).sum().backward()
    assert all(state.grad.isfinite().all() for state in states)


MODELS = {
    "llama": TINY,
    "gemma2": PACKED["gemma2"],
    "mistral": PACKED["mistral"],
    "gemma3_text": PACKED["gemma3_text"],
    "gpt2": PACKED["gpt2"] | {"n_embd": 64},
}


def wide(kind):
    """Make heads as wide as the kernels want them."""
    return build(kind, MODELS[kind], **({} if kind == "gpt2" else {"hidden_size": 64, "head_dim": 16}))


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_scored_the_same(on_cpu, kind, tuning):
    root = wide(kind) if tuning == "full" else adapted(wide(kind))
    expected = [measure(padded, root, batch()) for batch in (alone, shared)]
    assert why_not_packed(root) is None
    for batch, wanted in zip((alone, shared), expected, strict=True):
        on_cpu.clear()
        assert_near(measure(packed, root, batch()), wanted)
        assert len(on_cpu) == 2, "both layers went through it"


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_checkpointed_gradients_are_the_same(on_cpu, monkeypatch, kind):
    """Compiled, as on a device: the uncompiled operator has wrong gradients with a cap of scores in a checkpoint."""
    torch._dynamo.reset()
    kernel = torch.compile(torch_flex.flex_attention, fullgraph=True, backend="aot_eager")
    calls = count_calls(monkeypatch, kernel)
    root = wide(kind)
    expected = measure(padded, root, shared())
    assert why_not_packed(root) is None
    root.gradient_checkpointing_enable({"use_reentrant": False})
    root.train()
    calls.clear()
    for _ in range(2):
        assert_near(measure(packed, root, shared()), expected)
    assert len(calls) == 8, "two layers, each computed again in the backward pass"
    torch._dynamo.reset()


def test_layers_share_a_mask_for_each_window(on_cpu, monkeypatch):
    made = []
    make = flex.block_mask
    monkeypatch.setattr(
        flex, "block_mask", lambda layout, window, device: made.append(window) or make(layout, window, device)
    )
    root = build("gemma2", MODELS["gemma2"], hidden_size=64, head_dim=16, num_hidden_layers=6, layer_types=MIXED * 3)
    packed.patch(root)
    for _ in range(2):
        packed.score(root, shared())
    assert made == [8, None] * 2


def test_what_it_cannot_do_goes_by_segment(on_cpu):
    layout = Layout.of(alone())
    length = layout.ids.shape[1]

    def chosen(width=16, dtype=torch.float32, **others):
        on_cpu.clear()
        states = torch.randn(1, 2, length, width, dtype=dtype)
        attention.packed_attention(None, states, states, states, layout, **others)
        return bool(on_cpu)

    assert chosen()
    assert chosen(dtype=torch.bfloat16)
    assert chosen(s_aux=None)
    assert not chosen(width=8)
    assert not chosen(width=512)
    assert not chosen(dtype=torch.float64)
    assert not chosen(s_aux=torch.zeros(2))
    with pytest.raises(NotImplementedError, match="dropout"):
        chosen(dropout=0.1)


def test_without_a_kernel_attention_goes_by_segment():
    assert not flex.available("cpu")
    assert flex.available("cuda") == torch.utils._triton.has_triton()


def test_few_of_many_lengths_and_windows_are_compiled_and_every_scale_and_cap(monkeypatch):
    """By the compiler's front end, which needs no device."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    kernel = torch.compile(torch_flex.flex_attention, fullgraph=True, backend=backend)
    monkeypatch.setattr(flex, "_kernel", lambda device: kernel)

    def near(length, **asked):
        layout = Layout.of(Batch.collate([rows(length), rows((9, 0), prefixes=(5,))]))
        asked = {"scale": 0.25, "window": None, "softcap": 0.0} | asked
        with torch.no_grad():
            states = torch.randn(1, 2, layout.ids.shape[1], 16)
            found = flex.attend(states, states, states, layout, **asked)
            torch.testing.assert_close(found, dense(states, states, states, layout, **asked), atol=1e-5, rtol=1e-5)

    for length in (40, 150, 300, 420, 550):
        for window in (None, 7, 9, 33):
            near(length, window=window)
    assert len(graphs) <= 4, "with a window and without, of one length and of any"
    for number in (0.3, 0.5, 1.0, 2.0, 30.0, 50.0):
        near(40, softcap=number)
        near(40, scale=number)
    torch._dynamo.reset()


def test_a_row_is_laid_out_without_waiting_for_the_device():
    """A batch on the meta device has no values: what would read one from the device fails here."""
    for batch in (alone(), shared()):
        away = batch.to("meta")
        layout, there = Layout.of(batch), Layout.of(away)
        assert (there.lengths, there.prefixes) == (layout.lengths, layout.prefixes)
        for name in ("ids", "positions", "predictors"):
            assert getattr(there, name).device.type == "meta"
            assert getattr(there, name).shape == getattr(layout, name).shape
        assert flex.block_mask(there, 8, torch.device("meta")).kv_num_blocks.device.type == "meta"
        for name in ("target_tokens", "target_sequence", "target_counts", "sequence_group"):
            assert getattr(away, name).device.type == "meta"
            assert getattr(away, name).shape == getattr(batch, name).shape
        assert away.sum_by_sequence(away.target_tokens).shape == batch.target_counts.shape
