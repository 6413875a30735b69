"""Two processes in which a stage is trained on two ranks, beside the checks of this one. Each is a `worker`."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from llmtk.ports import LOCAL, free_port
from llmtk.testing.conformance import Failure

RANKS = 2
LIMIT = 300
"""Seconds after which they are taken to hang."""
ENDING = 5
"""Seconds that they have to end when they are told to."""
WORKER = "LLMTK_CHECK_WORKER"
"""Set in the environment of a worker, which starts none."""


class TwoRanks:
    """Two workers with a specification, started as this is made.

    No launcher stands between: one that is ended leaves behind what waits for the other rank for ever.
    """

    def __init__(self, spec: Path) -> None:
        command = [sys.executable, "-m", "llmtk.testing.worker", str(spec)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(free_port())}
        environment |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(RANKS))
        environment[WORKER] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)  # what this process can import, they can
        if sys.platform == "linux":
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        self._said = spec.with_suffix(".log")
        with self._said.open("w") as said:
            self._processes = [
                subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    env=environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                )
                for rank in range(RANKS)
            ]

    def wait(self) -> None:
        """Wait until they are done. Failure where one fails or they hang, with the end of what they said."""
        began = time.monotonic()
        while None in (codes := [process.poll() for process in self._processes]) and not any(codes):
            if time.monotonic() - began > LIMIT:
                raise Failure(f"the two processes hang: after {LIMIT} s they were not done")
            time.sleep(0.05)
        if any(codes):
            self.end()  # the other waits for the one that failed
            said = self._said.read_text(errors="replace")
            told = [line for line in said.splitlines() if line.startswith("llmtk-check: ")]
            raise Failure(told[0].removeprefix("llmtk-check: ") if told else f"a process failed:\n{said[-2000:]}")

    def end(self) -> None:
        """End them, if they are not done."""
        for process in self._processes:
            process.terminate()
        until = time.monotonic() + ENDING
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            process.kill()  # its handler of signals waits for the end of a step, which may never come
            process.wait()
