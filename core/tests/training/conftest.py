"""Tiny models made on the spot, and one thread: on two shared cores, small matrices wait for each other longer."""

from __future__ import annotations

import pytest
import torch

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.models.loading import load_model
from llmtk.models.saving import save_model
from llmtk.models.tokenizers import train_tokenizer

from .kit import GPT2, LLAMA


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _no_plot(request, monkeypatch):
    """Draw no loss curve, which takes longer than the rest of a tiny run, unless the test asks for it."""
    if "plot" not in request.fixturenames:
        monkeypatch.setattr("llmtk.reporting.plot.plot_losses", lambda *_: False)


@pytest.fixture
def plot():
    """Let the run draw its loss curve."""


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """A model folder."""
    path = tmp_path_factory.mktemp("models") / "llama"
    model = load_model(ModelConfig(from_config=LLAMA), tokenizer, trainable=True, compute_dtype=torch.float32)
    save_model(model, tokenizer, path)
    return str(path)
