"""llmtk's own engine beside transformers' `generate()`: the same weights and prompts, turn about, in one process.

    python tests/benchmarks/generation.py [--rounds 3]

The model has the shape of SmolLM2-135M with random float32 weights, and both sides compute in bfloat16: transformers
with autocast around each forward, as Accelerate prepares a model for TRL's trainers, and with each prompt repeated for
its copies; llmtk as `run.generate` does. Nothing ends early, so that both write equally many tokens. Printed: medians
of wall-clock and CPU seconds, and the ratio, by which the benchmark fails where it is below what the project promises.
CPU seconds decide, since other work on the machine moves them less.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from sides.workload import SHAPE
from transformers import AutoConfig, AutoModelForCausalLM

from llmtk import scoring
from llmtk.generation import Sampling, generate

CASES = {
    "2 prompts of 16 tokens, 4 completions of each": (2, 16, 4, 1.3),
    "2 prompts of 512 tokens, 8 completions of each": (2, 512, 8, 2.0),
}
"""Prompts, their tokens, completions of each, and the ratio that is promised."""
NEW_TOKENS = 64

Seconds = tuple[float, float]
"""Wall clock, and CPU."""


def models() -> tuple[Any, Any]:
    """Return (the model as transformers' generate gets it, the model as llmtk's engine gets it), of equal weights."""
    torch.manual_seed(0)
    fields = {name: value for name, value in SHAPE.items() if name != "model_type"}
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(SHAPE["model_type"], **fields)).eval()
    ours = copy.deepcopy(theirs)
    scorer = scoring.choose(ours, lambda reason: [reason])
    assert scorer.packed, scorer.why_padded
    theirs.forward = torch.autocast("cpu", torch.bfloat16)(theirs.forward)
    return theirs, ours


def with_transformers(model: Any, prompts: torch.Tensor, copies: int) -> int:
    """Write, and return how many tokens were written."""
    repeated = prompts.repeat_interleave(copies, 0)
    with torch.no_grad():
        whole = model.generate(
            repeated,
            attention_mask=torch.ones_like(repeated),
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
    return int(whole[:, prompts.shape[1] :].numel())


def with_llmtk(model: Any, prompts: torch.Tensor, copies: int) -> int:
    """Write, and return how many tokens were written."""
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(model, prompts.tolist(), Sampling(n=copies, max_new_tokens=NEW_TOKENS), packed=True)
    return sum(len(answer.tokens) for found in answers for answer in found)


def timed(write: Callable[..., int], model: Any, prompts: torch.Tensor, copies: int) -> Seconds:
    """Return how long it takes to write."""
    wall, cpu = time.perf_counter(), time.process_time()
    assert write(model, prompts, copies) == len(prompts) * copies * NEW_TOKENS
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Measure each case, and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    theirs, ours = models()
    failed = []
    print(f"{'wall-clock (CPU) seconds':48} {'transformers':>16} {'llmtk':>16} {'ratio':>12} {'promised':>9}")
    for name, (count, length, copies, promised) in CASES.items():
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, SHAPE["vocab_size"], (count, length), generator=generator)
        seconds: dict[Any, list[Seconds]] = {with_transformers: [], with_llmtk: []}
        for _ in range(arguments.rounds):
            seconds[with_transformers].append(timed(with_transformers, theirs, prompts, copies))
            seconds[with_llmtk].append(timed(with_llmtk, ours, prompts, copies))
        (wall, cpu), (our_wall, our_cpu) = (
            [statistics.median(column) for column in zip(*rounds, strict=True)] for rounds in seconds.values()
        )
        print(
            f"{name:48} {wall:7.2f} ({cpu:6.2f}) {our_wall:7.2f} ({our_cpu:6.2f}) "
            f"{wall / our_wall:5.2f} ({cpu / our_cpu:.2f}) {promised:8.1f}x",
            flush=True,
        )
        if cpu < promised * our_cpu:
            failed.append(name)
    if failed:
        sys.exit(f"slower than promised: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
