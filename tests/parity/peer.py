"""TRL 1.16.0 on the other side of a comparison: a script here runs again in TRL's environment, and answers there."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from peers import environment  # the benchmarks' folder is no package

WORKER = "--worker"


def ask(script: str, question: Any) -> Any:
    """Return what a script's worker answers to a question, both JSON. Ends the process, saying why, without TRL.

    The environment is the benchmarks', .venv-trl, which is made on the first call.
    """
    python = environment("trl")
    if python is None:
        print("skipped: TRL 1.16.0 is absent and could not be installed")
        sys.exit()
    done = subprocess.run([python, script, WORKER], input=json.dumps(question), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"TRL failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def answered(answer: Callable[[Any], Any]) -> bool:
    """Answer the question on stdin if this process is the worker; say whether it is."""
    if sys.argv[1:] != [WORKER]:
        return False
    print(json.dumps(answer(json.load(sys.stdin))))
    return True


def difference(ours: Any, theirs: Any) -> float:
    """Return how far numbers, or lists or tables of them, are apart, relative to their size where that is over 1."""
    if isinstance(ours, dict):
        return max(difference(ours[name], theirs[name]) for name in ours)
    if isinstance(ours, list):
        return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    apart = float(abs(ours - theirs) / max(1.0, abs(theirs)))
    return math.inf if math.isnan(apart) else apart
