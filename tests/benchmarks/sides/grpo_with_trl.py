"""TRL's side of grpo, with its defaults, but for what both share: python -m sides.grpo_with_trl FOLDER"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from runpy import run_path
from typing import Any

import torch
from datasets import Dataset
from sides.job import Result
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class Watch(TrainerCallback):
    """Notes whole steps: completions are written between the end of one and the beginning of the next."""

    def __init__(self) -> None:
        self.result = Result()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.ended = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        ended = time.perf_counter()
        self.result.seconds.append(ended - self.ended)
        self.result.stepped()
        self.ended = ended


def main() -> None:
    """Do the job of the folder that is named on the command line."""
    folder, watch = Path(sys.argv[1]), Watch()
    job = json.loads((folder / "job.json").read_text())
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=[run_path(str(folder / "reward.py"))["score"]],
        args=GRPOConfig(
            output_dir=str(folder / "output"),
            max_steps=job["steps"],
            per_device_train_batch_size=job["prompts"] * job["n"],
            num_generations=job["n"],
            max_completion_length=job["tokens"],
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=True,
            use_cpu=True,
            gradient_checkpointing=False,
            shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(json.loads((folder / "ordered.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[watch],
    )
    trainer.train()
    watch.result.write(folder)


if __name__ == "__main__":
    main()
