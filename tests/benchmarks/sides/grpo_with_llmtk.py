"""llmtk's side of grpo, with its defaults, but for what both share: python -m sides.grpo_with_llmtk FOLDER"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sides.with_llmtk import Watch

import llmtk


def main() -> None:
    """Do the job of the folder that is named on the command line."""
    folder, watch = Path(sys.argv[1]), Watch()
    job = json.loads((folder / "job.json").read_text())
    llmtk.Run(
        "grpo",
        model=str(folder / "model"),
        data={"train": json.loads((folder / "rows.json").read_text())},
        grpo={
            "rewards": [{"file": str(folder / "reward.py"), "function": "score"}],
            "num_generations": job["n"],
            "max_completion_length": job["tokens"],
        },
        train={
            "max_steps": job["steps"],
            "per_device_train_batch_size": job["prompts"],
            "learning_rate": 1e-6,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": True,
        },
        plugins=[watch],
        output_dir=str(folder / "output"),
    ).train()
    watch.result.read.clear()
    watch.result.write(folder)


if __name__ == "__main__":
    main()
