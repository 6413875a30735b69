"""grpo beside TRL 1.16.0: whole steps (write, reward, train), the same weights, prompts and lengths, turn about.

    python tests/benchmarks/grpo.py [--rounds 2] [--steps 4] [--data FOLDER]

SmolLM2-135M's shape with random weights, bfloat16 (autocast), AdamW, 2 prompts of gsm8k with 4 completions each of 64
tokens: weights as these do not stop before. Both sides sample, so completions differ, and their number of tokens does
not. Where the folder with the prompts is absent, the benchmark says so and ends.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from peers import environment
from sides.job import Result

HERE = Path(__file__).parent
FILE = "gsm8k_train_3000.jsonl"
PROMPTS, COPIES, TOKENS = 2, 4, 64


def main() -> None:
    """Measure both sides, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first warms up and is not counted")
    parser.add_argument("--data", type=Path, default=HERE.parents[2] / "shared" / "data")
    options = parser.parse_args()
    python = environment("trl")
    if python is None or not (options.data / FILE).is_file():
        print(f"nothing to compare: {options.data / FILE} is absent, name another folder by --data")
        return
    results: dict[str, list[Result]] = {"trl": [], "llmtk": []}
    with tempfile.TemporaryDirectory() as name:
        prepare(options.steps, options.data, Path(name))
        for _ in range(options.rounds):
            for side, interpreter in (("trl", python), ("llmtk", sys.executable)):
                results[side].append(measure(interpreter, side, Path(name)))
    report(results)


def prepare(steps: int, data: Path, folder: Path) -> None:
    """Write the model, and the prompts in llmtk's order."""
    import torch
    from sides.workload import SHAPE

    from llmtk.config.sections import ModelConfig, TokenizerConfig
    from llmtk.models.loading import load_model
    from llmtk.models.saving import save_model
    from llmtk.models.tokenizers import load_tokenizer
    from llmtk.training.order import shuffled

    questions = [json.loads(line)["question"] for line in (data / FILE).read_text().splitlines()]
    config = ModelConfig(from_config=SHAPE, tokenizer=TokenizerConfig(kind="bpe", vocab_size=16384))
    tokenizer = load_tokenizer(config, lambda: questions)
    save_model(load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32), tokenizer, folder / "model")
    rows = [{"prompt": question} for question in questions[: PROMPTS * steps]]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "ordered.json").write_text(json.dumps([rows[index] for index in shuffled(len(rows), 42, 0)]))
    (folder / "job.json").write_text(json.dumps({"steps": steps, "prompts": PROMPTS, "n": COPIES, "tokens": TOKENS}))
    # A reward that has a spread in every group, and costs nothing.
    (folder / "reward.py").write_text(
        "def score(prompts, completions, **columns):\n    return [len(set(text)) / 100 for text in completions]\n"
    )


def measure(python: str, side: str, folder: Path) -> Result:
    """Run one side in a fresh process."""
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    command = [python, "-m", f"sides.grpo_with_{side}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE)
    shutil.rmtree(folder / "output", ignore_errors=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = Result.load(folder)
    print(f"grpo: {side:6} {' '.join(f'{s:.2f}' for s in result.seconds)} s, {result.gib:.1f} GiB", flush=True)
    return result


def report(results: dict[str, list[Result]]) -> None:
    """Print the table. The first step, which warms up, is left out of the median."""
    medians = {side: statistics.median(s for run in runs for s in run.seconds[1:]) for side, runs in results.items()}
    memory = {side: statistics.median(run.gib for run in runs) for side, runs in results.items()}
    print(f"\ngrpo: {PROMPTS} prompts x {COPIES} completions x {TOKENS} tokens a step")
    for side in results:
        written = PROMPTS * COPIES * TOKENS / medians[side]
        print(f"  {side:6} {medians[side]:7.2f} s a step  {written:6.0f} tokens/s written  {memory[side]:5.1f} GiB")
    faster, least = medians["trl"] / medians["llmtk"], memory["llmtk"] / memory["trl"]
    print(f"  llmtk takes {faster:.2f}x the steps in a second, and {least:.2f}x the memory")


if __name__ == "__main__":
    main()
