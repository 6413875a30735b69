"""A merged adapter is the base plus its update, to the dtype's own rounding."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmtk.config.sections import PeftConfig
from llmtk.errors import ConfigurationError
from llmtk.models import load
from llmtk.models.adapters import add_adapter
from llmtk.models.merging import merge_adapter
from llmtk.models.saving import save_model

from .conftest import GPT2, LLAMA, build

TIED = LLAMA | {"tie_word_embeddings": True}


def moved(model, **keys):
    """Put an adapter on a model, and move it."""
    adapted = add_adapter(model, PeftConfig(r=4, **keys), seed=0).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


@pytest.mark.parametrize(
    ("fields", "keys"),
    [
        (LLAMA, {}),
        (GPT2, {}),
        (LLAMA, {"use_dora": True, "use_rslora": True}),
        (GPT2, {"bias": "all"}),
        (LLAMA, {"modules_to_save": ["lm_head"]}),
        (TIED, {"target_modules": ["q_proj", "lm_head"]}),
        (TIED, {"target_modules": ["q_proj", "embed_tokens"]}),
        (TIED, {"modules_to_save": ["lm_head"]}),
    ],
)
def test_logits_are_the_adapters_and_stay_so_on_disk(tmp_path, tokenizer, ids, fields, keys):
    model = moved(build(tokenizer, fields), **keys)
    untouched = logits(build(tokenizer, fields), ids)
    expected = logits(model, ids)
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, untouched, atol=1e-2)
    save_model(merged, tokenizer, tmp_path)
    for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load(tmp_path)[0]):
        torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-5, atol=1e-5)


def test_the_update_is_a_product_added_and_rounded_once(tokenizer):
    model = moved(build(tokenizer).to(torch.bfloat16), target_modules=["q_proj"], lora_alpha=6)
    layer = model.get_base_model().model.layers[1].self_attn.q_proj
    a, b = layer.lora_A.default.weight.detach().clone(), layer.lora_B.default.weight.detach().clone()
    base = layer.base_layer.weight.detach().clone()
    assert base.dtype == torch.bfloat16
    merged = merge_adapter(model)
    expected = (base.float() + 6 / 4 * b.float() @ a.float()).to(torch.bfloat16)
    assert torch.equal(merged.model.layers[1].self_attn.q_proj.weight, expected)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_another_dtype_is_as_near_as_it_can_tell(tokenizer, ids, dtype, apart):
    model = moved(build(tokenizer))
    expected = logits(model, ids)
    merged = merge_adapter(model, dtype)
    assert merged.dtype == dtype
    assert (logits(merged, ids) - expected).norm() <= apart * expected.norm()


def test_a_quantised_base_is_refused(tokenizer):
    model = moved(build(tokenizer))
    model.get_base_model().is_quantized = True
    with pytest.raises(ConfigurationError, match="the adapter's base is quantised"):
        merge_adapter(model)
