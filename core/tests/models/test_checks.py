"""Every bad model section, with its message."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.errors import ConfigurationError, ModelLoadError
from llmtk.models.checks import check_model, check_safetensors, resolve
from llmtk.models.errors import loading
from llmtk.models.tokenizers import load_tokenizer

from .conftest import LLAMA

CHAR = TokenizerConfig(kind="char")


def rejected(error=ModelLoadError, **keys):
    with pytest.raises(error) as info:
        check_model(ModelConfig(**keys))
    return str(info.value)


def change_config(folder, **keys):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def pickle_weights(folder, name="pytorch_model.bin"):
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(weights, folder / name)
    (folder / "model.safetensors").unlink()
    return weights


def test_importing_the_checks_imports_nothing_heavy():
    code = "import sys, llmtk.models.checks; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


def test_sound_sections_pass(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    check_model(ModelConfig(name_or_path=str(folder)))
    check_model(ModelConfig(name_or_path="some-org/some-model"))
    check_model(ModelConfig(from_config=LLAMA, tokenizer=CHAR))


def test_no_model_is_given():
    assert "Give name_or_path" in rejected(ConfigurationError)


def test_from_config_needs_a_tokenizer():
    assert "has no tokenizer of its own" in rejected(ConfigurationError, from_config=LLAMA)


def test_a_named_model_keeps_its_own_tokenizer(folder):
    assert "a new meaning" in rejected(ConfigurationError, name_or_path=str(folder), tokenizer=CHAR)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing-here", "a/b/c"])
def test_a_path_that_is_not_there(name):
    assert f"model.name_or_path: there is no folder {name}" in rejected(name_or_path=name)


def test_a_tokenizer_path_that_is_not_there():
    assert "model.tokenizer: there is no folder" in rejected(from_config=LLAMA, tokenizer="/no/such")


def test_a_folder_without_config(tmp_path):
    assert "has no config.json" in rejected(name_or_path=str(tmp_path))


def test_an_adapter_says_what_it_lacks(tmp_path):
    config = tmp_path / "adapter_config.json"
    config.write_text("{}")
    assert "adapter_model.safetensors is missing" in rejected(name_or_path=str(tmp_path))
    save_file({}, tmp_path / "adapter_model.safetensors")
    assert "names no base model" in rejected(name_or_path=str(tmp_path))
    config.write_text('{"base_model_name_or_path": "/gone"}')
    assert "an adapter on /gone, which is not there" in rejected(name_or_path=str(tmp_path))


def test_an_unfinished_run_is_no_model(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert "--resume" in rejected(name_or_path=str(tmp_path))


def test_a_file_is_no_model(folder):
    assert "Give the folder that holds" in rejected(name_or_path=str(folder / "model.safetensors"))


@pytest.mark.parametrize(("text", "said"), [("{", "not valid JSON"), ("[]", "holds a list")])
def test_a_broken_config(folder, text, said):
    (folder / "config.json").write_text(text)
    assert said in rejected(name_or_path=str(folder))


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "there is no model.safetensors" in rejected(name_or_path=str(folder))


def test_pickled_weights_are_refused_with_a_command_that_converts_them(folder):
    weights = pickle_weights(folder)
    message = rejected(name_or_path=str(folder))
    assert "pickled weights only (pytorch_model.bin)" in message
    command = message.splitlines()[-1].replace("llmtk ", f"{sys.executable} -m llmtk ")
    subprocess.run(command, shell=True, check=True)
    check_model(ModelConfig(name_or_path=str(folder)))
    converted = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)


def test_files_beside_the_weights_are_not_taken_for_pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "training_args.bin")
    assert "there is no model.safetensors" in rejected(name_or_path=str(folder))


def test_truncated_weights(folder):
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-10])
    message = rejected(name_or_path=str(folder))
    assert str(file) in message
    assert f"promises {size:,} bytes, it has {size - 10:,}" in message


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, (4).to_bytes(8, "little") + b"[1,]", bytes(8)])
def test_no_safetensors_header(tmp_path, content):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelLoadError, match="no readable safetensors header"):
        check_safetensors(file)


def test_a_missing_shard_is_named(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    check_model(ModelConfig(name_or_path=str(folder)))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in rejected(name_or_path=str(folder))


def test_a_broken_index(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "has no weight_map" in rejected(name_or_path=str(folder))


def test_a_model_with_code_of_its_own(folder):
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert "comes with Python code" in rejected(name_or_path=str(folder))
    check_model(ModelConfig(name_or_path=str(folder), trust_remote_code=True))


def rejected_fields(**fields):
    return rejected(ConfigurationError, from_config=LLAMA | fields, tokenizer=CHAR)


def test_an_unknown_model_type():
    assert "'lama'. Did you mean 'llama'?" in rejected_fields(model_type="lama")


def test_an_unknown_field():
    message = rejected_fields(hiden_size=3)
    assert "from_config.hiden_size: LlamaConfig has no such field. Did you mean 'hidden_size'?" in message


def test_fields_under_their_other_names_are_known():
    known = {"model_type": "gpt2", "n_embd": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    check_model(ModelConfig(from_config=known, tokenizer=CHAR))
    check_model(ModelConfig(from_config=LLAMA | {"rope_theta": 5000.0}, tokenizer=CHAR))


def test_values_that_the_configuration_refuses():
    assert "LlamaConfig refuses these values" in rejected_fields(hidden_size="wide")
    assert "LlamaConfig refuses these values" in rejected_fields(num_attention_heads=5)


def test_a_key_that_belongs_one_level_up():
    assert "give it one level up, as model.dtype" in rejected_fields(dtype="bfloat16")


def test_a_hub_name_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelLoadError, match="no such folder here, so it was looked for on the hub"):
        load_tokenizer(ModelConfig(name_or_path="llmtk-tests/no-such-model"))


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ModelLoadError, match=r"no folder no-such/model, and http://127\.0\.0\.1:9 cannot be reached \("
    ):
        check_model(ModelConfig(name_or_path="no-such/model"))


def test_builtin_is_a_folder_of_the_package():
    assert resolve("builtin").endswith("model")


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "and thus cannot be loaded with `safetensors`. Please do not set `use_safetensors=True`.",
            "llmtk convert-weights",
        ),
        ("Please pass the argument `trust_remote_code=True`", "set model.trust_remote_code: true"),
        ("something else", "THE MEND"),
    ],
)
def test_what_libraries_say_to_do_is_said_in_llmtks_words(theirs, ours):
    with pytest.raises(ModelLoadError, match=ours), loading("the model", "THE MEND"):
        raise OSError(theirs)
