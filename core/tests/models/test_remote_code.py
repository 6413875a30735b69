"""Python code that comes with a model runs only where that was asked for."""

from __future__ import annotations

import json

import pytest
import torch

from llmtk.config.sections import ModelConfig
from llmtk.errors import ModelLoadError
from llmtk.models import load
from llmtk.models.loading import load_model

CODE = """
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own(folder, tmp_path, monkeypatch):
    """Return a model folder whose classes stand in a file of its own, and the file that running it makes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    ran = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(CODE.format(ran=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": classes}))
    return folder, ran


def loaded(folder, tokenizer, **keys):
    config = ModelConfig(name_or_path=str(folder), **keys)
    return load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32)


def test_it_is_not_run_unless_asked_for(own, tokenizer):
    folder, ran = own
    for refused in (lambda: loaded(folder, tokenizer), lambda: load(folder)):
        with pytest.raises(ModelLoadError, match=r"comes with Python code .* set model\.trust_remote_code: true"):
            refused()
    assert not ran.exists()


def test_it_is_run_if_asked_for(own, tokenizer, model, ids):
    folder, ran = own
    found = loaded(folder, tokenizer, trust_remote_code=True)
    assert ran.exists()
    assert type(found).__name__ == "OwnForCausalLM"
    assert torch.equal(found(ids).logits, model(ids).logits)
    assert type(load(folder, trust_remote_code=True)[0]).__name__ == "OwnForCausalLM"
