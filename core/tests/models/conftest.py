"""Tiny models made on the spot: no hub, no download."""

from __future__ import annotations

import pytest
import torch

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.models.loading import load_model
from llmtk.models.saving import save_model
from llmtk.models.tokenizers import train_tokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}


def build(tokenizer, fields=LLAMA, **keys):
    """Build a model from scratch, to be trained in float32, unless ``keys`` say otherwise."""
    options = {"trainable": True, "compute_dtype": torch.float32, "frozen_base": False, "seed": 0} | keys
    return load_model(ModelConfig(from_config=fields), tokenizer, **options)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TokenizerConfig(kind="byte"), [])


@pytest.fixture
def model(tokenizer):
    return build(tokenizer)


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A sound model folder."""
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def ids():
    """Token ids, (2, 12)."""
    return torch.randint(4, 260, (2, 12), generator=torch.Generator().manual_seed(1))
