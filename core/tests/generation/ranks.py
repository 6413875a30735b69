"""What each of two processes does: write under DDP and FSDP2, with shares of prompts that are not equal.

    python -m torch.distributed.run --nproc-per-node 2 ranks.py OUT

The ranks' completions, by case, are written to OUT by rank 0, with the forwards that each rank ran.
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
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from generation.kit import SHARES, WRAPPED, patched
from llmtk.generation import Sampling, generate
from llmtk.generation.proof import why_not_packed
from llmtk.scoring.packed import causal_model


def anyone(goes_on: bool) -> bool:
    answers: list[Any] = [None] * 2
    dist.all_gather_object(answers, goes_on)
    return any(answers)


def shard(root: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in causal_model(root).model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(root, mesh=mesh)


def parallel(root: nn.Module) -> nn.Module:
    wrapped = DistributedDataParallel(root)
    wrapped.broadcast_buffers = False
    return wrapped


WRAPPERS = {"ddp": (parallel, None), "fsdp": (shard, anyone)}


def main(out: Path) -> None:
    faulthandler.enable()
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    answers: dict[str, Any] = {}
    for wrapper, (wrap, together) in WRAPPERS.items():
        for name, make in WRAPPED.items():
            wrapped = wrap(patched(make()))
            root = getattr(wrapped, "module", wrapped)  # a run writes with the root itself
            calls: list[int] = []
            root.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            reason = why_not_packed(root, together)
            assert reason is None, reason
            for share, case in SHARES.items():
                prompts, seeds = case.of_rank(dist.get_rank())
                for packed in (True, False):
                    calls.clear()
                    done = generate(root, prompts, Sampling(**case.settings), seeds, packed=packed, together=together)
                    way = "packed" if packed else "plain"
                    answers[f"{wrapper}, {name}, {share}, {way}"] = {
                        "told": [[[a.tokens, a.stopped, a.logps] for a in copies] for copies in done],
                        "forwards": len(calls),
                    }
    everyone: list[Any] = [None] * 2
    dist.all_gather_object(everyone, answers)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(everyone))
    # Sharded modules stand in cycles and hold the group: left to the interpreter's end, its threads may abort it.
    del root, wrapped
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
