"""llmtk beside TRL 1.16.0: the same weights, tokenizer, rows and order, turn about, each in a fresh process.

    python tests/benchmarks/peers.py [--jobs sft dpo kto] [--rounds 3] [--steps 4] [--checkpointing] [--data FOLDER]

The model has the shape of SmolLM2-135M with random weights; both sides compute in bfloat16 (autocast) with AdamW. TRL
gets a virtual environment of its own under .venv-trl, made on the first call. Printed: the median seconds of a step,
real tokens a second, peak memory, their ratios, and the two loss curves, which must agree (kto's in the first step, as
the two estimate its KL on other mismatched answers). The rows are those of alpaca_en_demo.json, dpo_en_demo.json and
kto_en_demo.json; where the folder is absent, the benchmark says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PEER = ROOT / ".venv-trl"
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
ROWS = {"sft": 8, "dpo": 4, "kto": 4}
"""Rows (or pairs) of a step."""
FILES = {"sft": "alpaca_en_demo.json", "dpo": "dpo_en_demo.json", "kto": "kto_en_demo.json"}
ANSWERS = ("completion", "chosen", "rejected")
"""Columns of a row that stand behind its prompt."""
MAX_LENGTH = 512


def main() -> None:
    """Measure the jobs asked for, and print one table for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing on both sides")
    parser.add_argument("--float32", action="store_true", help="compute in float32 on both sides")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--worker", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        side, folder = options.worker
        worker(side, options.jobs[0], Path(folder), options)
        return
    if not options.data.is_dir():
        print(f"{options.data} is absent: give --data, a folder with {' and '.join(FILES.values())}")
        return
    python = peer_environment()
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            tokens = prepare(job, Path(folder), options)
            results: dict[str, list[dict[str, Any]]] = {"trl": [], "llmtk": []}
            for _ in range(options.rounds):
                results["trl"].append(measure(python, "trl", job, folder, options))
                results["llmtk"].append(measure(sys.executable, "llmtk", job, folder, options))
            report(job, results, tokens)


def peer_environment() -> str:
    """Return the Python of TRL's environment, made if it is not there."""
    python = PEER / "bin" / "python"
    if not (PEER / ".made").exists():
        print("Making an environment for TRL; this takes some minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", PEER], check=True)
        versions = ["torch==2.13.0", "transformers==5.23.0", "trl==1.16.0"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *versions], check=True)
        (PEER / ".made").touch()
    return str(python)


def prepare(job: str, folder: Path, options: argparse.Namespace) -> int:
    """Write model and rows, in llmtk's order, for both sides; return the real tokens of all steps."""
    import torch

    from llmtk.config.sections import ModelConfig, TokenizerConfig
    from llmtk.models.loading import load_model
    from llmtk.models.saving import save_model
    from llmtk.models.tokenizers import load_tokenizer
    from llmtk.training.order import shuffled

    rows = READ[job](json.loads((options.data / FILES[job]).read_text()))
    config = ModelConfig(from_config=SHAPE, tokenizer=TokenizerConfig(kind="bpe", vocab_size=16384))
    tokenizer = load_tokenizer(config, lambda: (text for row in rows for text in row.values() if isinstance(text, str)))

    def lengths(row: dict[str, str]) -> list[int]:
        return [len(tokenizer(row["prompt"] + row[key])["input_ids"]) + 1 for key in ANSWERS if key in row]

    fitting = [row for row in rows[:600] if max(lengths(row)) <= MAX_LENGTH][: ROWS[job] * options.steps]
    ordered = [fitting[index] for index in shuffled(len(fitting), 42, 0)]
    save_model(load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32), tokenizer, folder / "model")
    (folder / "rows.json").write_text(json.dumps(fitting))
    (folder / "ordered.json").write_text(json.dumps(ordered))
    return sum(length for row in ordered for length in lengths(row))


def read_sft(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Turn alpaca rows into prompts and completions."""
    return [
        {"prompt": "\n".join(filter(None, (row["instruction"], row["input"]))) + "\n", "completion": row["output"]}
        for row in rows
        if row["output"]
    ]


def read_dpo(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Turn conversations with two answers into pairs."""
    return [
        {
            "prompt": "\n".join(turn["value"] for turn in row["conversations"]) + "\n",
            "chosen": row["chosen"]["value"],
            "rejected": row["rejected"]["value"],
        }
        for row in rows
    ]


def read_kto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turn labelled conversations into prompts, completions and labels."""
    return [
        {
            "prompt": "\n".join(turn["content"] for turn in row["messages"][:-1]) + "\n",
            "completion": row["messages"][-1]["content"],
            "label": row["label"],
        }
        for row in rows
    ]


READ: dict[str, Any] = {"sft": read_sft, "dpo": read_dpo, "kto": read_kto}


def measure(python: str, side: str, job: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one side in a fresh process; return its step times, losses and peak memory."""
    command = [python, __file__, "--worker", side, folder, "--jobs", job, "--steps", str(options.steps)]
    command += ["--checkpointing"] * options.checkpointing + ["--float32"] * options.float32
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(
        f"{job} {side:6} {[round(second, 2) for second in result['seconds']]} s, {result['peak']:.1f} GiB", flush=True
    )
    return result


def report(job: str, results: dict[str, list[dict[str, Any]]], tokens: int) -> None:
    """Print a job's table. The first step, which warms up, is left out of the median."""
    medians = {
        side: statistics.median(second for run in runs for second in run["seconds"][1:])
        for side, runs in results.items()
    }
    peaks = {side: statistics.median(run["peak"] for run in runs) for side, runs in results.items()}
    steps = len(results["trl"][0]["losses"])
    print(f"\n{job}: {ROWS[job]} rows a step, {tokens / steps:.0f} real tokens")
    for side in results:
        speed = tokens / steps / medians[side]
        print(f"  {side:6} {medians[side]:7.2f} s a step  {speed:7.0f} tokens/s  {peaks[side]:5.1f} GiB")
    faster, memory = medians["trl"] / medians["llmtk"], peaks["llmtk"] / peaks["trl"]
    print(f"  llmtk takes {faster:.2f}x the steps in a second, and {memory:.2f}x the memory")
    for side, runs in results.items():
        print(f"  losses {side:6} {[round(loss, 5) for loss in runs[-1]['losses']]}")
    print(flush=True)


def worker(side: str, job: str, folder: Path, options: argparse.Namespace) -> None:
    """Train in this process, and print what came of it as the last line."""
    seconds, losses = (train_trl if side == "trl" else train_llmtk)(job, folder, options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "losses": losses, "peak": peak}))


def train_trl(job: str, folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Train with TRL's defaults, but for what both sides share."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

    seconds: list[float] = []
    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if logs and "loss" in logs else [])

    trainers = {"sft": (SFTTrainer, SFTConfig), "dpo": (DPOTrainer, DPOConfig), "kto": (KTOTrainer, KTOConfig)}
    trainer_class, config_class = trainers[job]
    config = config_class(
        output_dir=str(folder / "trl"),
        max_steps=options.steps,
        per_device_train_batch_size=ROWS[job],
        learning_rate=2e-5,
        lr_scheduler_type="linear",
        warmup_steps=0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=not options.float32,
        use_cpu=True,
        gradient_checkpointing=options.checkpointing,
        max_length=MAX_LENGTH,
    )
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(json.loads((folder / "ordered.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Watch()],
    )
    trainer._get_train_sampler = lambda *_: SequentialSampler(trainer.train_dataset)
    trainer.train()
    return seconds, losses


def train_llmtk(job: str, folder: Path, options: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Train with llmtk's defaults, but for what both sides share."""
    import llmtk

    class Watch:
        name = "watch"

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.losses: list[float] = []

        @llmtk.hookimpl
        def run_started(self, run: Any) -> None:
            self.ends.append(time.perf_counter())

        @llmtk.hookimpl
        def step_finished(self, run: Any, step: Any) -> None:
            self.ends.append(time.perf_counter())
            self.losses.append(step.loss)

    watch = Watch()
    rows = json.loads((folder / "rows.json").read_text())
    llmtk.Run(
        job,
        model=str(folder / "model"),
        data={"train": rows, "max_length": MAX_LENGTH},
        train={
            "max_steps": options.steps,
            "per_device_train_batch_size": ROWS[job],
            "learning_rate": 2e-5,
            "logging_steps": 1,
            "save_strategy": "no",
            "bf16": not options.float32,
            "gradient_checkpointing": options.checkpointing,
        },
        plugins=[watch],
        output_dir=str(folder / f"llmtk-{os.getpid()}"),
    ).train()
    return [after - before for before, after in zip(watch.ends[:-1], watch.ends[1:], strict=True)], watch.losses


if __name__ == "__main__":
    main()
