"""Sections fsdp and deepspeed: what cannot be followed is refused before anything is loaded.

What two ranks do is in tests/distributed.
"""

from __future__ import annotations

import pytest
import torch

from llmtk import ConfigurationError
from llmtk.config.sections import FsdpConfig, TrainConfig
from llmtk.training.sharding import check_fsdp, like, whole

from .kit import make


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"fsdp": {}}, "fsdp shards a model over several processes, and this is one"),
        ({"deepspeed": {"zero_stage": 3}}, "runs under DeepSpeed are not supported yet.*`fsdp: {}`"),
        ({"deepspeed": {"offload_param": "cpu"}}, "offload_param needs zero_stage: 3; it is 2"),
        ({"deepspeed": {"zero_stage": 0, "offload_optimizer": "cpu"}}, "offload_optimizer needs zero_stage: 1, 2 or 3"),
        ({"fsdp": {"cpu_ofload": True}}, "fsdp.cpu_ofload: unknown key. Did you mean fsdp.cpu_offload"),
    ],
)
def test_sections_that_cannot_be_followed_are_refused(tmp_path, monkeypatch, section, said):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
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
        check_fsdp(FsdpConfig(), TrainConfig(**settings), ranks=2)


def test_there_is_nothing_to_offload_from_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="there is no device here"):
        check_fsdp(FsdpConfig(cpu_offload=True), TrainConfig(), ranks=2)
    check_fsdp(FsdpConfig(), TrainConfig(), ranks=2)


def test_what_is_not_sharded_stays_as_it_is():
    tensor = torch.zeros(3)
    assert whole({"a": tensor}, keep=False)["a"] is tensor
    assert like(tensor, torch.ones(3)) is tensor
