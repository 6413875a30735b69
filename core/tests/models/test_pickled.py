"""Pickled weights: converted without opening anything but tensors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmtk.cli import call
from llmtk.config.sections import ModelConfig, PeftConfig
from llmtk.errors import ModelLoadError
from llmtk.models import load
from llmtk.models.adapters import add_adapter
from llmtk.models.checks import check_model
from llmtk.models.pickled import convert
from llmtk.models.saving import save_model


class Evil:
    """Makes a file when it is opened."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def pickled(folder, *parts):
    """Put the folder's weights into pickles in the place of safetensors, and return them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part, names in enumerate(parts):
        torch.save({name: weights[name] for name in names(weights)}, folder / f"pytorch_model-{part}.bin")
    return weights


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


def test_one_file(folder):
    weights = pickled(folder, list)
    (file,) = convert(folder)
    assert file.name == "model.safetensors"
    same(load_file(file), weights)
    same(dict(load(folder)[0].state_dict()), weights)


def test_shards(folder):
    weights = pickled(folder, lambda all: sorted(all)[:5], lambda all: sorted(all)[5:])
    files = convert(folder)
    assert [file.name for file in files] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    same(load_file(files[0]) | load_file(files[1]), weights)
    check_model(ModelConfig(name_or_path=str(folder)))
    same(dict(load(folder)[0].state_dict()), weights)


def test_tied_and_cut_tensors_and_their_dtypes_stay(tmp_path):
    whole = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    torch.save({"a": whole, "b": whole, "c": whole.t()[1:3]}, tmp_path / "pytorch_model.bin")
    (file,) = convert(tmp_path)
    same(load_file(file), {"a": whole, "b": whole, "c": whole.t()[1:3]})


def test_an_adapter(tmp_path, folder, tokenizer):
    adapted = add_adapter(load(folder)[0], PeftConfig(r=2))
    save_model(adapted, tokenizer, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"pickled weights only \(adapter_model\.bin\)"):
        check_model(ModelConfig(name_or_path=str(tmp_path / "adapter")))
    convert(tmp_path / "adapter")
    check_model(ModelConfig(name_or_path=str(tmp_path / "adapter")))
    same(load_file(tmp_path / "adapter/adapter_model.safetensors"), weights)


def test_code_in_a_pickle_is_not_run(folder, tmp_path):
    weights = pickled(folder)
    torch.save(weights | {"evil": Evil(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="holds objects whose code would run"):
        convert(folder)
    assert not (tmp_path / "ran").exists()
    assert not list(folder.glob("*.safetensors"))


@pytest.mark.parametrize("content", [b"", b"no pickle"])
def test_damaged(folder, content):
    pickled(folder)
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelLoadError, match="it is damaged"):
        convert(folder)


def test_what_is_no_weights(folder):
    pickled(folder)
    torch.save([torch.ones(1)], folder / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="holds no tensors by name"):
        convert(folder)


def test_nothing_to_convert(folder, tmp_path):
    with pytest.raises(ModelLoadError, match="has no pickled weights"):
        convert(folder)
    with pytest.raises(ModelLoadError, match="is no folder"):
        convert(tmp_path / "nothing")


def test_what_is_there_is_not_written_over(folder):
    torch.save({}, folder / "pytorch_model.bin")
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(ModelLoadError, match=r"has model\.safetensors already"):
        convert(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_several_of_unknown_names(folder):
    pickled(folder)
    for name in ("a.pt", "b.pth"):
        torch.save({}, folder / name)
    with pytest.raises(ModelLoadError, match=r"not plain: a\.pt, b\.pth"):
        convert(folder)


def test_the_command(folder, capsys):
    weights = pickled(folder, list)
    assert call(["convert-weights", str(folder)]) == 0
    size = os.path.getsize(folder / "model.safetensors")
    assert capsys.readouterr().out == f"wrote {folder / 'model.safetensors'} ({size:,} bytes)\n"
    same(load_file(folder / "model.safetensors"), weights)
    assert call(["convert-weights", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err
