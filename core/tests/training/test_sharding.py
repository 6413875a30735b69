"""Sections fsdp and deepspeed: what cannot be followed is refused before anything is loaded.

What two ranks do is in tests/distributed.
"""

from __future__ import annotations

from importlib import metadata

import pytest
import torch

from llmtk import ConfigurationError
from llmtk.config.sections import DeepspeedConfig, FsdpConfig, TrainConfig
from llmtk.training import zero
from llmtk.training.sharding import check_fsdp, check_options, like, whole

from .kit import make


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"fsdp": {}}, "fsdp shards a model over several processes, and this is one"),
        ({"fsdp": {}, "deepspeed": {}}, "leave one of them out"),
        ({"deepspeed": {"zero_stage": 0}}, "zero_stage: 0 spreads nothing over the ranks"),
        ({"deepspeed": {"offload_param": "cpu"}}, "offload_param needs zero_stage: 3; it is 2"),
        ({"deepspeed": {"zero_stage": 0, "offload_optimizer": "cpu"}}, "offload_optimizer needs zero_stage: 1, 2 or 3"),
        ({"fsdp": {"cpu_ofload": True}}, "fsdp.cpu_ofload: unknown key. Did you mean fsdp.cpu_offload"),
    ],
)
def test_sections_that_cannot_be_followed_are_refused(tmp_path, monkeypatch, section, said):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(zero, "missing", lambda: None)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigurationError, match=said):
        make(tmp_path / "run", rows=str(tmp_path / "missing.jsonl"), sections=section).train()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim": "adafactor"}, "adafactor looks at whole matrices"),
        ({"fp16": True, "bf16": None}, "train.fp16 does not go together with fsdp"),
        ({"torch_compile": True}, "train.torch_compile does not go together"),
        ({"neftune_noise_alpha": 5.0}, "train.neftune_noise_alpha does not go together"),
    ],
)
def test_what_does_not_go_together_with_shards_is_refused(settings, said):
    with pytest.raises(ConfigurationError, match=said):
        check_options(TrainConfig(**settings), "fsdp")
    with pytest.raises(ConfigurationError, match=said.replace("fsdp", "deepspeed")):
        check_options(TrainConfig(**settings), "deepspeed")


def test_quantised_weights_are_not_given_to_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setattr(zero, "missing", lambda: None)
    monkeypatch.setenv("RANK", "0")
    model = {"name_or_path": str(tmp_path), "quantization": "4bit"}
    with pytest.raises(ConfigurationError, match=r"model\.quantization does not go together with deepspeed yet"):
        make(tmp_path / "run", model=model, sections={"deepspeed": {}, "peft": {"r": 2}}).train()


def test_there_is_nothing_to_offload_from_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="there is no device here"):
        check_fsdp(FsdpConfig(cpu_offload=True), ranks=2)
    check_fsdp(FsdpConfig(), ranks=2)
    monkeypatch.setattr(zero, "missing", lambda: None)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigurationError, match=r"deepspeed\.offload_optimizer frees a device's memory, and there is"):
        zero.check_zero(DeepspeedConfig(offload_optimizer="cpu"))
    zero.check_zero(DeepspeedConfig())


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, r"deepspeed: DeepSpeed is not installed: pip install 'deepspeed>=[\d.]+', or leave the section out"),
        ("0.18.9", "deepspeed: DeepSpeed 0.18.9 is too old: pip install"),
        ("99.0", "DeepSpeed wants a launcher.*torchrun --nproc-per-node N"),
    ],
)
def test_what_is_missing_for_deepspeed_is_said(tmp_path, monkeypatch, version, said):
    found = metadata.version

    def installed(name):
        if name != "deepspeed":
            return found(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(zero.metadata, "version", installed)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigurationError, match=said):
        make(tmp_path / "run", rows=str(tmp_path / "missing.jsonl"), sections={"deepspeed": {}}).train()


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.zeros(3)
    assert whole({"a": tensor}, keep=False)["a"].data_ptr() == tensor.data_ptr()
    assert like(tensor, torch.ones(3)) is tensor
