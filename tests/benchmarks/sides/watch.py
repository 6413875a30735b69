"""What is noted of the peers that train by transformers' Trainer."""

from __future__ import annotations

import time
from typing import Any

from sides.job import Result, sequences
from transformers import TrainerCallback


class Watch(TrainerCallback):
    """Notes each step's seconds (without reading its batch), loss and gradient norm, and the rows that it reads."""

    def __init__(self) -> None:
        self.result = Result()

    def on_train_begin(self, *_: Any, train_dataloader: Any, **__: Any) -> None:
        self.result.read = sequences(train_dataloader.dataset)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.result.seconds.append(time.perf_counter() - self.began)
        self.result.stepped()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.result.losses.append(logs["loss"])
            self.result.norms.append(logs["grad_norm"])
