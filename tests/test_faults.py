"""Runs that are killed, at any moment, and go on as if nothing had happened; and runs that are asked to stop."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llmtk_pref import demo_rows
from llmtk_stage_sft import SupervisedFineTuning

from llmtk import ConfigurationError, Run
from llmtk.config.reading import to_yaml
from llmtk.demo import addition
from llmtk.training import checkpoints

NURSERY = Path(__file__).with_name("nursery.py")
LIMIT = 120
TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "attention_dropout": 0.1,
}
TRAIN = {
    "max_steps": 14,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "bf16": False,
    "logging_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 5,
    "save_steps": 3,
    "save_total_limit": 2,
    "load_best_model_at_end": True,
}
KILLED = signal.SIGKILL.value
NOT_COMPARED = ("timings.jsonl", "run.log", ".lock", "manifest.json", "loss.png", "config.yaml")
"""Files of a run with times, paths or process ids in them."""


class Nursery:
    """A process that forks for each run, and what becomes of the run that is under way."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.runs = 0
        self.child: int | None = None
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["LLMTK_CACHE"] = str(logs / "cache")
        self.process = subprocess.Popen(
            [sys.executable, str(NURSERY)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        assert self._line(LIMIT) == "ready"

    def begin(self, log: Path | None = None, **task: Any) -> None:
        """Start a run. One that a failed test has left is ended first."""
        if self.child is not None:
            self.send(signal.SIGKILL)
            self.end()
        self.runs += 1
        self.log = log or self.logs / f"{self.runs}.log"
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"log": str(self.log), **task}) + "\n")
        self.process.stdin.flush()
        self.child = self._number("process", LIMIT)

    def end(self) -> int:
        """Wait for the run, and return its exit status: that of the signal which killed it, or its exit code x 256."""
        status = self._number("status", LIMIT)
        self.child = None
        return status

    def kill_after(self, seconds: float) -> int:
        """Kill the run after this time, if it is still there, and return its exit status."""
        try:
            status = self._number("status", seconds)
        except TimeoutError:
            self.send(signal.SIGKILL)
            return self.end()
        self.child = None
        return status

    def send(self, number: int) -> None:
        """Send the run a signal."""
        assert self.child is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.child, number)

    def wait_for(self, text: str) -> None:
        """Wait until the run has said something."""
        deadline = time.monotonic() + LIMIT
        while not (self.log.exists() and text in self.log.read_text()):
            assert time.monotonic() < deadline, f"the run never said {text!r}:\n{self.said()}"
            time.sleep(0.005)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def finish(self, **run: Any) -> int:
        """Run to the end, and return the number of its operations on files."""
        self.begin(run=run)
        status = self.end()
        assert status == 0, f"exit status {status}:\n{self.said()}"
        return int(self.said().rsplit("operations: ", 1)[1])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(LIMIT)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.strip())

    def _number(self, of: str, seconds: float) -> int:
        what, number = self._line(seconds).split()
        assert what == of
        return int(number)

    def _line(self, seconds: float) -> str:
        try:
            return self._lines.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    nursery = Nursery(tmp_path_factory.mktemp("logs"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def base(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder for adapters to train on."""
    folder = tmp_path_factory.mktemp("base") / "run"
    nursery.finish(**settings("sft", "full", folder, None))
    return folder


def settings(stage: str, method: str, folder: Path, base: Path | None, **more: Any) -> dict[str, Any]:
    """Return a run's settings, as `llmtk.Run` takes them."""
    make = {"pt": addition.texts, "sft": addition.rows, "three-windows": addition.rows}.get(stage, demo_rows)
    model: dict[str, Any] = {"from_config": TINY, "tokenizer": {"kind": "byte"}}
    peft = None
    if method == "lora":
        model = {"name_or_path": str(base)}
        # The others switch dropout off, and refuse one that would have no effect.
        peft = {"r": 4} | ({"lora_dropout": 0.1} if stage in ("pt", "sft", "three-windows") else {})
    return {
        "stage": stage,
        "model": model,
        "peft": peft,
        "data": {"train": make("train", 22), "eval": make("held-out", 6), "max_length": 64},
        "samples": {"count": 2, "max_new_tokens": 4, "temperature": 1.0},
        "train": TRAIN | more,
        "output_dir": str(folder),
    }


def left_by(folder: Path) -> dict[str, Any]:
    """Return all that must not differ between two runs: every file but those of times, and of these the step."""
    files: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_dir() or file.name in (
            "timings.jsonl",
            "run.log",
            ".lock",
            "manifest.json",
            "loss.png",
            "config.yaml",
        ):
            continue
        content: Any = file.read_bytes().replace(str(folder).encode(), b"FOLDER")
        if file.name == "README.md":
            content = content.replace(f"# {folder.name}\n".encode(), b"")
        if file.name == "state.json":
            content = json.loads(content)
            content["records"].pop("timings")
        if file.name == "adapter_config.json":  # peft writes a set of names, in an order of its own
            content = {key: sorted(v) if isinstance(v, list) else v for key, v in json.loads(content).items()}
        files[name] = content
    return files


def check_same(folder: Path, whole: Path) -> None:
    """Compare a run that was killed with one that never was: weights, optimizer, generators, metrics, all bytes."""
    found, wanted = left_by(folder), left_by(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in found if found[name] != wanted[name]] == []
    assert "metrics.jsonl" in found
    assert any(name.endswith("optimizer.safetensors") for name in found)
    for _, path in checkpoints.list_checkpoints(folder / "checkpoints"):
        assert checkpoints.verify(path) is None


def kill_and_resume(nursery: Nursery, run: dict[str, Any], kills: int, seed: str) -> dict[str, int]:
    """Kill runs at drawn moments, resuming each, until so many were killed; compare each that reaches its end.

    Half of the moments are times, drawn over that of a whole run; half are operations on files, most of them of saves.
    """
    draw = random.Random(seed)
    home = Path(run["output_dir"])
    began = time.monotonic()
    operations = nursery.finish(**run | {"output_dir": str(home / "uninterrupted")})
    seconds = time.monotonic() - began
    counts = {"killed": 0, "by time": 0, "in an operation": 0, "finished": 0}
    ended = True
    while counts["killed"] < kills or not ended:
        folder = home / f"killed-{counts['finished']}"
        task = run | {"output_dir": str(folder), "resume": "auto"}
        by_time = counts["killed"] % 2 == 0
        if counts["killed"] >= kills:
            nursery.begin(run=task)
            status = nursery.end()
        elif by_time:
            nursery.begin(run=task)
            status = nursery.kill_after(draw.uniform(0.0, seconds))
        else:
            nursery.begin(run=task, die_at=draw.randint(1, operations))
            status = nursery.end()
        assert status in (0, KILLED), f"exit status {status}:\n{nursery.said()}"
        ended = status == 0
        if ended:
            check_same(folder, home / "uninterrupted")
            counts["finished"] += 1
        else:
            counts["killed"] += 1
            counts["by time" if by_time else "in an operation"] += 1
    return counts


def test_a_killed_run_goes_on_bit_by_bit(nursery: Nursery, tmp_path: Path) -> None:
    counts = kill_and_resume(nursery, settings("sft", "full", tmp_path, None), kills=2, seed="a few")
    assert counts["by time"] == counts["in an operation"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("stage", ["pt", "sft"])
def test_twenty_kills(nursery: Nursery, tmp_path: Path, base: Path, stage: str, method: str) -> None:
    counts = kill_and_resume(nursery, settings(stage, method, tmp_path, base), kills=20, seed=f"{stage} {method}")
    print(stage, method, counts)
    assert counts["killed"] == 20


def test_a_run_killed_inside_a_round_goes_on(nursery: Nursery, tmp_path: Path) -> None:
    """Saves fall on every place in a round of three windows, and so do the resumptions."""
    run = settings("three-windows", "full", tmp_path, None, save_steps=1, save_total_limit=4)
    nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    for step in (4, 8, 12):
        nursery.begin(run=run | {"output_dir": str(tmp_path / "killed"), "resume": "auto"})
        nursery.wait_for(f"step {step}/14")
        nursery.send(signal.SIGKILL)
        assert nursery.end() == KILLED
    nursery.finish(**run | {"output_dir": str(tmp_path / "killed"), "resume": "auto"})
    check_same(tmp_path / "killed", tmp_path / "uninterrupted")


PREFERENCES = [
    ("dpo", "full"),
    ("dpo", "lora"),
    ("dpo", "precomputed"),
    ("dpo", "moving"),
    ("ipo", "full"),
    ("kto", "full"),
    ("kto", "lora"),
    ("cpo", "full"),
    ("simpo", "full"),
    ("orpo", "full"),
    ("rm", "full"),
]


def preference_settings(stage: str, method: str, folder: Path, base: Path | None) -> dict[str, Any]:
    """Return a run's settings on pairs, whose reference is kept in the way that the method names."""
    more = {"precompute_reference": True} if method == "precomputed" else {}
    run = settings(stage, method, folder, base, **more)
    if method == "moving":
        run[stage] = {"sync_ref_model": True, "ref_model_sync_steps": 3}
    if stage == "rm":
        del run["samples"]  # it answers nothing
    return run


def test_a_killed_run_on_preferences_goes_on_bit_by_bit(nursery: Nursery, tmp_path: Path) -> None:
    counts = kill_and_resume(nursery, preference_settings("kto", "full", tmp_path, None), kills=2, seed="a few")
    assert counts["by time"] == counts["in an operation"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "method"), PREFERENCES)
def test_ten_kills_of_runs_on_preferences(
    nursery: Nursery, tmp_path: Path, base: Path, stage: str, method: str
) -> None:
    run = preference_settings(stage, method, tmp_path, base)
    assert kill_and_resume(nursery, run, kills=10, seed=f"{stage} {method}")["killed"] == 10


@pytest.mark.slow
def test_twenty_kills_of_rounds_with_several_windows(nursery: Nursery, tmp_path: Path) -> None:
    run = settings("three-windows", "full", tmp_path, None, save_steps=1)
    assert kill_and_resume(nursery, run, kills=20, seed="rounds")["killed"] == 20


# Rounds that are written


REWARDS = Path(__file__).with_name("rewards.py")
ROUNDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "grpo": ("grpo", "full", {"beta": 0.1}),
    "grpo with an adapter": ("grpo", "lora", {"beta": 0.1}),
    "grpo that draws more": ("grpo", "full", {"dynamic_sampling": True, "rewards": "half"}),
    "rloo": ("rloo", "full", {"beta": 0.1}),
    "ppo": ("ppo", "full", {"kl_control": "adaptive"}),
}


def reinforcement_settings(kind: str, folder: Path, base: Path | None) -> dict[str, Any]:
    """Return the settings of a run whose rounds have two passes over two mini-batches: saves fall between them."""
    stage, method, options = ROUNDS[kind]
    run = settings("sft", method, folder, base)
    prompts = [{"prompt": f"{'why ' * (i % 4)}{i}?"} for i in range(22)]
    rewards = [{"file": str(REWARDS), "function": options.get("rewards", "graded")}]
    usual = {"num_generations": 3, "max_completion_length": 6, "num_iterations": 2, "mini_batches": 2}
    data = {"train": prompts[4:], "eval": prompts[:4], "max_length": 64}
    peft = run["peft"] and {"r": 4}  # without the dropout that a run of sft has
    return run | {"stage": stage, "data": data, "peft": peft, stage: {**usual, **options, "rewards": rewards}}


def test_a_run_killed_in_the_midst_of_its_rounds_goes_on_bit_by_bit(nursery: Nursery, tmp_path: Path) -> None:
    """While a token is drawn, completions are rewarded or scored, and between the windows of a round."""
    run = reinforcement_settings("grpo", tmp_path, None)
    nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    run |= {"output_dir": str(tmp_path / "killed"), "resume": "auto"}
    for moment in (["generation", 20], ["windows", 7], ["rewards", 2], ["scoring", 3], ["windows", 2]):
        nursery.begin(run=run, die_in=moment)
        assert nursery.end() == KILLED, nursery.said()
    nursery.finish(**run)
    check_same(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ROUNDS)
def test_ten_kills_of_runs_that_write(nursery: Nursery, tmp_path: Path, base: Path, kind: str) -> None:
    run = reinforcement_settings(kind, tmp_path, base)
    assert kill_and_resume(nursery, run, kills=10, seed=kind)["killed"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["generation", "rewards", "scoring", "windows"])
def test_kills_at_every_few_moments_of_a_round(nursery: Nursery, tmp_path: Path, moment: str) -> None:
    run = reinforcement_settings("grpo", tmp_path, None)
    nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    for at in range(1, 200, 37 if moment == "generation" else 3):
        killed = run | {"output_dir": str(tmp_path / f"killed-{at}"), "resume": "auto"}
        nursery.begin(run=killed, die_in=[moment, at])
        if nursery.end() != KILLED:
            return
        nursery.finish(**killed)
        check_same(tmp_path / f"killed-{at}", tmp_path / "uninterrupted")


def kill_at(nursery: Nursery, run: dict[str, Any], operations: Iterator[int] | range) -> int:
    """Kill a new run at each of these operations on files, and let it finish. Return the number of kills."""
    home = Path(run["output_dir"])
    killed = 0
    for operation in operations:
        folder = str(home / f"killed-{operation}")
        nursery.begin(run=run | {"output_dir": folder}, die_at=operation)
        if nursery.end() != KILLED:
            continue
        killed += 1
        nursery.finish(**run | {"output_dir": folder, "resume": "auto"})
        check_same(Path(folder), home / "uninterrupted")
    return killed


SAVING = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "eval_steps": 2, "logging_steps": 1}


def test_kills_at_some_operations_on_files(nursery: Nursery, tmp_path: Path) -> None:
    run = settings("sft", "full", tmp_path, None, **SAVING)
    operations = nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    assert kill_at(nursery, run, range(3, operations, 29)) >= 3


def test_a_run_killed_again_and_again_while_it_resumes_goes_on(nursery: Nursery, tmp_path: Path) -> None:
    """At each of the first operations on files: the lock, the configuration, run.json, the checkpoint."""
    run = settings("sft", "full", tmp_path, None, **SAVING)
    nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    run |= {"output_dir": str(tmp_path / "killed"), "resume": "auto"}
    nursery.begin(run=run)
    nursery.wait_for("step 3/4")
    nursery.send(signal.SIGKILL)
    assert nursery.end() == KILLED
    for operation in range(1, 16):
        nursery.begin(run=run, die_at=operation)
        assert nursery.end() == KILLED
    nursery.finish(**run)
    check_same(tmp_path / "killed", tmp_path / "uninterrupted")


@pytest.mark.slow
def test_kills_at_every_operation_on_files(nursery: Nursery, tmp_path: Path) -> None:
    run = settings("sft", "full", tmp_path, None, **SAVING)
    operations = nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    assert kill_at(nursery, run, range(1, operations + 1)) == operations


# Asked to stop


@pytest.fixture(scope="module")
def long_run(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A configuration file of a run that takes a while, and the folder of that run, never stopped."""
    home = tmp_path_factory.mktemp("long")
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in addition.rows("train", 40)))
    run = settings("sft", "full", home, None, max_steps=200, logging_steps=1, eval_steps=50, save_steps=40)
    run["data"] = {"train": str(rows), "eval": 0.2, "max_length": 64}
    del run["peft"], run["output_dir"]
    config = home / "config.yaml"
    config.write_text(to_yaml(run))
    nursery.begin(words=["run", str(config), f"output_dir={home / 'uninterrupted'}"])
    assert nursery.end() == 0, nursery.said()
    return config, home / "uninterrupted"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_command_with_a_checkpoint(
    nursery: Nursery, long_run: tuple[Path, Path], tmp_path: Path, number: signal.Signals
) -> None:
    config, whole = long_run
    words = ["run", str(config), f"output_dir={tmp_path / 'run'}"]
    nursery.begin(words=words)
    nursery.wait_for("step 7/200")
    nursery.send(number)
    assert nursery.end() == 256, "exit code 1"
    assert f"{number.name}: finishing the step, then a checkpoint" in nursery.said()
    assert f"error: {number.name} stopped the run after step" in nursery.said()
    step, path = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert 7 <= step < 200
    assert checkpoints.verify(path) is None
    assert f"llmtk run sft output_dir={tmp_path / 'run'} --resume auto" in nursery.said()

    nursery.begin(words=["run", "sft", f"output_dir={tmp_path / 'run'}", "--resume", "auto"])
    assert nursery.end() == 0, nursery.said()
    check_same_result(tmp_path / "run", whole)


def check_same_result(folder: Path, whole: Path) -> None:
    """Compare what is trained; a run that a signal stopped has one checkpoint more."""
    for name in ("metrics.jsonl", "samples.jsonl", "model.safetensors"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name
    last = [checkpoints.list_checkpoints(run / "checkpoints")[-1] for run in (folder, whole)]
    assert last[0][0] == last[1][0]
    for name in ("weights.safetensors", "optimizer.safetensors", "rank-0.safetensors", "rank-0.json"):
        assert (last[0][1] / name).read_bytes() == (last[1][1] / name).read_bytes(), name


def test_the_command_as_a_user_starts_it(long_run: tuple[Path, Path], tmp_path: Path) -> None:
    """A process of its own, from Python's start to the signal."""
    config, _ = long_run
    command = [sys.executable, "-m", "llmtk", "run", str(config), f"output_dir={tmp_path / 'run'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        watchdog = threading.Timer(LIMIT, process.kill)
        watchdog.start()
        assert process.stdout is not None
        assert any(line.startswith("step 3/") for line in process.stdout)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        watchdog.cancel()
    assert process.returncode == 1
    assert "error: SIGINT stopped the run after step" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("moment", "number", "status"),
    [
        ("reading", signal.SIGTERM, signal.SIGTERM.value),
        ("loading", signal.SIGTERM, signal.SIGTERM.value),
        ("loading", signal.SIGINT, 130 * 256),
        ("opening", signal.SIGTERM, signal.SIGTERM.value),
    ],
)
def test_a_signal_while_a_run_is_set_up_ends_it_at_once_and_leaves_nothing(
    nursery: Nursery, long_run: tuple[Path, Path], tmp_path: Path, moment: str, number: signal.Signals, status: int
) -> None:
    """A shell tells 143 for SIGTERM. The same command starts the run afterwards."""
    config, _ = long_run
    words = ["run", str(config), f"output_dir={tmp_path / 'run'}", "train.max_steps=1"]
    nursery.begin(words=words, signal_in=[moment, 1, number])
    assert nursery.end() == status, nursery.said()
    assert "Traceback" not in nursery.said()
    assert [file.name for file in (tmp_path / "run").glob("*")] == ([".lock"] if moment == "opening" else [])
    if moment == "opening":
        nursery.begin(words=words)
        assert nursery.end() == 0, nursery.said()


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_the_run_at_once(
    nursery: Nursery, tmp_path: Path, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    run = settings("pausing", "full", tmp_path / "run", None)
    nursery.begin(run=run, pause_at=7)
    nursery.wait_for("in the midst of a step")
    nursery.send(numbers[0])
    nursery.wait_for("finishing the step")
    began = time.monotonic()
    nursery.send(numbers[1])
    assert nursery.end() == numbers[1].value
    assert time.monotonic() - began < 5, "it did not wait for the step's end"
    assert checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1][0] == 6, "the last checkpoint stands"

    nursery.finish(**run | {"resume": "auto"})
    nursery.finish(**run | {"output_dir": str(tmp_path / "uninterrupted")})
    check_same(tmp_path / "run", tmp_path / "uninterrupted")


def test_a_second_process_on_one_folder_is_refused_with_the_owner(nursery: Nursery, tmp_path: Path) -> None:
    run = settings("pausing", "full", tmp_path / "run", None)

    class Same(SupervisedFineTuning):
        name = "pausing"

    nursery.begin(run=run, pause_at=4)
    nursery.wait_for("in the midst of a step")
    with pytest.raises(ConfigurationError, match=f"is in use by process {nursery.child}"):
        Run(**run | {"stage": Same, "resume": "auto"}).train()
    nursery.send(signal.SIGKILL)
    assert nursery.end() == KILLED
    assert checkpoints.verify(checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1][1]) is None


def test_a_signal_in_the_midst_of_a_line_stops_the_run_too(nursery: Nursery, tmp_path: Path) -> None:
    """Whoever reads the lines is slow, as a pager is: the run waits inside a print when the signal comes."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with contextlib.suppress(AttributeError, OSError):
        import fcntl

        fcntl.fcntl(reader, fcntl.F_SETPIPE_SZ, 4096)
    run = settings("sft", "full", tmp_path / "run", None, max_steps=3000, logging_steps=1, eval_steps=3000)
    nursery.begin(log=pipe, run=run | {"train": run["train"] | {"save_steps": 3000}})
    _wait_until_full(tmp_path / "run" / "metrics.jsonl")
    nursery.send(signal.SIGTERM)
    time.sleep(0.3)
    os.set_blocking(reader, True)
    told = b""
    while part := os.read(reader, 65536):
        told += part
    os.close(reader)
    assert nursery.end() == 256
    assert b"SIGTERM stopped the run after step" in told
    assert b"reentrant" not in told


def _wait_until_full(file: Path) -> None:
    """Wait until the run writes no more metrics."""
    size, deadline = -1, time.monotonic() + LIMIT
    while not file.exists() or file.stat().st_size != size:
        assert time.monotonic() < deadline
        size = file.stat().st_size if file.exists() else -1
        time.sleep(0.5)
