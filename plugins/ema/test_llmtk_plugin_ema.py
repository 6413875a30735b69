"""The average against its sum in float64, that training does not feel it, and a resumed run's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from llmtk_plugin_ema import ExponentialMovingAverage as Average
from safetensors.torch import load_file

from llmtk import ConfigurationError, Run, hookimpl

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(16)]
TRAIN = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False, "save_steps": 1}


class Recorder:
    """Keeps the weights after each update."""

    name = "recorder"

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    @hookimpl
    def run_started(self, run: Any, plan: Any) -> None:
        self.keep(run)

    @hookimpl
    def after_update(self, run: Any, step: Any) -> None:
        self.keep(run)

    def keep(self, run: Any) -> None:
        self.weights.append({name: p.detach().double().clone() for name, p in run.model.named_parameters()})


def make(folder: Path, plugins: Any = None, resume: str | None = None) -> Run:
    plugins = {"ema": {"decay": 0.5}} if plugins is None else plugins
    return Run("sft", model="builtin", data=ROWS, train=TRAIN, plugins=plugins, output_dir=str(folder), resume=resume)


def plugin_of(run: Run) -> Any:
    return run.manager.get_plugin("ema")


def test_what_is_exported_is_the_average_and_training_does_not_feel_it(tmp_path: Path) -> None:
    recorder = Recorder()
    make(tmp_path / "plain", [recorder]).train()
    run = make(tmp_path / "ema")
    run.train()

    weights = recorder.weights
    wanted = dict(weights[0])
    for n, after in enumerate(weights[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        wanted = {name: decay * a + (1 - decay) * after[name] for name, a in wanted.items()}
    exported = load_file(tmp_path / "ema" / "model.safetensors")
    moved = False
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-5, atol=1e-6)
        moved = moved or not torch.allclose(tensor.double(), weights[-1][name], rtol=1e-3)
    assert moved
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.detach().double(), weights[-1][name]), "training is as without the plugin"


def test_a_resumed_run_has_the_same_average(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    run.train()
    wanted = load_file(tmp_path / "run" / "model.safetensors")
    again = make(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoints" / "checkpoint-000003"))
    again.train()
    found = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert plugin_of(again).updates == 6


def test_of_the_best_step_the_average_is_exported_that_its_checkpoint_holds(tmp_path: Path) -> None:
    best: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first is the highest
    train = TRAIN | {"max_steps": 3} | best
    options: Any = {"ema": {"decay": 0.5}}
    Run(
        "sft", model="builtin", data={"train": ROWS, "eval": ROWS[:4]}, train=train, plugins=options,
        output_dir=str(tmp_path),
    ).train()  # fmt: skip
    kept = load_file(tmp_path / "checkpoints" / "checkpoint-000001" / "rank-0.safetensors")
    exported = load_file(tmp_path / "model.safetensors")
    for name, tensor in exported.items():
        assert torch.equal(tensor.float(), kept[f"plugin/ema/{name}"]), name


def test_a_model_of_which_deepspeed_gives_each_rank_a_part_is_refused() -> None:
    model = torch.nn.Linear(2, 2)
    average = Average(Average.Options())
    assert "decay 0.999" in average.extra_run_info(cast("Any", SimpleNamespace(model=model)))["exports"]
    cast("Any", model.weight).ds_id = 0
    with pytest.raises(ConfigurationError, match="stage 3 of deepspeed"):
        average.extra_run_info(cast("Any", SimpleNamespace(model=model)))
