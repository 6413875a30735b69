"""The side of llmtk, with its defaults, but for what all sides share: python -m sides.with_llmtk FOLDER"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides.job import MAX_LENGTH, Job, Result, sequences

import llmtk


class Watch:
    """Notes each step's seconds (data and logging included), loss and gradient norm, and the rows that it read."""

    name = "watch"

    def __init__(self) -> None:
        self.result = Result()

    @llmtk.hookimpl
    def run_started(self, run: llmtk.RunView) -> None:
        self.ended = time.perf_counter()

    @llmtk.hookimpl
    def around_prepare_batch(self, run: llmtk.RunView, rows: list[dict[str, Any]], inner: Callable[..., Any]) -> Any:
        self.result.read += sequences(rows)
        return inner(rows)

    @llmtk.hookimpl
    def step_finished(self, run: llmtk.RunView, step: Any) -> None:
        ended = time.perf_counter()
        self.result.seconds.append(ended - self.ended)
        self.result.losses.append(step.loss)
        self.result.norms.append(step.grad_norm)
        self.result.stepped()
        self.ended = ended


def train(folder: Path, job: Job, plugins: list[Any]) -> None:
    """Train by the job's stage on the job's rows."""
    llmtk.Run(
        job.stage,
        model=str(folder / "model"),
        data={"train": json.loads((folder / "rows.json").read_text()), "max_length": MAX_LENGTH},
        train={
            "max_steps": job.steps,
            "per_device_train_batch_size": job.rows,
            "learning_rate": 2e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": not job.float32,
            "gradient_checkpointing": job.checkpointing,
        },
        plugins=plugins,
        output_dir=str(folder / "output"),
    ).train()


def main() -> None:
    """Do the job of the folder that is named on the command line."""
    folder, watch = Path(sys.argv[1]), Watch()
    train(folder, Job.read(folder), [watch])
    watch.result.read.sort()
    watch.result.write(folder)


if __name__ == "__main__":
    main()
