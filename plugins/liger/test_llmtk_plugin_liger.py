"""What is refused, and that kernels are put in as asked, by a stand-in for Liger-Kernel that computes on a CPU."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import llmtk_plugin_liger
import pytest
import torch
from llmtk_plugin_liger import PATCHES, why_not
from transformers.models.llama import modeling_llama

from llmtk import ConfigurationError, Run

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(8)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in ROWS]
PLAIN_ROPE = modeling_llama.apply_rotary_pos_emb


class Kernels:
    """Puts in what computes the same, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, bool]] = []
        self.norms, self.ropes = 0, 0

    def put(
        self,
        rope: bool = True,
        cross_entropy: bool = False,
        fused_linear_cross_entropy: bool = True,
        rms_norm: bool = True,
        swiglu: bool = True,
        model: Any = None,
    ) -> None:
        self.asked.append({name: value for name, value in locals().items() if isinstance(value, bool)})
        if rope:
            modeling_llama.apply_rotary_pos_emb = self.rope
        for module in model.modules() if rms_norm else ():
            if type(module) is modeling_llama.LlamaRMSNorm:
                module.forward = MethodType(self.norm, module)

    def rope(self, *args: Any, **kwargs: Any) -> Any:
        self.ropes += 1
        return PLAIN_ROPE(*args, **kwargs)

    def norm(self, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        self.norms += 1
        return type(module).forward(module, hidden)  # type: ignore[no-any-return]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Put a stand-in in Liger-Kernel's place, and take the CPU for a device that it runs on."""
    fake = Kernels()
    module: Any = ModuleType(PATCHES)
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": fake.put, "qwen2": fake.put}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, PATCHES, module)
    monkeypatch.setattr(llmtk_plugin_liger, "why_not", lambda device: None)
    return fake


def make(
    folder: Path, stage: str = "sft", rows: Any = ROWS, model: Any = TINY, peft: Any = None, **options: Any
) -> Run:
    return Run(
        stage,
        model=model if isinstance(model, str) else {"from_config": model, "tokenizer": {"kind": "byte"}},
        data=rows,
        peft=peft,
        train={"bf16": False, "per_device_train_batch_size": 4, "max_steps": 2, "save_strategy": "no"},
        plugins={"liger": options},
        output_dir=str(folder),
    )


def test_kernels_are_in_the_model_and_its_reference_and_losses_are_not(tmp_path: Path, kernels: Kernels) -> None:
    run = make(tmp_path, "dpo", PAIRS)
    run.train()
    everything = {"rope": True, "rms_norm": True, "swiglu": True}
    assert kernels.asked == [everything | {"cross_entropy": False, "fused_linear_cross_entropy": False}] * 2
    assert kernels.norms > 10
    assert kernels.ropes > 10
    assert run.plan.facts["liger"] == {"kernels": "rope, rms_norm, swiglu"}
    assert modeling_llama.apply_rotary_pos_emb is PLAIN_ROPE, "another run of this process has it not"


def test_those_that_are_asked_for_alone(tmp_path: Path, kernels: Kernels) -> None:
    make(tmp_path, kernels=["swiglu"]).prepare()
    assert {name for name, used in kernels.asked[0].items() if used} == {"swiglu"}
    assert kernels.norms == kernels.ropes == 0


def test_they_go_under_an_adapter(tmp_path: Path, kernels: Kernels) -> None:
    make(tmp_path, model="builtin", peft={"r": 2}, kernels=["rms_norm"]).prepare()
    assert kernels.norms > 0


def test_a_kernel_or_a_model_that_it_has_not_is_refused(tmp_path: Path, kernels: Kernels) -> None:
    with pytest.raises(ConfigurationError, match=r"no geglu for llama models\. It has: rope, rms_norm, swiglu"):
        make(tmp_path, kernels=["geglu"]).train()
    gpt2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
    with pytest.raises(ConfigurationError, match=r"no kernels for gpt2 models\. .* It knows: llama, qwen2"):
        make(tmp_path, model=gpt2).train()
    with pytest.raises(ConfigurationError, match=r"plugins\.liger\.kernels"):
        make(tmp_path, kernels=["cross_entropy"])


def test_a_cpu_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"plugins\.liger: .* run on CUDA devices, .* computes on the cpu"):
        make(tmp_path / "run").train()
    assert not (tmp_path / "run").exists()


def test_where_it_is_not_installed_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    for name in [name for name in sys.modules if name.startswith("liger_kernel.")]:
        monkeypatch.delitem(sys.modules, name)
    said = why_not(torch.device("cuda"))
    assert said is not None
    assert "pip install 'llmtk-plugin-liger[kernels]'" in said


def test_the_installed_one_has_what_is_asked_of_it() -> None:
    patches = pytest.importorskip(PATCHES, reason="Liger-Kernel is not installed", exc_type=ImportError)
    parameters = inspect.signature(patches.MODEL_TYPE_TO_APPLY_LIGER_FN["llama"]).parameters
    assert set(parameters) == set(inspect.signature(Kernels().put).parameters)
