"""What the generic loop costs: llmtk beside a loop written by hand, on the same model, rows and order.

    python tests/benchmarks/loop.py [--steps 60] [--rounds 5]

Both sides train the same weights with the same optimizer, schedule and clipping, in turn, in one process. Times are of
whole steps, data and logging included, from the end of one step to the end of the next. The losses must agree.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, get_scheduler

import llmtk
from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.models.loading import load_model
from llmtk.models.saving import save_model
from llmtk.models.tokenizers import load_tokenizer
from llmtk.training.order import shuffled

SHAPES = {
    "small: 4 layers of 128, 12 rows of 64 tokens": (
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
        {"rows": 12, "words": (12, 13)},
    ),
    "medium: 8 layers of 384, 8 rows of 20 to 250 tokens": (
        {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6},
        {"rows": 8, "words": (4, 50)},
    ),
}


def by_hand(folder: Path, encoded: Sequence[dict[str, Any]], rows: int, steps: int) -> tuple[list[float], list[float]]:
    """Train as one would with plain PyTorch; return (seconds of each step, losses)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    scheduler = get_scheduler("linear", optimizer, 0, steps)
    order = shuffled(len(encoded), 42, 0)
    seconds, losses = [], []
    ended = time.perf_counter()
    for step in range(steps):
        batch = [encoded[int(index)] for index in order[step * rows : (step + 1) * rows]]
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.zeros(rows, longest, dtype=torch.int64)
        mask = torch.zeros(rows, longest, dtype=torch.int64)
        labels = torch.full((rows, longest), -100)
        for index, row in enumerate(batch):
            tokens = torch.tensor(row["input_ids"])
            targets = torch.tensor(row["targets"])
            ids[index, : len(tokens)] = tokens
            mask[index, : len(tokens)] = 1
            labels[index, : len(tokens)] = tokens.masked_fill(~targets, -100)

        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)

        losses.append(loss.item())
        if step % 10 == 9:
            print(f"step {step + 1}: loss {losses[-1]:.4f}", flush=True)
        seconds.append(time.perf_counter() - ended)
        ended = time.perf_counter()
    return seconds, losses


class Watch:
    """Notes when each step ends, and its loss."""

    name = "watch"

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []

    @llmtk.hookimpl
    def run_started(self, run: llmtk.RunView) -> None:
        self.ends.append(time.perf_counter())

    @llmtk.hookimpl
    def step_finished(self, run: llmtk.RunView, step: Any) -> None:
        self.losses.append(step.loss)
        self.ends.append(time.perf_counter())


def with_llmtk(folder: Path, data: list[dict[str, Any]], rows: int, steps: int) -> tuple[list[float], list[float]]:
    """Train with the sft stage; return (seconds of each step, losses)."""
    watch = Watch()
    with tempfile.TemporaryDirectory() as output:
        llmtk.Run(
            "sft",
            model=str(folder),
            data=data,
            train={
                "max_steps": steps,
                "per_device_train_batch_size": rows,
                "learning_rate": 1e-3,
                "save_strategy": "no",
                "bf16": False,
            },
            plugins=[watch],
            output_dir=f"{output}/run",
        ).train()
    return [after - before for before, after in zip(watch.ends[:-1], watch.ends[1:], strict=True)], watch.losses


def make(folder: Path, shape: dict[str, Any], count: int, words: tuple[int, int]) -> tuple[list[Any], Sequence[Any]]:
    """Write a model with random weights; return rows, and the same rows encoded."""
    from llmtk.config.sections import DataConfig
    from llmtk.data import encode, read_rows

    fields = {"model_type": "llama", "max_position_embeddings": 1024, **shape}
    config = ModelConfig(from_config=fields, tokenizer=TokenizerConfig(kind="byte"))
    tokenizer = load_tokenizer(config, lambda: [])
    save_model(load_model(config, tokenizer, trainable=True, compute_dtype=torch.float32), tokenizer, folder)
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(count):
        length = int(torch.randint(*words, (1,), generator=generator))
        data.append({"prompt": "Count:", "completion": " ".join(["word"] * length)})
    return data, encode(read_rows(data, ["prompt_completion"]), tokenizer, DataConfig())[0]


def main() -> None:
    """Measure each shape, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    results = []
    for name, (shape, batch) in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            data, encoded = make(Path(folder), shape, batch["rows"] * arguments.steps, batch["words"])
            hand: list[float] = []
            ours: list[float] = []
            for _ in range(arguments.rounds):
                seconds, hand_losses = by_hand(Path(folder), encoded, batch["rows"], arguments.steps)
                hand += seconds[5:]
                seconds, our_losses = with_llmtk(Path(folder), data, batch["rows"], arguments.steps)
                ours += seconds[5:]
        worst = max(abs(a - b) / abs(b) for a, b in zip(our_losses, hand_losses, strict=True))
        results.append((name, statistics.median(hand), statistics.median(ours), worst))
    print(f"\n{'':52} {'by hand':>10} {'llmtk':>10} {'ratio':>7}   losses differ by")
    for name, hand_median, our_median, worst in results:
        ratio = our_median / hand_median
        print(f"{name:52} {hand_median * 1e3:7.1f} ms {our_median * 1e3:7.1f} ms {ratio:7.3f}   {worst:.1e}")


if __name__ == "__main__":
    main()
