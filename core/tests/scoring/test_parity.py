"""Packed scoring against the plain padded forward: log-probs and every parameter's gradient."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from llmtk import Batch, Group, LossOutput, Round, Run, Sequence, Stage, Term
from llmtk.scoring import attention, packed, padded
from llmtk.scoring.proof import why_not_packed

from .kit import (
    PACKED,
    TINY,
    Source,
    adapted,
    alone,
    assert_near,
    build,
    distances,
    gradients,
    measure,
    shared,
    weigh,
)

BATCHES = (alone, shared)


def prove(root):
    assert why_not_packed(root) is None
    return root


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", PACKED)
def test_packed_equals_padded(kind, tuning):
    root = build(kind) if tuning == "full" else adapted(build(kind))
    expected = [measure(padded, root, batch()) for batch in BATCHES]
    prove(root)
    for batch, wanted in zip(BATCHES, expected, strict=True):
        assert_near(measure(packed, root, batch()), wanted)
        assert_near(measure(padded, root, batch()), wanted, relative=0)


@pytest.mark.parametrize("kind", PACKED)
def test_what_these_tests_compare_depends_on_attention(kind, monkeypatch):
    """Else they could not fail: neighbours that look at each other, and prefixes nobody looks at, are far off."""
    root = build(kind)
    expected = measure(padded, root, shared())
    prove(root)
    attend = attention.packed_attention

    def contaminated(module, q, k, v, layout, **kwargs):
        return attend(module, q, k, v, replace(layout, lengths=[sum(layout.lengths)], prefixes=[-1]), **kwargs)

    def lonely(module, q, k, v, layout, **kwargs):
        return attend(module, q, k, v, replace(layout, prefixes=[-1] * len(layout.prefixes)), **kwargs)

    for wrong in (contaminated, lonely):
        monkeypatch.setattr(attention, "packed_attention", wrong)
        far = distances(measure(packed, root, shared()), expected)
        assert far["logps"] > 1e-3
        assert min(distance for name, distance in far.items() if "k_proj.bias" not in name) > 1e-3


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "mixtral"])
def test_checkpointed_gradients_are_the_same(kind, tuning):
    root = build(kind, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0) if kind == "gpt2" else build(kind)
    root = root if tuning == "full" else adapted(root)
    expected = measure(padded, root, shared())
    prove(root)
    # transformers 5.23 has another name for it, and warns of the one that 5.17 knows.
    enable = getattr(root, "activation_checkpointing_enable", None) or root.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    root.train()
    prove(root)  # twice is once
    calls = []
    attend = attention.packed_attention
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "packed_attention", lambda *a, **k: calls.append(1) or attend(*a, **k))
        found = measure(packed, root, shared())
    assert len(calls) == 4, "two layers, each computed again in the backward pass"
    assert_near(found, expected)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "gpt2"])
def test_bfloat16_is_no_further_from_float32_than_the_plain_way(kind):
    root = build(kind)
    batch = shared()
    exact = measure(padded, root, batch)

    def distance(way):
        with torch.autocast("cpu", torch.bfloat16):
            logps = way.score(root, batch).logps
        (logps * weigh(batch)).sum().backward()
        found = gradients(root)
        root.zero_grad(set_to_none=True)
        names = [name for name in exact if name != "logps"]
        apart = torch.stack([(found[name] - exact[name]).norm() for name in names]).norm()
        return float((logps.detach() - exact["logps"]).norm()), float(apart)

    plain = distance(padded)
    prove(root)
    fast = distance(packed)
    print(f"{kind}: packed / plain, log-probs {fast[0] / plain[0]:.2f}, gradients {fast[1] / plain[1]:.2f}")
    assert min(plain) > 0
    assert fast[0] <= 1.5 * plain[0]
    assert fast[1] <= 1.5 * plain[1]


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2"])
def test_long_segments_take_torchs_kernel_and_agree(kind, monkeypatch):
    root = build(kind)
    expected = [measure(padded, root, batch()) for batch in BATCHES]
    prove(root)
    calls = []
    kernel = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    monkeypatch.setattr(attention, "LONG", 16)
    for batch, wanted in zip(BATCHES, expected, strict=True):
        assert_near(measure(packed, root, batch()), wanted)
    # Its kernel knows no soft cap: gemma2 is written out at any length.
    assert bool(calls) == (kind != "gemma2")


def test_really_long_segments_agree_in_windows_and_behind_prefixes():
    root = build("mistral", max_position_embeddings=2048, sliding_window=300)
    source = Source(5)
    groups = [source.group((420, 0), (60, 0), prefixes=(500,)), source.group(850), source.group(30)]
    batch = Batch.collate(groups)
    assert attention.LONG <= 800
    expected = measure(padded, root, batch)
    assert_near(measure(packed, prove(root), batch), expected)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_packing_order_and_cut_change_nothing(kind):
    root = prove(build(kind))
    batch = shared()
    whole = measure(packed, root, batch)
    owner = batch.sequence_group[batch.target_sequence]
    weights = weigh(batch)
    for cut in ([[4, 2, 0, 3, 1]], [[0], [1], [2], [3], [4]], [[3, 0], [1, 4, 2]]):
        root.zero_grad(set_to_none=True)
        logps = torch.zeros(len(batch.target_tokens))
        for groups in cut:
            at = torch.cat([(owner == group).nonzero().flatten() for group in groups])
            scores = packed.score(root, batch.select(groups))
            (scores.logps * weights[at]).sum().backward()
            logps[at] = scores.logps.detach()
        assert_near({"logps": logps} | gradients(root), whole)


def copies(batch):
    """Return each sequence with its prefix written out in front of it."""
    segments = torch.split(batch.tokens, batch.segment_lengths.tolist())
    marks = torch.split(batch.targets, batch.segment_lengths.tolist())
    for segment, mark, prefix in zip(segments, marks, batch.segment_prefix.tolist(), strict=True):
        if prefix != -2:
            before = segments[prefix] if prefix >= 0 else segment[:0]
            yield Sequence(torch.cat([before, segment]), torch.cat([torch.zeros(len(before)).bool(), mark]))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_shared_prefix_is_its_copies(kind):
    """The same sequences with their prefixes written out, in one group or many: other tokens, the same scores."""
    root = prove(build(kind))
    batch = shared()
    written_out = Batch.collate([Group([copy], {"tokens": 1}) for copy in copies(batch)])
    assert len(written_out.tokens) > len(batch.tokens)
    assert_near(measure(packed, root, batch), measure(packed, root, written_out))


def test_a_prefix_that_nobody_uses_changes_nothing():
    root = prove(build("llama"))
    source = Source(3)
    sequence, prefix = source.sequence(9, prefix=0), source.tokens(6)
    used = Batch.collate([Group([sequence], {}, [prefix])])
    both = Batch.collate([Group([replace(sequence, prefix=1)], {}, [source.tokens(13), prefix, source.tokens(2)])])
    assert_near(measure(packed, root, both), measure(packed, root, used))


def test_all_that_can_be_asked_for_is_the_same_with_its_gradients():
    for kind in ("llama", "gemma2", "cohere"):
        root = build(kind)
        batch = shared()
        also = ("entropy", "vocab_mean", "top1")

        def ask(way, root=root, batch=batch, also=also):
            root.zero_grad(set_to_none=True)
            scores = way.score(root, batch, also)
            weights = weigh(batch)
            (
                scores.logps * weights + scores.entropy * weights.flip(0) + scores.vocab_mean * weights**2
            ).sum().backward()
            values = torch.cat([scores.logps, scores.entropy, scores.vocab_mean]).detach()
            return {"logps": values} | gradients(root), scores.top1

        expected, likeliest = ask(padded)
        found, top1 = ask(packed, prove(root))
        assert_near(found, expected)
        assert torch.equal(top1, likeliest)


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite"])
def test_map_logits_has_the_exact_gradient(kind, rows, monkeypatch):
    """Against the plain forward in float64, for a function that is no log-prob, in tiles of `rows` targets."""
    monkeypatch.setattr(packed, "TILE_ELEMENTS", rows * 97)
    root = build(kind)
    batch = shared()
    teacher = torch.randn(len(batch.target_tokens), 97, generator=torch.Generator().manual_seed(0)).softmax(-1)
    columns = [teacher, weigh(batch)]
    heights = []

    def distil(logits, teacher, weight):
        heights.append(len(logits))
        kl = (teacher * (teacher.log() - logits.log_softmax(-1))).sum(-1)
        return torch.stack([kl * weight, logits.logsumexp(-1) ** 2], -1)

    exact = copy.deepcopy(root).double()
    logits = torch.cat([padded.target_logits(exact, Batch.collate([Group([copy], {})])) for copy in copies(batch)])
    values = distil(logits, *(column.double() for column in columns))
    values.sum().backward()
    prove(root)
    heights.clear()
    mapped = packed.map_logits(root, batch, distil, columns)
    mapped.sum().backward()
    assert max(heights) <= rows
    assert_near({"logps": mapped.detach()} | gradients(root), {"logps": values.detach()} | gradients(exact))


# Through a run


class Pairs(Stage):
    """Two endings of one beginning: what preference stages send."""

    name = "pairs"
    row_types = ("text",)

    def prepare_batch(self, run, rows):
        groups = []
        for row in rows:
            ids = row["input_ids"]
            cut = max(1, len(ids) // 2)
            ends = [Sequence(ids[cut:], [True] * (len(ids) - cut), 0), Sequence(ids[:3], [True] * 3, 0)]
            groups.append(Group(ends, {"pairs": 1}, [ids[:cut]]))
        return Round.of(groups)

    def compute_loss(self, run, batch):
        scores = run.score(batch, also=["entropy"])
        margins = scores.sum().view(-1, 2).diff(dim=1).flatten()
        spread = run.map_logits(batch, lambda logits: logits.logsumexp(-1))
        return LossOutput(
            {
                "loss": Term(-F.logsigmoid(0.1 * margins).sum(), per="pairs"),
                "entropy": Term(scores.entropy.sum(), per="pairs", coefficient=1e-3),
                "z": Term(spread.square().sum(), per="pairs", coefficient=1e-4),
            }
        )


@pytest.mark.parametrize("settings", [{}, {"peft": {"r": 4}}, {"train": {"gradient_checkpointing": True}}])
def test_a_run_trains_the_same_both_ways(tmp_path, monkeypatch, settings):
    monkeypatch.setattr("llmtk.reporting.plot.plot_losses", lambda *_: False)
    rows = [{"text": f"{i * 37}+{i}={i * 38}, " * (1 + i % 4)} for i in range(12)]
    trained = {}
    for scoring in ("auto", "padded"):
        train = {"bf16": False, "per_device_train_batch_size": 4, "micro_batch_tokens": 60, "max_steps": 3}
        train |= {"optim": "sgd", "learning_rate": 0.1, "scoring": scoring} | settings.get("train", {})
        run = Run(
            Pairs,
            model="builtin",
            data={"train": rows},
            train=train,
            peft=settings.get("peft"),
            output_dir=str(tmp_path / scoring),
        )
        run.train()
        assert run.forward.scorers[None].packed == (scoring == "auto")
        lines = run.records.read("metrics")
        trained[scoring] = {n: p.detach().clone() for n, p in run.model.named_parameters() if p.requires_grad}, lines
    (weights, lines), (plain_weights, plain_lines) = trained["auto"], trained["padded"]
    for line, plain in zip(lines, plain_lines, strict=True):
        assert line == pytest.approx(plain, rel=1e-5)
    for name, weight in weights.items():
        apart = float((weight - plain_weights[name]).norm())
        assert apart <= 1e-5 * float(plain_weights[name].norm()), name


def test_the_window_of_these_models_is_shorter_than_the_sequences():
    assert min(int(batch().segment_lengths.max()) for batch in BATCHES) > 2 * PACKED["mistral"]["sliding_window"]
    assert TINY["num_attention_heads"] > TINY["num_key_value_heads"]


def test_training_follows_scoring_in_inference_mode():
    """What is kept from call to call must not be made of inference tensors, which no backward pass may use."""
    root = prove(build("mistral", max_position_embeddings=256))

    def batch():
        return Batch.collate([Source(9).group(61), Source(10).group((33, 0), prefixes=(29,))])

    for long in (768, 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention, "LONG", long)
            with torch.inference_mode():
                before = packed.score(root, batch()).logps
            found = measure(packed, root, batch())
            torch.testing.assert_close(before.clone(), found["logps"], rtol=1e-5, atol=0)
