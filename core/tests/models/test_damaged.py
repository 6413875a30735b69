"""Files of a model that are damaged in any way: an error that llmtk raises, or a model that loads."""

from __future__ import annotations

import contextlib
import shutil

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llmtk.config.sections import ModelConfig
from llmtk.errors import LlmtkError
from llmtk.models.loading import load_model
from llmtk.models.tokenizers import load_tokenizer

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), place=st.floats(0, 1), byte=st.integers(0, 255), cut=st.booleans())
@example(name="tokenizer.json", place=0.0, byte=0, cut=True)
@example(name="model.safetensors", place=1.0, byte=0, cut=True)
def test_damage_is_told_or_does_no_harm(tmp_path, folder, name, place, byte, cut):
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged, dirs_exist_ok=True)
    data = bytearray((folder / name).read_bytes())
    at = min(int(place * len(data)), len(data) - 1)
    data[at] = byte
    (damaged / name).write_bytes(data[:at] if cut else data)
    config = ModelConfig(name_or_path=str(damaged))
    with contextlib.suppress(LlmtkError):
        model = load_model(config, load_tokenizer(config), trainable=True, compute_dtype=torch.float32)
        assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
