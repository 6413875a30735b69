"""Weights of 4 and 8 bits, where bitsandbytes is installed."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtk.config.sections import ModelConfig, PeftConfig
from llmtk.errors import ConfigurationError
from llmtk.models import load
from llmtk.models.adapters import add_adapter
from llmtk.models.loading import load_model, parameter_counts
from llmtk.models.saving import load_folder, save_merged, save_model

from .conftest import LLAMA, build

bitsandbytes = pytest.importorskip("bitsandbytes")

WIDE = LLAMA | {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A model whose matrices fill several blocks of 64 values."""
    save_model(build(tokenizer, WIDE), tokenizer, tmp_path / "wide")
    return tmp_path / "wide"


def quantised(folder, tokenizer, **keys):
    config = ModelConfig(name_or_path=str(folder), **keys)
    return load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32, frozen_base=True)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def apart(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("keys", "kind", "most"),
    [
        ({"quantization": "4bit"}, "Linear4bit", 0.3),
        ({"quantization": "4bit", "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}, "Linear4bit", 0.4),
        ({"quantization": "8bit"}, "Linear8bitLt", 0.03),
    ],
)
def test_linear_layers_are_quantised_and_the_head_is_not(folder, tokenizer, ids, keys, kind, most):
    model = quantised(folder, tokenizer, **keys)
    kinds = {
        name.rpartition(".")[2]: type(m).__name__ for name, m in model.named_modules() if hasattr(m, "in_features")
    }
    assert {kinds[name] for name in ("q_proj", "o_proj", "up_proj", "down_proj")} == {kind}
    assert kinds["lm_head"] == "Linear"
    full = logits(AutoModelForCausalLM.from_pretrained(folder), ids)
    assert 1e-4 < apart(logits(model, ids), full) < most


def test_training_after_evaluating_is_as_before(folder, tokenizer, ids):
    def gradients(model):
        model.zero_grad()
        model.train()(ids).logits.float().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    model = add_adapter(quantised(folder, tokenizer, quantization="4bit"), PeftConfig(r=4))
    before = gradients(model)
    evaluated = logits(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))
    torch.testing.assert_close(evaluated, model(ids).logits.detach())


def test_options_of_4_bits(folder, tokenizer):
    layer = quantised(folder, tokenizer, quantization="4bit").model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.float32)
    options = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"}
    layer = quantised(folder, tokenizer, quantization="4bit", **options).model.layers[0].mlp.up_proj
    state = layer.weight.quant_state
    assert (state.quant_type, state.nested, layer.compute_dtype) == ("fp4", False, torch.bfloat16)


def test_parameters_are_counted_as_what_they_stand_for(folder, tokenizer):
    total = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(folder).parameters())
    for bits in ("4bit", "8bit"):
        assert parameter_counts(quantised(folder, tokenizer, quantization=bits))[1] == total


@pytest.mark.parametrize(
    ("bits", "keys"), [("4bit", {}), ("8bit", {}), ("4bit", {"use_dora": True})], ids=["4", "8", "dora"]
)
def test_an_adapter_on_it_loads_again_as_it_was_trained(tmp_path, folder, tokenizer, ids, bits, keys):
    model = add_adapter(quantised(folder, tokenizer, quantization=bits), PeftConfig(r=4, **keys))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    save_model(model, tokenizer, tmp_path / "adapter")
    assert not (tmp_path / "adapter/model.safetensors").exists()
    again, _ = load_folder(tmp_path / "adapter", ModelConfig(quantization=bits))
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not torch.equal(logits(load(tmp_path / "adapter")[0], ids), logits(model, ids))


def test_it_is_merged_into_the_weights_before_they_were_quantised(tmp_path, folder, tokenizer, ids):
    model = add_adapter(quantised(folder, tokenizer, quantization="4bit"), PeftConfig(r=4))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    save_model(model, tokenizer, tmp_path / "adapter")
    save_merged(tmp_path / "adapter", tmp_path / "merged", ModelConfig(quantization="4bit"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged, "is_quantized", False)
    torch.testing.assert_close(logits(merged, ids), logits(load(tmp_path / "adapter")[0], ids), rtol=1e-4, atol=1e-5)


def test_a_model_that_is_saved_quantised_carries_an_adapter_and_is_not_trained_itself(tmp_path, folder, tokenizer, ids):
    saved = quantised(folder, tokenizer, quantization="4bit")
    save_model(saved, tokenizer, tmp_path / "saved")
    config = ModelConfig(name_or_path=str(tmp_path / "saved"))
    with pytest.raises(ConfigurationError, match="quantised weights cannot be trained themselves"):
        load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32)
    model = load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32, frozen_base=True)
    assert torch.equal(logits(add_adapter(model, PeftConfig(r=4)), ids), logits(saved, ids))
