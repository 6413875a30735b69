"""Functions that hang, die, print and read: each against a real process, which is looked for afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from llmtk_rl import reward_process
from llmtk_rl.rewards import Rewards, Sample

from llmtk import ConfigurationError, TrainingError

MakeRewards = Callable[..., Rewards]
MakeSamples = Callable[..., list[Sample]]
SLEEP = "import time\ndef score(completions): return [time.sleep(60 * (c == 'hang')) or len(c) for c in completions]"
# Exponential in the length, and inside C with the GIL held: no signal handler and no thread of Python's gets a turn.
REGEX = "import re\ndef score(completions): return [float(bool(re.match('(a+)+$', c))) for c in completions]"
CATASTROPHE = "a" * 40 + "b"

proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes under /proc")


def state(pid: int | str) -> list[str]:
    """Return what the system knows of a process, its state and its parent first; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def children(parent: int) -> list[int]:
    """Return the reward processes that a process has started."""
    commands = {entry.parent.name: entry.read_bytes() for entry in Path("/proc").glob("[0-9]*/cmdline")}
    started = [pid for pid, command in commands.items() if b"reward_process" in command]
    return [int(pid) for pid in started if state(pid)[1:2] == [str(parent)]]


def alive(pid: int) -> bool:
    """Tell whether a process runs; one that has ended, and that nobody has asked after, does not."""
    return state(pid)[:1] not in ([], ["Z"])


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@proc
@pytest.mark.parametrize(("source", "bad"), [(SLEEP, "hang"), (REGEX, CATASTROPHE)], ids=["sleep", "regex"])
def test_a_hang_is_ended_and_its_row_named(
    of_file: MakeRewards, samples: MakeSamples, source: str, bad: str, capfd: pytest.CaptureFixture[str]
) -> None:
    rewards = of_file(source, timeout=0.4)
    good = rewards(samples("aaa")).item()
    before = children(os.getpid())
    with pytest.raises(TrainingError, match=r"^rows.jsonl:2: the reward score .* did not return within 0\.4 s"):
        rewards(samples("aaa", bad, "aaa"))
    assert not any(map(alive, before))
    assert "reward.py" in capfd.readouterr().err, "it says where it hangs"
    assert rewards(samples("aaa")).item() == good


def test_rows_that_hang_are_left_out_and_a_function_that_always_hangs_is_not_waited_for(
    of_file: MakeRewards, samples: MakeSamples
) -> None:
    rewards = of_file(SLEEP, on_error="drop", timeout=0.5)
    found = rewards(samples("aaa", "hang", "a"))
    assert found.isnan().flatten().tolist() == [False, True, False]
    assert found[0].item() == 3
    assert len(rewards.left_out) == 1
    began = time.monotonic()
    assert rewards(samples(*["hang"] * 50)).isnan().all()
    assert time.monotonic() - began < 10
    assert len(rewards.left_out) == 50


@proc
def test_what_a_function_started_ends_with_it(of_file: MakeRewards, samples: MakeSamples, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    rewards = of_file(
        f"""
        import pathlib, subprocess
        def score(completions):
            child = subprocess.Popen(["sleep", "60"])
            pathlib.Path({str(file)!r}).write_text(str(child.pid))
            child.wait()
        """,
        timeout=0.4,
    )
    with pytest.raises(TrainingError, match="did not return"):
        rewards(samples("a"))
    wait_until(lambda: not alive(int(file.read_text())))


def test_a_process_that_cannot_end_itself_is_killed(
    of_file: MakeRewards, samples: MakeSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped, as by a debugger, its own watchdog does not run either."""
    monkeypatch.setattr(reward_process, "GRACE", 0.3)
    stops = "import os, signal\ndef score(completions):\n    os.kill(os.getpid(), signal.SIGSTOP)"
    with pytest.raises(TrainingError, match=r"did not return within 0\.2 s"):
        of_file(stops, timeout=0.2)(samples("a"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("os._exit(3)", r"ended its process \(exit code 3\)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", r"ended its process \(SIGSEGV\)"),
        ("sys.exit('bye')", r"raised SystemExit: bye \(reward.py, line 3\)"),
    ],
)
def test_a_function_that_ends_its_process_is_named(
    of_file: MakeRewards, samples: MakeSamples, body: str, words: str
) -> None:
    rewards = of_file(f"import os, signal, sys\ndef score(completions):\n    {body}")
    with pytest.raises(TrainingError, match=words):
        rewards(samples("a"))


def test_what_it_prints_reaches_stderr_and_it_has_nothing_to_read(
    of_file: MakeRewards, samples: MakeSamples, capfd: pytest.CaptureFixture[str]
) -> None:
    rewards = of_file(
        """
        import os, subprocess, sys
        print("on import")
        def score(completions):
            print("printed")
            os.write(1, b"written\\n")
            subprocess.run(["echo", "echoed"])
            return [len(sys.stdin.read() + os.read(0, 10).decode())] * len(completions)
        """
    )
    assert rewards(samples("a", "b")).flatten().tolist() == [0, 0]
    out, err = capfd.readouterr()
    assert not out
    assert err.split() == ["on", "import", "printed", "written", "echoed"]


def test_an_interrupted_call_does_not_answer_the_next(of_file: MakeRewards, samples: MakeSamples) -> None:
    rewards = of_file("import time\ndef score(completions):\n    time.sleep(float(completions[0]))\n    return [1]")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            rewards(samples("0.5"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rewards(samples("0")).item() == 1


def test_a_file_that_hangs_on_import_is_an_error(of_file: MakeRewards, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_process, "LOAD_SECONDS", 0.4)
    with pytest.raises(ConfigurationError, match=r"reward.py:score\): did not return within 0\.4 s"):
        of_file("import time\ntime.sleep(60)\ndef score(completions): ...")


@proc
def test_closing_ends_all_and_lets_functions_clean_up(
    of_file: MakeRewards, samples: MakeSamples, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rewards = of_file("import atexit\natexit.register(print, 'cleaned')\ndef score(completions): return [1]")
    rewards(samples("a"))
    before = children(os.getpid())
    assert before
    rewards.close()
    rewards.close()
    assert not any(map(alive, before))
    assert capfd.readouterr().err == "cleaned\n"


@proc
def test_a_killed_parent_leaves_no_process_behind(tmp_path: Path) -> None:
    """One that waits, one in a call of Python's, and one in C, whose own watchdog ends it when its time is up."""
    (tmp_path / "sleeps.py").write_text(SLEEP)
    (tmp_path / "matches.py").write_text(REGEX)
    program = f"""
import sys, threading
sys.path[:] = {sys.path!r}
from llmtk_rl.rewards import Rewards, Sample
idle, sleeps, matches = (
    Rewards([{{"file": f"{tmp_path}/{{name}}.py", "function": "score", "timeout": timeout}}], section="grpo")
    for name, timeout in (("sleeps", 60), ("sleeps", 60), ("matches", 1))
)
for rewards, completion in ((sleeps, "hang"), (matches, {CATASTROPHE!r})):
    threading.Thread(target=rewards, args=[[Sample("", completion, [], [], {{}}, "row 1")]]).start()
print("called", flush=True)
"""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"called\n"
        time.sleep(0.3)
        processes = children(parent.pid)
        parent.send_signal(signal.SIGKILL)
    assert len(processes) == 3
    wait_until(lambda: not any(map(alive, processes)))
