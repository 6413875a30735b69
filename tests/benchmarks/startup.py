"""How long `llmtk list-stages` and `llmtk --help` take, beside Python, click and a scan of the entry points alone.

The two are run turn about, so that whatever else the machine does falls on both. Prints medians and their ratio, which
should stay at or under 1.5.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

RUNS = 15
LEAST = [sys.executable, "-c", "import click, importlib.metadata; importlib.metadata.entry_points()"]
COMMANDS = {name: [sys.executable, "-m", "llmtk", name] for name in ("list-stages", "--help")}


def main() -> None:
    for name, command in COMMANDS.items():
        taken: dict[str, list[float]] = {"least": [], "llmtk": []}
        for _ in range(RUNS):
            taken["least"].append(seconds(LEAST))
            taken["llmtk"].append(seconds(command))
        least, ours = statistics.median(taken["least"]), statistics.median(taken["llmtk"])
        print(f"llmtk {name}: {ours * 1000:.0f} ms, least possible {least * 1000:.0f} ms, ratio {ours / least:.2f}")


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
