"""Tiny models to write with, and one thread: on few cores, small matrices wait for each other longer."""

from __future__ import annotations

import pytest
import torch

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.models.loading import load_model
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


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TokenizerConfig(kind="byte"), [])


@pytest.fixture
def build(tokenizer):
    """Build a model from scratch, in float32 and eval mode."""

    def make(fields=LLAMA, **more):
        config = ModelConfig(from_config=fields | more)
        return load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32).eval()

    return make


@pytest.fixture
def model(build):
    return build()


@pytest.fixture(params=["llama", "gpt2"])
def either(request, build):
    return build({"llama": LLAMA, "gpt2": GPT2}[request.param])
