"""The side of LLaMA-Factory 0.9.5, with its defaults, but for what all sides share.

    python -m sides.with_llamafactory FOLDER

It is driven as by `llamafactory-cli train`: a dataset_info.json, a template, and its arguments as a mapping. It takes
the weights in float32, as they are saved, and bf16 is autocast, on the CPU too.

What was tried for its best settings (--best), under one rule: the same rows, and the same loss and weights after each
step. Seconds are of CPU time, of one thread, in two steps.

taken
- Smaller micro-batches, accumulated: less padding, smaller logits. sft one row at a time 11 and 12 s, two 12 and 13 s,
  eight 14 and 16 s; dpo one pair at a time 16 and 17 s, four 22 and 20 s.

of no use here
- Smaller micro-batches, kto: it estimates the KL within one, so the loss would be another.
- packing, neat_packing, group_by_length: other rows in a step.
- flash_attn: auto is sdpa; disabled (eager) took 17 and 18 s of sft for 16 and 18 s, and a third more memory. fa2 is
  for GPUs, as are enable_liger_kernel and use_unsloth.
- pure_bf16: refused on a CPU, and another result.
- upcast_layernorm, upcast_lmhead_output: more work.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from llamafactory.data.template import register_template
from llamafactory.train.tuner import run_exp
from sides.job import MAX_LENGTH, Job
from sides.watch import Watch

COLUMNS: dict[str, dict[str, Any]] = {
    "sft": {"columns": {"prompt": "prompt", "response": "completion"}},
    "dpo": {"ranking": True, "columns": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}},
    "kto": {"columns": {"prompt": "prompt", "response": "completion", "kto_tag": "label"}},
}
"""How its dataset_info.json describes the rows, by stage."""
BEST: dict[str, dict[str, Any]] = {
    "sft": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "dpo": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "kto": {},
}
"""Its best settings, by stage."""


def main() -> None:
    """Do the job of the folder that is named on the command line."""
    folder = Path(sys.argv[1])
    job, watch = Job.read(folder), Watch()
    rows = {"file_name": "ordered.json", **COLUMNS[job.stage]}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": rows}))
    # As its template `empty`, which ends no answer: prompt, answer, and the tokenizer's end.
    register_template(name="plain")
    settings = {
        "stage": job.stage,
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset": "rows",
        "dataset_dir": str(folder),
        "template": "plain",
        "cutoff_len": MAX_LENGTH,
        "disable_shuffling": True,
        "output_dir": str(folder / "output"),
        "max_steps": job.steps,
        "per_device_train_batch_size": job.rows,
        "learning_rate": 2e-5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": not job.float32,
        "use_cpu": True,
        "disable_gradient_checkpointing": not job.checkpointing,
    }
    run_exp(settings | (BEST[job.stage] if job.best else {}), [watch])
    watch.result.write(folder)


if __name__ == "__main__":
    main()
