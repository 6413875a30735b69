"""Where a step's time goes: the sft job in llmtk at SmolLM2-135M's shape, by torch's profiler.

    python tests/benchmarks/profile_step.py [--steps 4] [--float32] [--checkpointing] [--data FOLDER]

Steps run without the profiler, then one with it. Its operations are put into groups by where they stand: in attention,
in the head, in the optimizer's step (clipping included), each with its backward pass; else by what they do. A group's
GFLOP/s are those of its matrix products over all of its time. Peak is what a large square product reaches in the same
process. Model FLOPs are 6 for each weight of the trunk's matrices and token, 6 for each weight of the head and target,
and causal attention's; what is computed twice counts once. Utilisation is theirs, over a step without the profiler.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from sides.job import Job
from sides.with_llmtk import train
from sides.workload import SHAPE, prepare
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import llmtk
from llmtk.scoring import attention, packed
from llmtk.training.backend import Backend

ROOT = Path(__file__).parents[2]
SCOPES = ("attention", "head", "optimizer")
GROUPS = ("matrix products", *SCOPES, "casts and copies", "elementwise", "rest")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
COPIES = (
    *("aten::copy_", "aten::clone", "aten::cat", "aten::index", "aten::index_select", "aten::index_add_"),
    *("aten::embedding_dense_backward", "aten::fill_", "aten::zero_", "aten::gather", "aten::scatter_add_"),
)
"""Operations that move numbers, or make room for them, and compute none."""
SQUARE = 4096
"""Rows and columns of the product that measures the peak."""


@dataclass
class Spent:
    """Seconds of a group, and the floating-point operations of its matrix products."""

    seconds: float = 0.0
    flops: float = 0.0


def main() -> None:
    """Profile the job, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="without the profiler; the first warms up")
    parser.add_argument("--float32", action="store_true", help="compute in float32")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    options = parser.parse_args()
    if not options.data.is_dir():
        print(f"{options.data} is absent: name another by --data")
        return
    job = Job("sft", options.steps + 1, options.float32, options.checkpointing)
    mark(attention, "packed_attention", "attention")
    mark(packed, "head_scores", "head")
    mark(Backend, "step", "optimizer")
    watch = Profile(job.steps)
    with tempfile.TemporaryDirectory() as folder:
        prepare("sft", job.steps, options.data, Path(folder))
        train(Path(folder), job, [watch])
    report(job, watch, peak_flops(torch.float32 if job.float32 else torch.bfloat16))


def mark(owner: Any, name: str, scope: str) -> None:
    """Let the profiler see a function by name."""
    function = getattr(owner, name)

    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(scope):
            return function(*args, **kwargs)

    setattr(owner, name, marked)


class Profile:
    """Times a run's steps, and profiles the last of them."""

    name = "profile"

    def __init__(self, last: int) -> None:
        self.last = last
        self.seconds: list[float] = []
        self.model_flops: list[float] = []
        self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)

    @llmtk.hookimpl
    def run_started(self, run: llmtk.RunView) -> None:
        self.ended = time.perf_counter()

    @llmtk.hookimpl
    def around_prepare_batch(self, run: llmtk.RunView, rows: list[dict[str, Any]], inner: Callable[..., Any]) -> Any:
        self.model_flops.append(sum(map(flops_of, rows)))
        return inner(rows)

    @llmtk.hookimpl
    def step_finished(self, run: llmtk.RunView, step: Any) -> None:
        self.seconds.append(time.perf_counter() - self.ended)
        if step.step == self.last:
            self.profiler.stop()
        if step.step == self.last - 1:
            self.profiler.start()
        self.ended = time.perf_counter()


def flops_of(row: dict[str, Any]) -> float:
    """Return what a row's forward and backward pass needs: two operations a weight and token each way, and one more."""
    width, inner, layers = SHAPE["hidden_size"], SHAPE["intermediate_size"], SHAPE["num_hidden_layers"]
    shared = SHAPE["num_key_value_heads"] / SHAPE["num_attention_heads"]
    weights = layers * width * (2 * width + 2 * shared * width + 3 * inner)
    # Scores and values: 2 x width operations a token and key each, of which a causal token has half of all.
    attended = layers * 2 * width * len(row["input_ids"])
    head = sum(row["targets"]) * width * SHAPE["vocab_size"]
    return 6 * len(row["input_ids"]) * weights + 3 * len(row["input_ids"]) * attended + 6 * head


def peak_flops(dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of a large square product: the best of several."""
    left, right = (torch.randn(SQUARE, SQUARE).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        began = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - began)
    return 2 * SQUARE**3 / best


def spent(events: list[FunctionEvent]) -> dict[str, Spent]:
    """Add up the operations of a step by group. Seconds are each operation's own, without those that it calls."""
    scopes = backward_scopes(events)
    groups: dict[str, Spent] = defaultdict(Spent)
    for event in events:
        group = groups[group_of(event, scopes)]
        group.seconds += event.self_cpu_time_total / 1e6
        group.flops += product_flops(event)
    return groups


def backward_scopes(events: list[FunctionEvent]) -> dict[int, str]:
    """Return the scope of forward operations by their number, which the nodes of their backward pass bear too."""
    return {
        event.sequence_nr: scope
        for event in events
        if event.sequence_nr >= 0 and (scope := next((e.name for e in callers(event) if e.name in SCOPES), None))
    }


def callers(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """Yield an event, what called it, what called that, and so on."""
    caller: FunctionEvent | None = event
    while caller is not None:
        yield caller
        caller = caller.cpu_parent


def group_of(event: FunctionEvent, scopes: dict[int, str]) -> str:
    """Return the group of an operation: where it stands, else what it does."""
    for caller in callers(event):
        if caller.name in SCOPES:
            return caller.name
        if caller.name.startswith("autograd::engine") and caller.sequence_nr in scopes:
            return scopes[caller.sequence_nr]
    if event.name in PRODUCTS:
        return "matrix products"
    if event.name in COPIES:
        return "casts and copies"
    return "elementwise" if event.name.startswith("aten::") else "rest"


def product_flops(event: FunctionEvent) -> float:
    """Return the floating-point operations of a matrix product, 0 of anything else."""
    if event.name not in PRODUCTS:
        return 0.0
    left, right = [shape for shape in event.input_shapes if len(shape) >= 2][-2:]
    batch = left[0] if len(left) == 3 else 1
    return 2.0 * batch * left[-2] * left[-1] * right[-1]


def report(job: Job, watch: Profile, peak: float) -> None:
    """Print the profiled step's groups, and the utilisation of the others."""
    groups, whole = spent(watch.profiler.events()), watch.seconds[-1]
    groups["rest"].seconds += whole - sum(group.seconds for group in groups.values())
    print(f"\nsft, {job.setting}, {torch.get_num_threads()} threads; a profiled step of {whole:.2f} s")
    print(f"  {'':18} {'seconds':>8} {'share':>6} {'GFLOP':>8} {'GFLOP/s':>8} {'of peak':>8}")
    for name in GROUPS:
        group = groups[name]
        line = f"  {name:18} {group.seconds:8.3f} {group.seconds / whole:6.1%}"
        if group.flops:
            speed = group.flops / group.seconds
            line += f" {group.flops / 1e9:8.0f} {speed / 1e9:8.0f} {speed / peak:8.1%}"
        print(line)
    speeds = [flops / seconds for flops, seconds in zip(watch.model_flops, watch.seconds, strict=True)][1:-1]
    print(f"  peak: {peak / 1e9:,.0f} GFLOP/s, a product of {SQUARE} x {SQUARE}")
    print(f"  a step without the profiler: {statistics.median(watch.seconds[1:-1]):.2f} s (median)")
    print(f"  model FLOPs utilisation: {statistics.median(speeds) / peak:.1%} of the peak (median)")


if __name__ == "__main__":
    main()
