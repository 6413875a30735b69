"""llmtk beside other toolkits: the same weights, tokenizer, rows and order, turn about, each in a fresh process.

    python tests/benchmarks/peers.py [--jobs sft dpo kto] [--peers trl llamafactory] [--rounds 2] [--steps 4]
                                     [--checkpointing [both]] [--float32] [--best] [--data FOLDER]

The model has the shape of SmolLM2-135M with random weights; all sides compute in bfloat16 (autocast) with AdamW. Each
peer gets a virtual environment of its own, .venv-PEER, made on the first call; one that cannot be had is left out.

Printed: the median seconds of a step, real tokens a second, peak memory until the end of the last step, and llmtk's
ratios to each peer. Seconds are of whole steps with llmtk, without reading the batch with the others. All sides must
have read the same tokens, and their losses of the first steps and gradient norm of the first must agree: to 1e-2 in
bfloat16, 1e-4 in float32. The exit code is 1 where they do not. Of kto the first step alone is compared, as each side
estimates its KL on other mismatched answers; there its loss is 0.5 whatever the answers are, and the norm tells.

With --best the peers take the settings that suit them best, and llmtk its defaults: sides/with_PEER.py lists what was
tried. The rows are those of alpaca_en_demo.json, dpo_en_demo.json and kto_en_demo.json; where the folder is absent, the
benchmark says so and ends.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sides.job import ROWS, Job, Result

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FIRST = {"sft": 2, "dpo": 2, "kto": 1}
"""Steps whose losses are compared, by stage: later ones amplify the rounding of all before."""


@dataclass(frozen=True)
class Peer:
    """Another toolkit, and what its environment is made of."""

    title: str
    requirements: tuple[str, ...]
    bare: tuple[str, ...] = ()
    """Installed without what they ask for."""
    stubs: tuple[str, ...] = ()
    """Modules that it imports and does not use here: empty files."""


PEERS = {
    "trl": Peer("TRL 1.16.0", ("torch==2.13.0", "transformers==5.23.0", "trl==1.16.0")),
    # It asks for what its web page, server and pictures need, too, and for torchaudio, which no CPU build of torch
    # goes with. Its text training imports nothing of that but torchaudio, for a function that reads sound files.
    "llamafactory": Peer(
        "LLaMA-Factory 0.9.5",
        (
            *("torch==2.13.0", "transformers==5.6.0", "accelerate==1.11.0", "peft==0.18.1", "trl==0.24.0"),
            *("datasets==4.0.0", "omegaconf==2.4.0", "pillow==13.0.0"),
        ),
        bare=("llamafactory==0.9.5",),
        stubs=("torchaudio",),
    ),
}


@dataclass(frozen=True)
class Compared:
    """A peer beside llmtk in one job: ratios of speed (higher is better for llmtk) and memory (lower is), distance."""

    job: Job
    peer: str
    speed: float
    memory: float
    distance: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether both trained alike."""
        return self.distance <= self.allowed


def main() -> None:
    """Measure the jobs asked for, print a table for each, and one of all ratios."""
    options = arguments()
    if options.steps < 2:
        sys.exit("--steps: the first warms up and is not counted, so take at least 2")
    pythons = {peer: python for peer in options.peers if (python := environment(peer)) is not None}
    if not pythons or not options.data.is_dir():
        print(f"nothing to compare: {options.data} is absent, name another by --data" if pythons else "no peer")
        return
    pythons["llmtk"] = sys.executable
    checkpointing = {"off": [False], "on": [True], "both": [False, True]}[options.checkpointing]
    compared: list[Compared] = []
    for stage in options.jobs:
        with tempfile.TemporaryDirectory() as name:
            tokens = workload(stage, options.steps, options.data, Path(name))
            for on in checkpointing:
                job = Job(stage, options.steps, options.float32, on, options.best)
                compared += compare(job, pythons, tokens, options.rounds, Path(name))
    print_ratios(compared)
    if not all(one.agrees for one in compared):
        sys.exit("the sides did not train alike: see the table")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jobs", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first warms up and is not counted")
    parser.add_argument(
        "--checkpointing",
        nargs="?",
        choices=["off", "on", "both"],
        default="off",
        const="on",
        help="gradient checkpointing on all sides; both: first without, then with it",
    )
    parser.add_argument("--float32", action="store_true", help="compute in float32 on all sides")
    parser.add_argument("--best", action="store_true", help="the peers' best settings")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    return parser.parse_args()


def environment(name: str) -> str | None:
    """Return the Python of a peer's environment, made if it is not there; None where it cannot be made."""
    peer, folder = PEERS[name], ROOT / f".venv-{name}"
    python = folder / "bin" / "python"
    if (folder / ".made").exists():
        return str(python)
    print(f"Making an environment for {peer.title}; this takes some minutes", flush=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([*pip, *peer.requirements], check=True)
        if peer.bare:
            subprocess.run([*pip, "--no-deps", *peer.bare], check=True)
    except subprocess.CalledProcessError as error:
        print(f"{peer.title} cannot be had here, and is left out: {error}")
        return None
    (packages,) = folder.glob("lib/python*/site-packages")
    for stub in peer.stubs:
        (packages / f"{stub}.py").write_text(f'"""Empty: {peer.title} imports it, and text needs nothing of it."""\n')
    (folder / ".made").touch()
    return str(python)


def workload(stage: str, steps: int, data: Path, folder: Path) -> list[list[int]]:
    """Write the model and the rows of a stage into the folder; return the tokens of every sequence, sorted."""
    from sides.workload import prepare

    return prepare(stage, steps, data, folder)


def compare(job: Job, pythons: dict[str, str], tokens: list[list[int]], rounds: int, folder: Path) -> list[Compared]:
    """Run all sides of a job turn about, print its table, and return each peer beside llmtk."""
    results: dict[str, list[Result]] = {side: [] for side in pythons}
    for _ in range(rounds):
        for side, python in pythons.items():
            results[side].append(measure(python, side, job, folder))
            if results[side][-1].read != tokens:
                sys.exit(f"{job.stage}: {side} has read other tokens than those of the rows")
    medians = {side: statistics.median(s for run in runs for s in run.seconds[1:]) for side, runs in results.items()}
    memory = {side: statistics.median(run.gib for run in runs) for side, runs in results.items()}
    print_job(job, results, medians, memory, sum(map(len, tokens)) / job.steps)
    ours, allowed = results["llmtk"][-1], 1e-4 if job.float32 else 1e-2
    return [
        Compared(
            job,
            side,
            speed=medians[side] / medians["llmtk"],
            memory=memory["llmtk"] / memory[side],
            distance=distance(ours, runs[-1], FIRST[job.stage]),
            allowed=allowed,
        )
        for side, runs in results.items()
        if side != "llmtk"
    ]


def measure(python: str, side: str, job: Job, folder: Path) -> Result:
    """Run one side in a fresh process."""
    job.write(folder)
    # No GPU and no hub, and a cache of data sets that goes with the folder.
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    command = [python, "-m", f"sides.with_{side}", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE)
    shutil.rmtree(folder / "output", ignore_errors=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = Result.load(folder)
    seconds = " ".join(f"{second:.2f}" for second in result.seconds)
    print(f"{job.stage}, {job.setting}: {side:12} {seconds} s, {result.gib:.1f} GiB", flush=True)
    return result


def distance(ours: Result, theirs: Result, steps: int) -> float:
    """Return the largest relative difference of the first steps' losses, and of the first step's gradient norm."""
    pairs = zip([*ours.losses[:steps], ours.norms[0]], [*theirs.losses[:steps], theirs.norms[0]], strict=True)
    return max(abs(our - their) / abs(their) for our, their in pairs)


def print_job(
    job: Job, results: dict[str, list[Result]], medians: dict[str, float], memory: dict[str, float], tokens: float
) -> None:
    """Print a job's table; `tokens` are the real ones of a step. The first step, which warms up, is in no median."""
    print(f"\n{job.stage}, {job.setting}: {job.rows} rows a step, {tokens:.0f} real tokens")
    for side in results:
        speed = tokens / medians[side]
        print(f"  {side:12} {medians[side]:7.2f} s a step  {speed:7.0f} tokens/s  {memory[side]:5.1f} GiB")
    for side, runs in results.items():
        losses = " ".join(f"{loss:.5f}" for loss in runs[-1].losses)
        print(f"  losses {side:12} {losses}   first gradient norm {runs[-1].norms[0]:.5f}")
    print(flush=True)


def print_ratios(compared: Sequence[Compared]) -> None:
    """Print how llmtk stands to each peer in each job."""
    print("llmtk beside its peers: steps in the same time, peak memory, largest difference of losses and gradient norm")
    print(f"{'':36} {'steps':>8} {'memory':>8}   difference")
    for one in compared:
        said = "within" if one.agrees else "NOT WITHIN"
        ratios = f"{one.speed:7.2f}x {one.memory:7.2f}x"
        named = f"{one.job.stage}, {one.job.setting}"
        print(f"{named:23} {one.peer:12} {ratios}   {one.distance:.1e}, {said} {one.allowed:.0e}")


if __name__ == "__main__":
    main()
