"""Two processes in which a stage is trained on two ranks, beside the checks of this one. Each is a `worker`."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from llmtk.cli.ports import LOCAL, free_port
from llmtk.testing.conformance import Failure

LIMIT = 300
"""Seconds after which they are taken to hang."""
ENDING = 10
"""Seconds that they have to end when they are told to."""


class TwoRanks:
    """Two workers with a specification, started as this is made."""

    def __init__(self, spec: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", LOCAL]
        command += ["--master-port", str(free_port()), "-m", "llmtk.testing.worker", str(spec)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        self._said = spec.with_suffix(".log")
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment
            )

    def wait(self) -> None:
        """Wait until they are done. Failure where they fail or hang, with the end of what they said."""
        try:
            code = self._process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failure(f"the two processes hang: after {LIMIT} s they were not done") from None
        if code:
            said = self._said.read_text(errors="replace")
            told = [line for line in said.splitlines() if line.startswith("llmtk-check: ")]
            raise Failure(told[0].removeprefix("llmtk-check: ") if told else f"a process failed:\n{said[-2000:]}")

    def end(self) -> None:
        """End them, if they are not done."""
        if self._process.poll() is None:
            self._process.terminate()  # the launcher ends its workers
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING)
            self._process.kill()
            self._process.wait()
