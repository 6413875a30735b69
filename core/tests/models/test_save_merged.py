"""An adapter merged into its base: a full model that transformers loads by itself, and that computes the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from llmtk.config.sections import ModelConfig, PeftConfig
from llmtk.models import load
from llmtk.models.adapters import add_adapter
from llmtk.models.loading import load_model
from llmtk.models.saving import save_merged, save_model
from llmtk.models.tokenizers import load_tokenizer

from .conftest import GPT2, build
from .conftest import LLAMA as PLAIN

LLAMA = PLAIN | {"attention_bias": True}
TIED = LLAMA | {"tie_word_embeddings": True}
ADAPTERS = {
    "lora": {},
    "rslora and biases": {"use_rslora": True, "bias": "all"},
    "dora": {"use_dora": True},
    "a head of its own": {"modules_to_save": ["lm_head"]},
    "an adapted head": {"target_modules": ["q_proj", "c_attn", "lm_head"]},
    "adapted embeddings": {"target_modules": ["embed_tokens", "wte", "c_attn"]},
}


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def adapted(folder, tokenizer, head="language", **keys):
    """Return a model on a folder with an adapter that has moved."""
    options = {"trainable": True, "compute_dtype": torch.float32, "frozen_base": True}
    model = add_adapter(
        load_model(ModelConfig(name_or_path=str(folder)), tokenizer, head=head, **options), PeftConfig(r=4, **keys)
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def merged(model, tokenizer, tmp_path):
    """Save the adapter, merge it, and return the folder; the base and the adapter are gone from then on."""
    save_model(model, tokenizer, tmp_path / "adapter")
    save_merged(tmp_path / "adapter", tmp_path / "merged", ModelConfig())
    shutil.rmtree(tmp_path / "adapter")
    return tmp_path / "merged"


@pytest.mark.parametrize("keys", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("fields", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
def test_the_merged_model_computes_what_the_adapter_does(tmp_path, tokenizer, ids, fields, keys):
    save_model(build(tokenizer, fields), tokenizer, tmp_path / "base")
    model = adapted(tmp_path / "base", tokenizer, **keys)
    expected = logits(model, ids)
    folder = merged(model, tokenizer, tmp_path)
    shutil.rmtree(tmp_path / "base")
    assert not (folder / "adapter_config.json").exists()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load(folder)[0], ids), expected, rtol=1e-4, atol=1e-5)
    assert (expected - logits(build(tokenizer, fields), ids)).norm() > 0.1 * expected.norm()


def test_tied_weights_stay_tied_where_nothing_changes_one_of_them(tmp_path, tokenizer):
    save_model(build(tokenizer, TIED), tokenizer, tmp_path / "base")
    for keys, tied in (({}, True), ({"modules_to_save": ["lm_head"]}, False)):
        folder = merged(adapted(tmp_path / "base", tokenizer, **keys), tokenizer, tmp_path)
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is tied


def test_the_dtype_is_the_bases(tmp_path, tokenizer, ids):
    save_model(build(tokenizer).to(torch.bfloat16), tokenizer, tmp_path / "base")
    model = adapted(tmp_path / "base", tokenizer)
    folder = merged(model, tokenizer, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert plain.dtype == torch.bfloat16
    expected = logits(model, ids)
    assert (logits(plain.float(), ids) - expected).norm() < 2e-2 * expected.norm()


def test_the_model_that_is_trained_stays_as_it_is(tmp_path, folder, tokenizer, ids):
    model = adapted(folder, tokenizer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged(model, tokenizer, tmp_path)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_tokens_that_were_added_are_there(tmp_path, folder, ids):
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder)))
    tokenizer.add_tokens(["more"])
    model = adapted(folder, tokenizer)
    expected = logits(model, ids)
    loaded, its = load(merged(model, tokenizer, tmp_path))
    assert len(its) == 261
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-4, atol=1e-5)


def test_a_head_of_one_value(tmp_path, folder, tokenizer, ids):
    model = adapted(folder, tokenizer, head="value")
    expected = logits(model, ids)
    path = merged(model, tokenizer, tmp_path)
    torch.testing.assert_close(logits(load(path)[0], ids), expected, rtol=1e-4, atol=1e-5)
    plain = AutoModelForSequenceClassification.from_pretrained(path)
    torch.testing.assert_close(logits(plain, ids), expected, rtol=1e-4, atol=1e-5)
