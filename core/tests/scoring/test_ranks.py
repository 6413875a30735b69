"""Two ranks, under DDP and under torch's FSDP2, score as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtk.ports import free_port

WORKER = Path(__file__).with_name("ranks.py")
CASES = [
    f"{wrapper}{kind}{checkpointed}"
    for wrapper in ("ddp", "fsdp")
    for kind in ("", ", tied", ", lora", ", window and caps")
    for checkpointed in ("", ", checkpointed")
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """All cases, of both ranks, from one launch."""
    out = tmp_path_factory.mktemp("ranks") / "answers.json"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, *launcher, "--master-port", str(free_port()), str(WORKER), str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert not done.returncode, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return json.loads(out.read_text())


def test_every_case_was_run(answers):
    assert [sorted(rank) for rank in answers] == [sorted([*CASES, "ddp, values", "fsdp, values"])] * 2


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_score_as_one_process_does(answers, case):
    for rank in answers:
        found = rank[case]
        assert found["parameters"] > 10
        assert found["logps"] <= 1e-5
        assert found["gradients"] <= 1e-5
        assert found["mapped"] <= 1e-5


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_ranks_give_the_values_of_one_process(answers, wrapper):
    for rank in answers:
        assert all(distance <= 1e-5 for distance in rank[f"{wrapper}, values"].values())
