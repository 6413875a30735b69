"""Two ranks, under DDP and under torch's FSDP2, write what one process does, whichever prompts each of them has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmtk.generation import Sampling, generate
from llmtk.ports import free_port

from .kit import SHARES, WRAPPED, flat, logps_of

WORKER = Path(__file__).with_name("ranks.py")
CASES = [
    (wrapper, name, share, way)
    for wrapper in ("ddp", "fsdp")
    for name in WRAPPED
    for share in SHARES
    for way in ("packed", "plain")
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


@pytest.fixture(scope="module")
def alone():
    """What one process writes for all prompts of a case, by model and case, the plain way."""
    written = {}

    def of(name, share):
        if (name, share) not in written:
            case = SHARES[share]
            written[name, share] = generate(WRAPPED[name](), case.prompts, Sampling(**case.settings), case.seeds)
        return written[name, share]

    return of


def test_every_case_was_run(answers):
    assert [sorted(rank) for rank in answers] == [sorted(", ".join(case) for case in CASES)] * 2


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_two_ranks_write_what_one_process_does(answers, alone, case):
    _, name, share, _ = case
    whole, expected = alone(name, share), [[], []]
    for prompt, copies in enumerate(whole):
        expected[SHARES[share].owners[prompt]].append(copies)
    for rank, wanted in zip(answers, expected, strict=True):
        found = rank[", ".join(case)]["told"]
        assert [[(tokens, stopped) for tokens, stopped, _ in copies] for copies in found] == [
            [(answer.tokens, answer.stopped) for answer in copies] for copies in wanted
        ]
        logps = torch.tensor([logp for copies in found for *_, row in copies for logp in row])
        torch.testing.assert_close(logps, logps_of(wanted), rtol=0, atol=2e-5)
    assert {answer.stopped for answer in flat(whole)} == {"stop", "length"}, "some end early"


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_sharded_ranks_run_as_many_forwards_and_others_need_not(answers, case):
    wrapper, _, share, _ = case
    first, second = (rank[", ".join(case)]["forwards"] for rank in answers)
    if wrapper == "fsdp":
        assert first == second > 0
    elif share == "one rank has none":
        assert first > second == 0
