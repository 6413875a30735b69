"""LoRA on a tiny model."""

from __future__ import annotations

import pytest
import torch

from llmtk.config.sections import ModelConfig, PeftConfig
from llmtk.errors import ConfigurationError
from llmtk.models.adapters import add_adapter
from llmtk.models.loading import load_model
from llmtk.models.saving import save_model

from .conftest import GPT2, LLAMA, build


@pytest.mark.parametrize("fields", [LLAMA | {"attention_bias": True}, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("keys", [{}, {"use_dora": True, "use_rslora": True}, {"bias": "lora_only"}])
def test_a_fresh_adapter_changes_nothing(tokenizer, ids, fields, keys, recwarn):
    model = build(tokenizer, fields).eval()
    with torch.no_grad():
        before = model(ids).logits
        adapted = add_adapter(model, PeftConfig(r=4, **keys), seed=0).eval()
        torch.testing.assert_close(adapted(ids).logits, before)
    assert not [warning for warning in recwarn if "fan_in_fan_out" in str(warning.message)]


def test_only_the_adapter_is_trained_and_in_float32(tokenizer):
    model = build(tokenizer, frozen_base=True, compute_dtype=torch.bfloat16)
    adapted = add_adapter(model, PeftConfig(r=4), seed=0)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert len(trained) == 2 * 7 * 2  # A and B of seven linear modules in two layers
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_seed_decides_the_adapter_and_the_global_generator_stays(tokenizer):
    before = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        adapted = add_adapter(build(tokenizer), PeftConfig(r=4), seed=seed)
        drawn.append(next(p for name, p in adapted.named_parameters() if "lora_A" in name))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_keys_reach_peft(model):
    keys = {"r": 2, "lora_alpha": 8, "lora_dropout": 0.25, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    lora = add_adapter(model, PeftConfig(**keys), seed=0).peft_config["default"].to_dict()
    assert {key: lora[key] for key in keys} == keys | {"target_modules": {"q_proj"}}


@pytest.mark.parametrize("target", [["query", "value"], "q_proj"])
def test_targets_that_match_nothing(model, target):
    with pytest.raises(ConfigurationError) as info:
        add_adapter(model, PeftConfig(target_modules=target), seed=0)
    assert "It has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(info.value)
    assert ("regular expression" in str(info.value)) == isinstance(target, str)


def test_targets_that_are_a_broken_regular_expression(model):
    with pytest.raises(ConfigurationError, match=r"peft\.target_modules: '\(' is no regular expression: missing \)"):
        add_adapter(model, PeftConfig(target_modules="("), seed=0)


def test_modules_to_save_that_match_nothing(model):
    with pytest.raises(ConfigurationError, match=r"no module 'head'\. It has .*lm_head"):
        add_adapter(model, PeftConfig(modules_to_save=["head"]), seed=0)


# Each option does what its paper or peft says, by hand: the adapter's matrices put into the model's own.


def moved(model, peft_config):
    """Return an adapted model whose adapter has been moved off nothing, and its weights as they came."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = add_adapter(model, peft_config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.eval(), before


def adapter_of(adapted, module):
    """Return A (r, in), B (out, r) and the magnitude (out,) or None, of a module's adapter."""
    layer = adapted.get_base_model().get_submodule(module)
    magnitude = layer.lora_magnitude_vector["default"].weight if layer.lora_magnitude_vector else None
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude


def logits_with(tokenizer, fields, weights, ids):
    plain = build(tokenizer, fields).eval()
    plain.load_state_dict(weights)
    return plain(ids).logits


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 16}, 4.0),
        ({"r": 2, "lora_alpha": 8}, 4.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"}, 2.0),
    ],
)
def test_the_update_is_b_a_times_its_scale(tokenizer, ids, keys, scale):
    adapted, weights = moved(build(tokenizer), PeftConfig(**keys))
    for name in [name for name in weights if "_proj." in name]:
        a, b, _ = adapter_of(adapted, name.removesuffix(".weight"))
        assert a.shape[0] == b.shape[1] == keys["r"]
        weights[name] = weights[name] + scale * b @ a
    torch.testing.assert_close(adapted(ids).logits, logits_with(tokenizer, LLAMA, weights, ids))


def test_dora_trains_magnitude_and_direction_apart(tokenizer, ids):
    adapted, weights = moved(build(tokenizer), PeftConfig(r=4, lora_alpha=8, use_dora=True))
    for name in [name for name in weights if "_proj." in name]:
        a, b, magnitude = adapter_of(adapted, name.removesuffix(".weight"))
        torch.testing.assert_close(magnitude.detach(), weights[name].norm(dim=1))  # as they came
        assert magnitude.requires_grad
        with torch.no_grad():
            magnitude.mul_(1.5)
        direction = weights[name] + 2 * b @ a
        weights[name] = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(adapted(ids).logits, logits_with(tokenizer, LLAMA, weights, ids))


def test_adapter_dropout_is_in_training_alone(model, ids):
    adapted, _ = moved(model, PeftConfig(r=4, lora_dropout=0.5))
    assert torch.equal(adapted(ids).logits, adapted(ids).logits)
    adapted.train()
    torch.manual_seed(0)
    assert not torch.equal(adapted(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize(
    ("target", "modules"),
    [
        ("all-linear", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (r".*\.layers\.1\.mlp\.(up|down)_proj", {"up_proj", "down_proj"}),
        (["lm_head", "embed_tokens"], {"lm_head", "embed_tokens"}),
    ],
)
def test_targets(model, target, modules):
    adapted = add_adapter(model, PeftConfig(r=2, target_modules=target), seed=0)
    parts = [name.partition(".lora_")[0].split(".") for name, p in adapted.named_parameters() if p.requires_grad]
    assert {part[-1] for part in parts} == modules
    assert {part[4] for part in parts if "layers" in part} in (
        {"0", "1"},
        {"1"} if "layers" in str(target) else set(),
        set(),
    )


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases(tokenizer, bias):
    adapted = add_adapter(build(tokenizer, GPT2), PeftConfig(r=2, bias=bias, target_modules=["c_attn"]), seed=0)
    found = {
        name.removeprefix("base_model.model.transformer.h.").partition(".")[2].removesuffix(".bias")
        for name, p in adapted.named_parameters()
        if p.requires_grad and name.endswith(".bias")
    }
    expected = {"none": set(), "lora_only": {"attn.c_attn.base_layer"}}
    assert expected.get(bias, found) == found
    if bias == "all":
        assert {"attn.c_attn.base_layer", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2"} <= found


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_a_model_that_has_none(model, bias):
    with pytest.raises(ConfigurationError, match=f"peft.bias: {bias}, and .* has no bias"):
        add_adapter(model, PeftConfig(bias=bias))


def test_modules_to_save_are_trained_in_full_and_their_own(model, ids):
    head = model.lm_head.weight.detach().clone()
    adapted = add_adapter(model, PeftConfig(r=2, modules_to_save=["lm_head"]), seed=0).eval()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    (name,) = trained
    assert name.endswith("lm_head.modules_to_save.default.weight")
    assert torch.equal(trained[name], head)
    before = adapted(ids).logits
    with torch.no_grad():
        trained[name].mul_(2)
    torch.testing.assert_close(adapted(ids).logits, 2 * before)


def test_how_the_first_matrix_is_drawn(tokenizer):
    wide = LLAMA | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    drawn = {}
    for init in (True, "gaussian"):
        adapted = add_adapter(build(tokenizer, wide), PeftConfig(r=8, init_lora_weights=init), seed=0)
        a, b, _ = adapter_of(adapted, "model.layers.0.mlp.down_proj")
        assert not b.any()
        drawn[init] = a.detach()
    assert drawn["gaussian"].std().item() == pytest.approx(1 / 8, rel=0.05)
    assert drawn["gaussian"].abs().max() > 2.5 / 8
    assert drawn[True].abs().max().item() == pytest.approx(512**-0.5, rel=0.05)  # uniform within 1 / sqrt(in)


@pytest.mark.parametrize("init", [False, "pissa", "olora", "orthogonal", "loftq", "eva", "nonsense"])
def test_ways_to_begin_that_are_not_nothing_are_refused(init):
    with pytest.raises(ValueError, match=f"init_lora_weights is {init}: give true or gaussian"):
        PeftConfig(init_lora_weights=init)


def test_an_adapter_is_continued_where_it_was(tmp_path, folder, tokenizer, ids):
    config = ModelConfig(name_or_path=str(folder))
    options = {"trainable": True, "compute_dtype": torch.float32}
    base = load_model(config, tokenizer, frozen_base=True, **options)
    adapted, _ = moved(base, PeftConfig(r=4, use_dora=True, modules_to_save=["lm_head"]))
    save_model(adapted, tokenizer, tmp_path / "adapter")
    again = load_model(ModelConfig(name_or_path=str(tmp_path / "adapter")), tokenizer, **options)
    assert torch.equal(again.eval()(ids).logits, adapted(ids).logits)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (adapted, again)]
    assert trained[0] == trained[1]


def test_the_bases_revision_is_kept(model):
    assert add_adapter(model, PeftConfig(r=2), revision="v2").peft_config["default"].revision == "v2"
