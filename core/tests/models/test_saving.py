"""What is written loads again: with llmtk, with transformers and with peft."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtk.config.sections import ModelConfig, PeftConfig
from llmtk.errors import ModelLoadError
from llmtk.models import load
from llmtk.models.adapters import add_adapter
from llmtk.models.loading import load_model
from llmtk.models.saving import save_model
from llmtk.models.tokenizers import load_tokenizer

from .conftest import GPT2, LLAMA, build

TIED = LLAMA | {"tie_word_embeddings": True}


def equal(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


@pytest.fixture
def adapter(tmp_path, folder, tokenizer):
    """An adapter that has moved, and its folder."""
    base = load_model(
        ModelConfig(name_or_path=str(folder)),
        tokenizer,
        trainable=True,
        compute_dtype=torch.float32,
        frozen_base=True,
        seed=0,
    )
    model = add_adapter(base, PeftConfig(r=4), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    save_model(model, tokenizer, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("fields", [LLAMA, TIED, GPT2], ids=["llama", "tied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_loads_bit_equal(tmp_path, tokenizer, fields, dtype):
    model = build(tokenizer, fields).to(dtype)
    save_model(model, tokenizer, tmp_path)
    loaded, its_tokenizer = load(tmp_path)
    assert equal(loaded, model)
    assert equal(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), model)
    assert its_tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert loaded.dtype == dtype
    assert not loaded.training


def test_what_a_folder_holds(folder):
    assert sorted(file.name for file in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert json.loads((folder / "config.json").read_text())["use_cache"] is True
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 3]


def test_weights_may_be_read_by_whom_the_other_files_may_be_read(tmp_path, model, tokenizer):
    before = os.umask(0o027)
    try:
        save_model(model, tokenizer, tmp_path / "saved")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "saved").iterdir()} == {"0o640"}


@pytest.mark.parametrize("given", [{}, {"key": "distil.teacher"}])
def test_errors_name_the_key_that_named_the_model(tmp_path, folder, given):
    key = given.get("key", "model.name_or_path")
    with pytest.raises(ModelLoadError, match=rf"^{key}: there is no folder /nowhere/teacher"):
        load("/nowhere/teacher", **given)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelLoadError, match=rf"^{key}: .* has no tokenizer") as told:
        load(folder, **given)
    assert ("model.tokenizer" in str(told.value)) == (not given)  # another model than the run's has no such key


def test_an_adapter_loads_on_its_base(adapter, ids):
    model, folder = adapter
    expected = logits(model, ids)
    loaded, tokenizer = load(folder)
    assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder), ids), expected)
    assert len(tokenizer) == 260
    assert loaded.generation_config.eos_token_id == [0, 3]
    assert not list(folder.glob("*.bin"))


def test_a_base_named_by_a_relative_path_is_recorded_by_its_absolute_one(tmp_path, folder, tokenizer, monkeypatch):
    monkeypatch.chdir(folder.parent)
    base = load_model(
        ModelConfig(name_or_path="model"),
        tokenizer,
        trainable=True,
        compute_dtype=torch.float32,
        frozen_base=True,
        seed=0,
    )
    save_model(add_adapter(base, PeftConfig(r=4), seed=0), tokenizer, "adapter")
    monkeypatch.chdir("/")
    load(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_embeddings_that_grew_travel_with_the_adapter(tmp_path, folder, ids):
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(folder)))
    tokenizer.add_tokens(["more"])
    base = load_model(
        ModelConfig(name_or_path=str(folder)),
        tokenizer,
        trainable=True,
        compute_dtype=torch.float32,
        frozen_base=True,
        seed=7,
    )
    model = add_adapter(base, PeftConfig(r=4), seed=0)
    save_model(model, tokenizer, tmp_path / "adapter")
    loaded, its_tokenizer = load(tmp_path / "adapter")
    assert len(its_tokenizer) == 261
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"), ids), logits(model, ids))


def test_the_base_is_gone(adapter, folder):
    shutil.rmtree(folder)
    with pytest.raises(ModelLoadError, match=r"is an adapter on .*, which is not there any more\. Put the base"):
        load(adapter[1])


def test_an_adapter_that_names_no_base(adapter):
    file = adapter[1] / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ModelLoadError, match="does not say which model"):
        load(adapter[1])


@pytest.mark.parametrize("damage", [lambda data: data[:-5], lambda data: data[:20]])
def test_a_damaged_adapter_is_named(adapter, damage):
    file = adapter[1] / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ModelLoadError, match=r"adapter_model\.safetensors is damaged"):
        load(adapter[1])


def test_nothing_to_load(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        load(tmp_path)
    with pytest.raises(ModelLoadError, match="there is no folder"):
        load(tmp_path / "nothing")
