"""The side of TRL 1.16.0, with its defaults, but for what all sides share: python -m sides.with_trl FOLDER

What was tried for its best settings (--best), under one rule: the same rows, and the same loss and weights after each
step. Seconds are of CPU time, of one thread, in two steps.

taken
- padding_free, sft: 14 and 15 s for 22 and 28 with padding. Its docs name flash attention as a condition, which is
  for GPUs; but transformers 5.23 makes sdpa a mask from the positions, and in float32 losses and gradient norms were
  those of padded rows to 1e-7. Two rows at a time, as the mask is quadratic in their sum: 11 and 12 s.
- Smaller micro-batches, accumulated, dpo: less padding, smaller logits. One pair at a time 24 and 23 s, two 26 and
  27 s, four 35 and 29 s.

of no use here
- padding_free, dpo: 1.16.0 switches it off by itself. kto has no such option.
- Smaller micro-batches, kto: it estimates the KL within one, so the loss would be another.
- packing, and train_sampling_strategy group_by_length: other rows in a step.
- precompute_ref_log_probs: does the reference's work before the first step, and in one epoch no less of it.
- torch_compile: 6 to 9% less in later steps of padding-free sft, but minutes of compiling in the first two, again in
  each process.
- use_liger_kernel, use_kernels: kernels for accelerators.
- Weights in bfloat16: another result, as most updates are smaller than their rounding at this learning rate.
- attn_implementation eager: slower than sdpa, the default, in LLaMA-Factory's runs. activation_offloading: to where
  they are. loss_type chunked_nll: another name for the default.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sides.job import MAX_LENGTH, Job
from sides.watch import Watch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

TRAINERS = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}
BEST: dict[str, dict[str, Any]] = {
    # Without padding it cuts no rows, and refuses a max_length; these are short enough.
    "sft": {
        "padding_free": True,
        "max_length": None,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "dpo": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "kto": {},
}
"""Its best settings, by stage."""


def main() -> None:
    """Do the job of the folder that is named on the command line."""
    folder = Path(sys.argv[1])
    job, watch = Job.read(folder), Watch()
    trainer_class, config_class = TRAINERS[job.stage]
    settings = {
        "output_dir": str(folder / "output"),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.rows,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": not job.float32,
        "use_cpu": True,
        "gradient_checkpointing": job.checkpointing,
        "max_length": MAX_LENGTH,
        "train_sampling_strategy": "sequential",
    }
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config_class(**settings | (BEST[job.stage] if job.best else {})),
        train_dataset=Dataset.from_list(json.loads((folder / "ordered.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[watch],
    )
    trainer.train()
    watch.result.write(folder)


if __name__ == "__main__":
    main()
