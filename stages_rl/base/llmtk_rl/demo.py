"""The demo of reinforcement stages: sums, answered by the half-trained model and rewarded if they are right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmtk import Demo
from llmtk.demo import addition
from llmtk.demo.measure import exact_match

HELD_OUT = 200


def reinforcement_demo(section: str, *, options: Mapping[str, Any] | None = None, rows: int = 64, **train: Any) -> Demo:
    """Return the demo of a stage: exact match of greedy answers to held-out sums. `train` are settings of the run."""
    problems = [addition.dialogue(problem) for problem in addition.problems("held-out", HELD_OUT, 1)]
    settings = {
        "per_device_train_batch_size": rows,
        "learning_rate": 5e-4,
        "warmup_steps": 5,
        "logging_steps": 20,
        "eval_strategy": "no",
        "save_strategy": "epoch",
        "bf16": False,
    }
    return Demo(
        train=addition.rows("train", 4000),
        eval=addition.rows("held-out", HELD_OUT, 1),
        config={
            "train": settings | train,
            "generation": {"batch_size": 512},
            section: {"rewards": ["exact_match"], "max_completion_length": 16, **(options or {})},
        },
        figure="exact match",
        measure=lambda run: exact_match(run, problems),
    )
