"""When it stops, what counts as better, and that a resumed run stops where it would have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llmtk_plugin_early_stopping import EarlyStopping

from llmtk import ConfigurationError, Run, TrainingError

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(16)]


def stops_after(values: list[float], metric: str = "loss", **options: Any) -> int | None:
    """Return after how many of these evaluations it stops."""
    plugin = EarlyStopping(EarlyStopping.Options(metric=metric, **options))
    run: Any = SimpleNamespace(notify=lambda message: None)
    for count, value in enumerate(values, start=1):
        assert not plugin.should_stop(run, SimpleNamespace(evaluation=None))  # type: ignore[arg-type]
        step: Any = SimpleNamespace(evaluation=SimpleNamespace(metrics={f"eval_{metric}": value}))
        if plugin.should_stop(run, step):
            return count
    return None


@pytest.mark.parametrize(
    ("values", "options", "after"),
    [
        ([3, 2, 1, 1.5, 1.2, 1.1], {"patience": 3}, 6),
        ([3, 2, 1, 1.5, 0.9, 1.1, 1.2], {"patience": 3}, None),
        ([3, 2.95, 2.9, 2.85], {"patience": 2, "threshold": 0.2}, 3),
        ([3, 2.9, 2.7, 2.6, 2.5], {"patience": 2, "threshold": 0.2}, None),
        ([0.1, 0.2, 0.2, 0.2], {"patience": 2, "metric": "accuracy"}, 4),
        ([0.1, 0.2, 0.3], {"patience": 1, "metric": "accuracy", "greater_is_better": False}, 2),
        ([2.0, 1.5, 1.0], {"patience": 1, "metric": "loss/nll"}, None),
        ([float("nan"), float("nan"), 1.0], {"patience": 2}, 2),
        ([1.0, float("nan"), 0.5, 0.6], {"patience": 2}, None),
    ],
)
def test_it_waits_as_long_as_it_is_told(values: list[float], options: dict[str, Any], after: int | None) -> None:
    assert stops_after(values, **options) == after


def test_a_metric_that_is_not_there_is_named() -> None:
    plugin = EarlyStopping(EarlyStopping.Options(metric="accuracy"))
    step: Any = SimpleNamespace(evaluation=SimpleNamespace(metrics={"eval_loss": 1.0}))
    with pytest.raises(TrainingError, match="'accuracy' is not among the evaluation's metrics: eval_loss"):
        plugin.should_stop(SimpleNamespace(), step)  # type: ignore[arg-type]


def run(folder: Path, steps: int, patience: int, resume: str | None = None, **data: Any) -> Run:
    """Return a run whose learning rate is far too high."""
    return Run(
        "sft",
        model="builtin",
        data={"train": ROWS, **({"eval": ROWS[:4]} if not data else data["given"])},
        train={
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "bf16": False,
        },
        plugins={"early-stopping": {"patience": patience}},
        output_dir=str(folder),
        resume=resume,
    )


def evaluations(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_run_stops_and_a_resumed_one_stops_where_it_would_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run(tmp_path / "whole", 12, 2)
    result = whole.train()
    found = evaluations(tmp_path / "whole")
    best = found.index(min(found))
    assert result.steps == len(found) == best + 3 < 12
    again = run(
        tmp_path / "whole", 12, 2, resume=str(tmp_path / "whole" / "checkpoints" / f"checkpoint-{best + 2:06d}")
    )
    assert again.train().steps == result.steps
    assert evaluations(tmp_path / "whole") == found

    steps = f"{result.steps} of 12 steps (early-stopping stopped the run)"
    assert f"Done: {steps}, loss" in capsys.readouterr().out
    assert run(tmp_path / "whole", 12, 2, resume="auto").train().steps == result.steps
    assert f"Nothing left to train: {steps}, loss" in capsys.readouterr().out


def test_without_evaluations_it_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"early-stopping needs evaluations: give data\.eval|needs evaluation data"):
        run(tmp_path, 2, 1, given={}).train()


@pytest.mark.parametrize(
    ("data", "train", "said"),
    [
        ({}, {}, r"early-stopping needs evaluations: give data\.eval"),
        ({"eval": ROWS[:4]}, {"eval_strategy": "no"}, r"and train\.eval_strategy: no makes none"),
        ({"eval": ROWS[:4]}, {"do_eval": False}, r"and train\.do_eval: false makes none"),
    ],
)
def test_a_plan_refuses_a_run_without_evaluations(tmp_path: Path, data: Any, train: Any, said: str) -> None:
    plugins: dict[str, Any] = {"early-stopping": {}}
    run = Run(
        "sft", model="builtin", data={"train": ROWS} | data, train=train, plugins=plugins, output_dir=str(tmp_path)
    )
    with pytest.raises(ConfigurationError, match=said):
        run.prepare()
    assert not hasattr(run, "model")


def test_of_a_stage_with_rewards_the_reward_decides() -> None:
    plugin = EarlyStopping(EarlyStopping.Options(patience=1))
    run: Any = SimpleNamespace(stage=SimpleNamespace(needs={"reward", "generation"}), notify=lambda message: None)
    for reward, stops in [(0.1, False), (0.2, False), (0.1, True)]:
        step: Any = SimpleNamespace(evaluation=SimpleNamespace(metrics={"eval_loss": reward, "eval_reward": reward}))
        assert plugin.should_stop(run, step) is stops
