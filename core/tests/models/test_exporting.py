"""What `llmtk export` writes: complete folders that load without llmtk, and nothing where it cannot."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from llmtk.cli import call
from llmtk.errors import ConfigurationError, LlmtkError, ModelLoadError
from llmtk.models import load
from llmtk.models.exporting import export
from llmtk.models.saving import load_folder, save_model

from .conftest import LLAMA, build
from .test_merging import logits, moved


def finish(folder, model, tokenizer, library="transformers"):
    """Write what is left of a finished run."""
    save_model(model, tokenizer, folder)
    (folder / "config.yaml").write_text("stage: sft\n")
    (folder / "results.json").write_text("{}")
    (folder / "README.md").write_text(f"---\nlibrary_name: {library}\n---\n")
    return folder


@pytest.fixture
def full(tmp_path, tokenizer):
    """A finished run of a full model."""
    return finish(tmp_path / "full", build(tokenizer), tokenizer)


@pytest.fixture
def adapter(tmp_path, folder, tokenizer):
    """A finished run of an adapter, and its logits."""
    model = moved(load(folder)[0])
    return finish(tmp_path / "run", model, tokenizer, "peft"), model


def test_a_merged_adapter_loads_with_transformers_alone_when_its_base_is_gone(tmp_path, adapter, folder, ids):
    run, model = adapter
    assert call(["export", str(run), "--output", str(tmp_path / "out"), "--merge"]) == 0
    expected = logits(model, ids)
    shutil.rmtree(folder)
    shutil.rmtree(run)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-5, atol=1e-5)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert "library_name: transformers" in (tmp_path / "out/README.md").read_text()
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [0, 3]
    said = [{"role": "user", "content": "hi"}]
    assert "hi" in AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(said, tokenize=False)


def test_a_base_is_loaded_as_the_run_loaded_it_but_not_quantised(tmp_path, adapter, ids, monkeypatch):
    run, model = adapter
    (run / "config.yaml").write_text("stage: sft\nmodel: {quantization: 4bit, attn_implementation: eager}\n")
    seen = []

    def watched(path, like, **more):
        seen.append((like.quantization, like.attn_implementation))
        return load_folder(path, like, **more)

    monkeypatch.setattr("llmtk.models.saving.load_folder", watched)
    expected = logits(model, ids)
    export(run, tmp_path / "out", merge=True)
    assert seen == [(None, "eager")]
    torch.testing.assert_close(logits(load(tmp_path / "out")[0], ids), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_is_not_merged_stays_one(tmp_path, adapter, ids):
    run, model = adapter
    export(run, tmp_path / "out")
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert torch.equal(logits(load(tmp_path / "out")[0], ids), logits(model, ids))
    assert "library_name: peft" in (tmp_path / "out/README.md").read_text()


def test_weights_are_cast_and_sharded(tmp_path, full):
    export(full, tmp_path / "out", dtype="bfloat16", max_shard_size="20KB")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    written = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    before = load_file(full / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], before[name].to(torch.bfloat16)) for name in before)
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_a_reward_models_adapter_is_merged_with_its_head(tmp_path, tokenizer, ids):
    base = AutoModelForSequenceClassification.from_config(build(tokenizer, head="value").config)
    save_model(base, tokenizer, tmp_path / "base")
    model = moved(load(tmp_path / "base")[0])
    expected = logits(model, ids)
    export(finish(tmp_path / "run", model, tokenizer), tmp_path / "out", merge=True)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded, ids), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantize", ["8bit", "4bit"])
def test_weights_are_quantised_to_the_nearest(tmp_path, tokenizer, quantize):
    pytest.importorskip("bitsandbytes")
    wide = LLAMA | {"hidden_size": 128, "intermediate_size": 128}  # whole blocks of 4-bit weights
    full = finish(tmp_path / "full", build(tokenizer, wide), tokenizer)
    name = "model.layers.0.mlp.up_proj.weight"
    before = load_file(full / "model.safetensors")[name]
    export(full, tmp_path / "out", quantize=quantize)
    written = load_file(tmp_path / "out/model.safetensors")
    if quantize == "8bit":
        scale = written[name.replace("weight", "SCB")][:, None] / 127
        assert torch.all((written[name] * scale - before).abs() <= 0.6 * scale)  # a half, and what float16 rounds
    else:
        assert written[name].numel() == before.numel() / 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.quantization_config.load_in_8bit, model.config.quantization_config.load_in_4bit) == (
        quantize == "8bit",
        quantize == "4bit",
    )


@pytest.mark.parametrize(
    ("kind", "words", "said"),
    [
        ("full", ["--merge"], "holds a full model, which has no adapter to merge"),
        ("run", ["--dtype", "bfloat16"], "--dtype is for full models, and .* holds an adapter. Add --merge"),
        ("run", ["--max-shard-size", "1GB"], "--max-shard-size is for full models"),
        ("full", ["--max-shard-size", "big"], "--max-shard-size big: expected a size such as 500MB or 2GB"),
        ("full", ["--max-shard-size", "0GB"], "--max-shard-size 0GB: expected"),
        ("full", ["--quantize", "4bit"], "--quantize 4bit needs bitsandbytes, which is not installed"),
        ("full", ["--dtype", "int4"], "'int4' is not one of"),
        ("nothing", [], "there is no such run"),
        (".", [], "holds no run: there is no config.yaml in it"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(
    tmp_path, full, adapter, capsys, monkeypatch, kind, words, said
):
    monkeypatch.setattr("llmtk.models.exporting.find_spec", lambda name: None)
    monkeypatch.setattr("llmtk.models.saving.load_folder", None)
    capsys.readouterr()
    assert call(["export", str(tmp_path / kind), "--output", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    assert re.search(said, err)
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_not_exported(tmp_path, full):
    (full / "results.json").unlink()
    with pytest.raises(ConfigurationError, match=r"is not finished: there is no results\.json"):
        export(full, tmp_path / "out")


def test_a_base_that_is_gone_is_named(tmp_path, adapter, folder):
    shutil.rmtree(folder)
    with pytest.raises(ModelLoadError, match=f"is an adapter on {folder}, which is not there any more"):
        export(adapter[0], tmp_path / "out", merge=True)
    assert not (tmp_path / "out").exists()


def test_files_that_stand_there_are_kept(tmp_path, full):
    (tmp_path / "out").mkdir()
    export(full, tmp_path / "out")  # an empty folder is as good as none
    with pytest.raises(ConfigurationError, match="holds files"):
        export(full, tmp_path / "out")
    for path in ("full/config.yaml", "full/config.yaml/below"):
        with pytest.raises(ConfigurationError, match="is a file, not a folder"):
            export(full, tmp_path / path)


def test_a_failure_leaves_nothing(tmp_path, full, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmtk.models.exporting._write_card", fail)
    with pytest.raises(LlmtkError, match=r"out cannot be written: .*No space left on device"):
        export(full, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
