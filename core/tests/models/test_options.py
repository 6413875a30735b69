"""Every option that a model cannot have, with its message."""

from __future__ import annotations

import json

import pytest

from llmtk.config.sections import ModelConfig, PeftConfig
from llmtk.errors import ConfigurationError
from llmtk.models.options import check_options

from .conftest import LLAMA


def check(model, peft=None, *, merges=False, dropout=True):
    check_options(model, peft, merges=merges, dropout=dropout)


def rejected(model, peft=None, **keys):
    with pytest.raises(ConfigurationError) as info:
        check(model, peft, **keys)
    return str(info.value)


def change_config(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def test_a_revision_of_what_has_none(folder):
    assert "this one is the folder" in rejected(ModelConfig(name_or_path=str(folder), revision="main"))
    assert "built from scratch" in rejected(ModelConfig(from_config=LLAMA, revision="main"))
    check(ModelConfig(name_or_path="some-org/some-model", revision="main"))


def test_a_model_type_that_is_no_name():
    with pytest.raises(ValueError, match="from_config needs model_type"):
        ModelConfig(from_config={"model_type": ["llama"]})


@pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
def test_attention_that_is_always_there(folder, name):
    check(ModelConfig(name_or_path=str(folder), attn_implementation=name))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sdap", "not known. Did you mean 'sdpa'? Known: eager, flash_attention_2"),
        ("flash-attention-2", "Did you mean 'flash_attention_2'?"),
        ("paged|sdpa", "is not known"),
        ("llmtk_sdpa", "is not known"),
        ("flash_attention_2", "neither flash-attn nor kernels is installed (pip install kernels fetches a built one)"),
        ("flash_attention_2", "there is no GPU. Give sdpa"),
        ("flash_attention_3", "neither flash-attn-3 nor kernels is installed"),
        ("kernels-community/flash-attn2", "pip install kernels"),
    ],
)
def test_attention_that_is_not_here(folder, name, said, monkeypatch):
    from llmtk.scoring import attention

    attention.register("sdpa")
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: False)
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: False)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    message = rejected(ModelConfig(name_or_path=str(folder), attn_implementation=name))
    assert message.startswith(f"model.attn_implementation: {name}")
    assert said in message


def test_flash_attention_where_it_can_be(folder, monkeypatch):
    config = ModelConfig(name_or_path=str(folder), attn_implementation="flash_attention_2")
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: distribution == "flash-attn")
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    check(config)
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: False)
    monkeypatch.setattr("transformers.utils.is_kernels_available", lambda: True)
    check(config)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantising_without_bitsandbytes(folder, bits, monkeypatch):
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: False)
    message = rejected(ModelConfig(name_or_path=str(folder), quantization=bits))
    assert message == (
        f"model.quantization: {bits} needs bitsandbytes, which is not installed: pip install 'llmtk-core[quantization]'"
    )


def test_a_model_that_is_quantised_already_is_not_quantised_again(folder, monkeypatch):
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: True)
    change_config(folder, quantization_config={"quant_method": "gptq"})
    assert "is saved quantised, by gptq" in rejected(ModelConfig(name_or_path=str(folder), quantization="4bit"))


@pytest.mark.parametrize(
    "keys",
    [
        {"bnb_4bit_quant_type": "nf4"},
        {"quantization": "8bit", "bnb_4bit_use_double_quant": True},
        {"bnb_4bit_compute_dtype": "auto"},
    ],
)
def test_options_of_4_bits_need_4_bits(keys):
    with pytest.raises(ValueError, match="needs quantization: 4bit"):
        ModelConfig(**keys)


def test_random_weights_are_not_quantised():
    with pytest.raises(ValueError, match="quantization is for trained weights"):
        ModelConfig(from_config=LLAMA, quantization="4bit")


@pytest.fixture
def adapter(tmp_path, folder):
    path = tmp_path / "adapter"
    path.mkdir()
    (path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    return str(path)


def test_what_can_be_trained(folder, adapter, monkeypatch):
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: True)
    full, lora = ModelConfig(name_or_path=str(folder)), PeftConfig(lora_dropout=0.1)
    check(full, dropout=False)
    check(full, lora, merges=True)
    check(full.model_copy(update={"train_only": 2}))
    check(full.model_copy(update={"quantization": "4bit"}), lora, merges=True)
    check(ModelConfig(name_or_path=adapter, quantization="8bit"), merges=True)


def test_an_adapter_beside_another(adapter):
    assert "is an adapter, which is trained on as it is" in rejected(ModelConfig(name_or_path=adapter), PeftConfig())


def test_an_adapter_on_random_weights():
    assert "has random weights" in rejected(ModelConfig(from_config=LLAMA), PeftConfig())


def test_parts_of_a_model_that_an_adapter_freezes(folder, adapter):
    beside = ModelConfig(name_or_path=str(folder), train_only=1)
    assert "model.train_only: beside an adapter the whole model is frozen" in rejected(beside, PeftConfig())
    assert "model.freeze: beside an adapter" in rejected(ModelConfig(name_or_path=adapter, freeze=["lm_head"]))


def test_dora_on_8_bits(folder, monkeypatch):
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: True)
    model = ModelConfig(name_or_path=str(folder), quantization="8bit")
    assert "Give quantization: 4bit" in rejected(model, PeftConfig(use_dora=True))


def test_dropout_that_would_have_no_effect(folder):
    model, lora = ModelConfig(name_or_path=str(folder)), PeftConfig(lora_dropout=0.1)
    assert "give train.disable_dropout: false" in rejected(model, lora, dropout=False)


def test_merging_without_an_adapter(folder):
    assert "there is no adapter to merge" in rejected(ModelConfig(name_or_path=str(folder)), merges=True)


@pytest.mark.parametrize("saved", [False, True])
def test_quantised_weights_are_not_trained_in_full(folder, saved, monkeypatch):
    monkeypatch.setattr("llmtk.models.options._is_installed", lambda distribution: True)
    if saved:
        change_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    model = ModelConfig(name_or_path=str(folder), quantization=None if saved else "4bit")
    message = rejected(model)
    assert "quantised weights cannot be trained themselves" in message
    assert ("leave quantization out" in message) != saved
    check(model, PeftConfig())


def test_nothing_is_merged_into_weights_that_are_saved_quantised(folder, adapter):
    change_config(folder, quantization_config={"quant_method": "bitsandbytes"})
    for model, peft in ((str(folder), PeftConfig()), (adapter, None)):
        message = rejected(ModelConfig(name_or_path=model), peft, merges=True)
        assert "is saved quantised, by bitsandbytes, and merging" in message
