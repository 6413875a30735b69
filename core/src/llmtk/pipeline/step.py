"""A step's own process: `llmtk run`, which stops when the pipeline that started it is gone.

    python -m llmtk.pipeline.step LOCK WORDS...

The pipeline holds the file LOCK for as long as it lives. Whoever gets it knows that the pipeline was killed, and asks
its run to stop: the run writes a checkpoint, and holds LOCK until it has ended, so that a pipeline that goes on waits.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading

from llmtk.cli import main


def _stop_with(lock: str) -> None:
    with open(lock) as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait()


if __name__ == "__main__":
    threading.Thread(target=_stop_with, args=[sys.argv[1]], daemon=True).start()
    main(["run", *sys.argv[2:]])
