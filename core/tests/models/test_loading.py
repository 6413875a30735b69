"""Models: built, loaded, resized, in the right dtype, without dropout."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.errors import ConfigurationError, ModelLoadError
from llmtk.models.loading import disable_dropout, load_model
from llmtk.models.tokenizers import train_tokenizer

from .conftest import GPT2, LLAMA, build

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16


def load(folder, tokenizer, config=None, **keys):
    options = {"trainable": True, "compute_dtype": FLOAT32, "frozen_base": False, "seed": 0} | keys
    return load_model(ModelConfig(name_or_path=str(folder), **(config or {})), tokenizer, **options)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("fields", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_from_scratch_takes_size_and_tokens_from_the_tokenizer(tokenizer, fields):
    model = build(tokenizer, fields)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == 260
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (None, 0, 1)
    assert model.generation_config.eos_token_id == [0, 3]
    assert model.config.use_cache


def test_from_scratch_takes_given_fields(tokenizer):
    model = build(tokenizer, LLAMA | {"vocab_size": 512, "eos_token_id": 3})
    assert model.get_input_embeddings().num_embeddings == 512
    assert model.config.eos_token_id == 3


def test_a_vocabulary_smaller_than_the_tokenizer(tokenizer):
    with pytest.raises(ConfigurationError, match="vocab_size is 100, the tokenizer has 260 tokens"):
        build(tokenizer, LLAMA | {"vocab_size": 100})


def test_seed_decides_the_weights(tokenizer):
    one, same, other = (build(tokenizer, seed=seed).get_input_embeddings().weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_global_generators_stay_as_they_were(tokenizer, folder):
    grown = train_tokenizer(TokenizerConfig(kind="byte"), [])
    grown.add_tokens(["more"])
    before = states()
    build(tokenizer)
    load(folder, grown)
    assert states() == before


@pytest.mark.parametrize(
    ("config", "options", "dtype"),
    [
        ({}, {}, FLOAT32),
        ({}, {"compute_dtype": BFLOAT16}, FLOAT32),
        ({}, {"compute_dtype": BFLOAT16, "frozen_base": True}, BFLOAT16),
        ({}, {"compute_dtype": BFLOAT16, "trainable": False}, BFLOAT16),
        ({"dtype": "bfloat16"}, {}, BFLOAT16),
        ({"dtype": "float32"}, {"compute_dtype": BFLOAT16, "frozen_base": True}, FLOAT32),
        ({"dtype": "float16"}, {"frozen_base": True}, torch.float16),
    ],
)
def test_dtype(folder, tokenizer, config, options, dtype):
    model = load(folder, tokenizer, config, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_float16_weights_are_not_trained(folder, tokenizer):
    with pytest.raises(ConfigurationError, match="float16 weights cannot be trained"):
        load(folder, tokenizer, {"dtype": "float16"})


def test_what_is_not_trained_is_frozen_and_in_eval_mode(folder, tokenizer):
    model = load(folder, tokenizer, trainable=False)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_attention_implementation(folder, tokenizer):
    assert load(folder, tokenizer, {"attn_implementation": "eager"}).config._attn_implementation == "eager"
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load(folder, tokenizer, {"attn_implementation": "no_such_attention"})


def test_embeddings_grow_with_the_tokenizer_and_never_shrink(folder, tokenizer):
    small = train_tokenizer(TokenizerConfig(kind="char"), ["ab"])
    assert load(folder, small).get_input_embeddings().num_embeddings == 260
    grown = train_tokenizer(TokenizerConfig(kind="byte"), [])
    grown.add_tokens(["more"])
    first, second = load(folder, grown), load(folder, grown)
    assert first.config.vocab_size == first.lm_head.out_features == 261
    assert torch.equal(first.get_input_embeddings().weight, second.get_input_embeddings().weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(folder, tokenizer, value):
    change_weights(folder, lambda weights: weights["model.norm.weight"].__setitem__(3, value))
    with pytest.raises(ModelLoadError, match=r"1 of 32 values of model\.norm\.weight are NaN or infinite"):
        load(folder, tokenizer)


def test_missing_weights_are_not_drawn_at_random(folder, tokenizer):
    change_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of the weights of LlamaForCausalLM.* model\.norm\.weight"):
        load(folder, tokenizer)


def test_weights_of_another_shape(folder, tokenizer):
    change_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load(folder, tokenizer)


@pytest.mark.parametrize(
    "fields",
    [
        GPT2 | {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        LLAMA | {"attention_dropout": 0.5},
        {
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "word_embed_proj_dim": 32,
            "dropout": 0.5,
            "attention_dropout": 0.5,
            "layerdrop": 0.5,
        },
    ],
    ids=["gpt2", "llama", "opt"],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_is_off(tokenizer, ids, fields, attention):
    config = ModelConfig(from_config=fields, attn_implementation=attention)
    model = load_model(config, tokenizer, trainable=True, compute_dtype=FLOAT32, frozen_base=False, seed=0).train()
    saved = model.config.to_dict()
    torch.manual_seed(1)  # OPT's layer dropout can skip both layers twice
    assert not torch.equal(model(ids).logits, model(ids).logits)
    disable_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert model.config.to_dict() == saved
