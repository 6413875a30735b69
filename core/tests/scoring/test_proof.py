"""The proof: what it refuses and in which words, what it catches, and how it leaves a model."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtk.scoring import Scorer, attention, choose, packed, padded, proof
from llmtk.scoring.proof import why_not_packed

from .kit import ENDS, LATENT, MIXED, PACKED, TINY, VOCABULARY, adapted, alone, assert_near, build, measure, shared

LONGROPE = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    },
}
OLD = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, **ENDS}
PADDED = {
    "gpt_oss": (TINY | {"num_local_experts": 4, "head_dim": 8}, "log-probs of a tiny twin of it are off"),
    "phi3": (TINY | LONGROPE, "its longrope rotary embedding depends on the longest sequence"),
    "llama": (
        TINY | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "its dynamic rot",
    ),
    "qwen3_5_text": (TINY, "log-probs of a tiny twin of it are off"),
    "mamba": ({"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "it has no attention heads"),
    "jamba": (TINY | {"num_experts": 2}, "log-probs of a tiny twin of it are off"),
    "lfm2": (TINY | {"layer_types": ["conv", "full_attention"]}, "log-probs of a tiny twin of it are off"),
    "falcon": (
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        "log-probs of a tiny twin of it are off",
    ),
    "bloom": (OLD, "packed scoring fails on a tiny twin of it"),
    "gptj": (OLD | {"rotary_dim": 8}, "a tiny twin of it"),
    "llama4_text": (TINY | {"head_dim": 8}, "it holds 0 causal language models whose body and head"),
    "stablelm": (TINY, "log-probs of a tiny twin of it are off"),
}


def state(root):
    """Return what patching changes."""
    return [
        (module.__dict__.get("forward"), getattr(getattr(module, "config", None), "_attn_implementation", None))
        for module in root.modules()
    ]


@pytest.mark.parametrize("kind", PADDED)
def test_what_cannot_be_packed_says_why_stays_as_it_was_and_is_scored_padded(kind):
    fields, words = PADDED[kind]
    root = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).float().eval()
    before = state(root)
    plain = padded.score(root, alone()).logps
    scorer = choose(root, lambda value: [value])
    assert not scorer.packed
    assert words in scorer.why_padded
    assert state(root) == before
    assert torch.equal(scorer.score(root, alone()).logps, plain)


def test_an_adapter_on_the_head_is_scored_padded():
    root = adapted(build("llama"), ["q_proj", "lm_head"])
    before = state(root)
    assert why_not_packed(root) == "its head is peft's Linear, not a plain linear layer"
    assert state(root) == before
    expected = measure(padded, root, shared())
    assert_near(measure(Scorer(packed=False), root, shared()), expected, relative=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dropout_of_attention_weights_is_trained_padded(kind):
    dropout = {"attention_dropout": 0.1} if kind == "llama" else {"attn_pdrop": 0.1}
    root = build(kind, **dropout).train()
    before = state(root)
    assert why_not_packed(root) == "training it needs dropout in packed attention"
    assert state(root) == before
    assert why_not_packed(root.eval()) is None, "a frozen one draws none"


def test_all_ranks_score_in_one_way():
    scorer = choose(build("llama"), lambda mine: [mine, "the other rank cannot"])
    assert (scorer.packed, scorer.why_padded) == (False, "the other rank cannot")


def real(kind):
    """Make the twin's original: a model as large as its configuration's defaults say, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind))


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "gemma2", "gemma3_text", "gpt2", "cohere2", "mixtral", "qwen3_moe", "olmoe"]
)
def test_configurations_of_real_size_have_a_twin_that_is_packed(kind):
    twin = proof._twin(real(kind))
    proof._prove(twin, twin, [p for p in twin.parameters() if p.requires_grad], {}, what="the twin")
    assert sum(p.numel() for p in twin.parameters()) < 1e7


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_sparse_attention_shows_on_the_twin(kind):
    """Its indexer keeps 2,048 keys, and asks the attention's name whether it is to mask the others."""
    twin = proof._twin(real(kind))
    before = state(twin)
    with pytest.raises(packed.CannotPack, match="log-probs of the twin are off"):
        proof._prove(twin, twin, [], {}, what="the twin")
    assert state(twin) == before


# Broken on purpose

WINDOWED = TINY | {"sliding_window": 4096, "max_position_embeddings": 8192}
CAPPED = PACKED["gemma2"] | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}


def change(keyword, value):
    def breaks(attend):
        return lambda *args, **kwargs: attend(*args, **(kwargs | {keyword: value}))

    return breaks


def no_prefixes(attend):
    def wrong(module, q, k, v, layout, **kwargs):
        return attend(module, q, k, v, replace(layout, prefixes=[-1] * len(layout.prefixes)), **kwargs)

    return wrong


def one_segment(attend):
    def wrong(module, q, k, v, layout, **kwargs):
        return attend(module, q, k, v, replace(layout, lengths=[sum(layout.lengths)], prefixes=[-1]), **kwargs)

    return wrong


def no_gradient_into_prefixes(attend):
    def wrong(module, q, k, v, layout, **kwargs):
        right = attend(module, q, k, v, layout, **kwargs)
        return right.detach() + 0.5 * (right - right.detach())

    return wrong


ATTENTION = {
    "ignored window": ("mistral", WINDOWED, change("sliding_window", None)),
    "window off by one": ("mistral", WINDOWED, change("sliding_window", 9)),
    "ignored window of some layers": ("gemma2", CAPPED, change("sliding_window", None)),
    "dropped cap of scores": ("gemma2", CAPPED, change("softcap", None)),
    "dropped scale": ("granite", PACKED["granite"], change("scaling", None)),
    "ignored prefixes": ("llama", TINY, no_prefixes),
    "contaminated neighbours": ("llama", TINY, one_segment),
    "ignored prefixes of absolute positions": ("gpt2", PACKED["gpt2"], no_prefixes),
    "wrong gradients": ("llama", TINY, no_gradient_into_prefixes),
}


def assert_caught_and_left(root, words):
    prompt = torch.arange(3, 11)[None]
    implementation = root.config._attn_implementation
    assert not implementation.startswith("llmtk")
    before, modes = state(root), [module.training for module in root.modules()]
    plain = padded.score(root, shared()).logps
    written = root.generate(prompt, max_new_tokens=5, do_sample=False)
    reason = why_not_packed(root)
    assert reason is not None
    assert words in reason
    assert state(root) == before
    assert [module.training for module in root.modules()] == modes
    assert all(name == implementation for _, name in state(root) if name is not None)
    assert torch.equal(padded.score(root, shared()).logps, plain)
    assert torch.equal(root.generate(prompt, max_new_tokens=5, do_sample=False), written)


@pytest.mark.parametrize("what", ATTENTION)
def test_broken_attention_is_caught(what, monkeypatch):
    kind, fields, breaks = ATTENTION[what]
    root = build(kind, fields)
    assert why_not_packed(copy.deepcopy(root)) is None, "it is whole"
    monkeypatch.setattr(attention, "packed_attention", breaks(attention.packed_attention))
    assert_caught_and_left(root, "packed gradients" if what == "wrong gradients" else "packed log-probs")


@pytest.mark.parametrize(
    ("kind", "fields"), [("gemma2", CAPPED), ("granite", PACKED["granite"]), ("cohere", PACKED["cohere"])]
)
def test_a_head_whose_shape_is_not_known_is_caught(kind, fields, monkeypatch):
    """As a new architecture's would be, which caps or scales its logits under a name of its own."""
    root = build(kind, fields)
    assert why_not_packed(copy.deepcopy(root)) is None
    monkeypatch.setattr(packed, "head_shape", lambda config: packed.HeadShape())
    assert_caught_and_left(root, "packed log-probs")


def test_what_is_broken_in_the_model_alone_is_caught_too(monkeypatch):
    root = build("llama")
    attend = attention.packed_attention

    def wrong(module, q, *rest, **kwargs):
        return attend(module, q, *rest, **kwargs) * (1.05 if module in set(root.modules()) else 1)

    monkeypatch.setattr(attention, "packed_attention", wrong)
    assert_caught_and_left(root, "packed log-probs of the model")


@pytest.mark.parametrize(("where", "name"), [(attention, "register"), (packed, "head_shape"), (proof, "_probe")])
def test_an_unforeseen_error_is_a_reason_and_no_crash(where, name, monkeypatch):
    def fail(*_):
        raise KeyError("unheard of")

    monkeypatch.setattr(where, name, fail)
    assert_caught_and_left(build("llama"), "KeyError: 'unheard of'")


def test_a_plain_forward_that_the_patch_changes_is_caught(monkeypatch):
    """A model may look at its attention's name; generation and padded scoring must stay what they were."""
    register = attention.register

    def elsewhere(implementation):
        name = register(implementation)
        from transformers import AttentionInterface

        function = AttentionInterface()[name]

        def other(module, *args, **kwargs):
            out, weights = function(module, *args, **kwargs)
            return (out if attention.LAYOUT in kwargs else out * 1.1), weights

        AttentionInterface.register(name + "_other", other)
        return name + "_other"

    monkeypatch.setattr(attention, "register", elsewhere)
    assert_caught_and_left(build("llama"), "the plain forward of a tiny twin of it is off")


# How it leaves a model that is packed


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [*product(("llama", "mistral", "gpt2", "mixtral"), ("sdpa", "eager")), ("gemma2", "eager")],
)
def test_generation_and_padded_scoring_are_bit_equal_to_before(kind, implementation, tmp_path):
    """Of prompts padded on the left: whose positions generation gives to a forward only if it names them."""
    root = build(kind, attn_implementation=implementation)
    prompts = torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11, 12, 13], list(range(20, 31))])
    mask = (prompts != 0).long()

    def said():
        out = root.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=9,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [out.sequences, *out.logits, padded.score(root, shared(), ("entropy",)).logps]

    before = said()
    assert why_not_packed(root) is None
    assert root.config._attn_implementation == f"llmtk_{implementation}"
    for found, expected in zip(said(), before, strict=True):
        assert torch.equal(found, expected)

    root.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "llmtk" not in json.dumps(written)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert torch.equal(padded.score(again, shared()).logps, before[-1])


def test_generators_modes_and_gradients_are_left_alone():
    root = build("gpt2", attn_pdrop=0.0, resid_pdrop=0.3, embd_pdrop=0.3).train()
    root.transformer.h[0].eval()
    modes = [module.training for module in root.modules()]
    assert len(set(modes)) == 2
    for index, parameter in enumerate(root.parameters()):
        parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    torch.manual_seed(3)
    random = torch.get_rng_state()
    assert why_not_packed(root) is None
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in root.modules()] == modes
    for index, parameter in enumerate(root.parameters()):
        if index % 2:
            assert torch.equal(parameter.grad, torch.full_like(parameter, index))
        else:
            assert parameter.grad is None


class PolicyAndValue(nn.Module):
    """A root with more in it than what is scored."""

    def __init__(self):
        super().__init__()
        self.policy = build("llama")
        self.value = nn.Linear(32, 1)

    def forward(self, **inputs):
        return self.policy(**inputs)


def test_a_root_may_hold_what_scoring_does_not_use():
    root = PolicyAndValue()
    expected = measure(padded, root.policy, shared())
    assert why_not_packed(root) is None
    found = measure(packed, root, shared())
    assert not found.pop("value.weight").any()
    assert not found.pop("value.bias").any()
    assert_near({name.removeprefix("policy."): value for name, value in found.items()}, expected)


def test_frozen_models_and_those_in_bfloat16_are_packed():
    assert why_not_packed(build("llama").requires_grad_(False)) is None
    assert why_not_packed(build("qwen3").bfloat16()) is None


def test_gradients_that_are_nothing_but_rounding_refuse_nothing():
    """A key's bias without rotation: its gradient is 0, and each way rounds to another 1e-9."""
    root = build("opt")
    watched = [parameter for name, parameter in root.named_parameters() if "k_proj.bias" in name or "fc1" in name]
    proof._prove(root, root, watched, {}, what="it")


def test_latent_attention_has_a_twin():
    config = AutoConfig.for_model("deepseek_v3", **(PACKED["deepseek_v3"] | LATENT))
    small = proof._shrunk(config)
    assert small.qk_rope_head_dim == small.head_dim == 8
    assert small.num_hidden_layers == 2
    assert config.vocab_size == VOCABULARY, "the model's own configuration stays"


def test_each_kind_of_layer_is_in_the_twin():
    small = proof._shrunk(AutoConfig.for_model("gemma3_text"))
    assert sorted(small.layer_types) == sorted(MIXED)
    assert small.sliding_window == proof.SMALL


def test_the_proof_of_the_built_in_model_is_quick(tmp_path):
    from llmtk.models.checks import resolve

    model = AutoModelForCausalLM.from_pretrained(resolve("builtin")).train()
    began = time.perf_counter()
    assert why_not_packed(model) is None
    seconds = time.perf_counter() - began
    print(f"the proof of the built-in model took {seconds:.3f} s")
    assert seconds < 5


def test_what_was_measured_can_be_had():
    measured = {}
    assert why_not_packed(build("llama"), measured) is None
    assert list(measured) == [
        f"{what} of {of}" for of in ("a tiny twin of it", "the model") for what in ("log-probs", "gradients")
    ]
    assert all(0 < distance < 1e-5 for distance in measured.values())
