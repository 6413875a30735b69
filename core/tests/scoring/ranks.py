"""What each of two processes does: packed scoring under DDP and FSDP2, against one process that scores it all plainly.

    python -m torch.distributed.run --nproc-per-node 2 ranks.py OUT

Each case scores half of the groups on each rank. The rank's answers are the largest distances of log-probs and of
gradients from those of the unwrapped model on the whole batch, padded; rank 0 writes them to OUT.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from transformers import AutoConfig, AutoModelForSequenceClassification

from llmtk.scoring import choose, packed, padded, values
from llmtk.scoring.proof import why_not_packed
from scoring.kit import PACKED, adapted, build, distances, enlarge, gradients, measure, shared, weigh

HALVES = ([0, 3], [1, 2, 4])
"""Unequal ones."""


def shard(root: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in packed.causal_model(root).model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(root, mesh=mesh)


def shard_values(root: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in root.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(root, mesh=mesh)


def parallel(root: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(root)
    wrapped.broadcast_buffers = False
    return wrapped


CASES: dict[str, Any] = {
    "ddp": (lambda: build("llama"), parallel),
    "ddp, tied": (lambda: build("llama", tie_word_embeddings=True), parallel),
    "ddp, lora": (lambda: adapted(build("llama")), parallel),
    "ddp, window and caps": (lambda: build("gemma2"), parallel),
    "fsdp": (lambda: build("llama"), shard),
    "fsdp, tied": (lambda: build("llama", tie_word_embeddings=True), shard),
    "fsdp, lora": (lambda: adapted(build("llama")), shard),
    "fsdp, window and caps": (lambda: build("gemma2"), shard),
}


def half(rank: int) -> tuple[Any, Tensor, Tensor]:
    """Return this rank's groups, and where their targets stand in the whole batch, with their weights."""
    batch = shared()
    owner = batch.sequence_group[batch.target_sequence]
    at = torch.cat([(owner == group).nonzero().flatten() for group in HALVES[rank]])
    return batch.select(HALVES[rank]), at, weigh(batch)[at]


def check(make: Any, wrap: Any, checkpointed: bool) -> dict[str, float]:
    rank = dist.get_rank()
    expected = measure(padded, make(), shared())
    root = make()
    if checkpointed:
        root.gradient_checkpointing_enable({"use_reentrant": False})
        root.train()
    reason = why_not_packed(root)
    assert reason is None, reason
    wrapped = wrap(root)
    batch, at, weights = half(rank)
    # Twice: what the first backward pass leaves must not disturb the second.
    for _ in range(2):
        wrapped.zero_grad(set_to_none=True)
        logps = packed.score(wrapped, batch).logps
        (logps * weights).sum().mul(dist.get_world_size()).backward()
    found = {"logps": logps.detach()} | {
        name: gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        for name, gradient in gradients(root).items()
    }
    by_rank = {**expected, "logps": expected["logps"][at]}
    scored = distances(found, by_rank)

    wrapped.zero_grad(set_to_none=True)
    packed.map_logits(wrapped, batch, lambda z: z.logsumexp(-1), []).sum().mul(2).backward()
    mapped = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(root).items()}
    plain = make()
    padded.map_logits(plain, shared(), lambda z: z.logsumexp(-1)).sum().backward()
    exact = gradients(plain)
    return {
        "logps": scored.pop("logps"),
        "gradients": max(scored.values()),
        "mapped": max(float((mapped[name] - exact[name]).norm() / exact[name].norm()) for name in exact),
        "parameters": len(scored),
    }


def judge() -> nn.Module:
    """Return a small model with a head of one label, enlarged by noise."""
    config = AutoConfig.for_model("llama", **(PACKED["llama"] | {"num_labels": 1}))
    torch.manual_seed(0)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config).float().eval()
    enlarge(model)
    return model


def check_values(wrap: Any) -> dict[str, float]:
    """Do for values what `check` does for log-probs, packed and padded alike."""
    rank = dist.get_rank()
    plain = judge()
    choose(plain, lambda reason: [reason], "to compare")
    whole = values.padded(plain, shared())
    (whole * weigh(shared())).sum().backward()
    batch, at, weights = half(rank)
    far: dict[str, float] = {}
    for name, way in (("packed", values.packed), ("padded", values.padded)):
        root = judge()
        assert choose(root, lambda reason: [reason]).packed
        wrapped = wrap(root)
        found = way(wrapped, batch)
        (found * weights).sum().mul(dist.get_world_size()).backward()
        got = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(root).items()}
        scored = distances({"logps": found.detach(), **got}, {"logps": whole.detach()[at], **gradients(plain)})
        far[f"values, {name}"] = scored.pop("logps")
        far[f"gradients, {name}"] = max(scored.values())
    return far


def main(out: Path) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answers = {}
    for name, (make, wrap) in CASES.items():
        for checkpointed in (False, True):
            answers[name + (", checkpointed" if checkpointed else "")] = check(make, wrap, checkpointed)
    for name, wrap in {"ddp": parallel, "fsdp": shard_values}.items():
        answers[f"{name}, values"] = check_values(wrap)
    everyone: list[Any] = [None] * 2
    dist.all_gather_object(everyone, answers)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))
    # Sharded modules stand in cycles and hold the group: left to the interpreter's end, its threads may abort it.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
