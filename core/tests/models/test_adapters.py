"""LoRA on a tiny model."""

from __future__ import annotations

import pytest
import torch

from llmtk.config.sections import PeftConfig
from llmtk.errors import ConfigurationError
from llmtk.models.adapters import add_adapter

from .conftest import GPT2, LLAMA, build


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
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


def test_modules_to_save_that_match_nothing(model):
    with pytest.raises(ConfigurationError, match=r"no module 'head'\. It has .*lm_head"):
        add_adapter(model, PeftConfig(modules_to_save=["head"]), seed=0)
