"""The commands of docs/story.md run as they stand, one after the other, with few rows and few steps."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import runpy
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from llmtk.cli import call
from llmtk.folder import RunFolder
from llmtk.inference import serving
from llmtk.pipeline import Pipeline
from llmtk.ports import LOCAL, free_port

PAGE = (Path(__file__).parents[1] / "docs" / "story.md").read_text()
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
COMMANDS = [
    shlex.split(found, comments=True) for found in re.findall(r"^    ((?:llmtk|python) .+)$", PAGE, re.MULTILINE)
]  # but for those that install
FEW = ("train.max_steps=2", "train.per_device_train_batch_size=4", "train.logging_steps=1")
SAID = "37+48=\n/quit\n"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the files of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, text in FILES.items():
        Path(name).write_text(text)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def shortened(words: list[str]) -> list[str]:
    return [*words, *FEW] if words[1] == "pipeline" else words


def keep_few_rows() -> None:
    for file in Path().glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:16]))


def test_the_page_has_what_is_tested() -> None:
    assert set(FILES) == {"data.py", "story.yaml", "ask.py", "client.py"}
    asked = [words[1] for words in COMMANDS]
    assert asked.count("pipeline") == 4
    assert set(asked) >= {
        "data.py",
        "ask.py",
        "predict",
        "chat",
        "serve",
        "client.py",
        "report",
        "export",
        "evaluate",
        "runs",
    }


@pytest.mark.slow
def test_commands_of_the_page_run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """In this process, the steps of the pipeline too; but for the server, which needs one of its own."""
    monkeypatch.setattr(
        Pipeline, "_wait", lambda _, words: call(["run", *words[words.index("llmtk.pipeline.step") + 2 :]])
    )
    for words in COMMANDS:
        if words[1] in ("serve", "client.py"):
            continue
        if words[0] == "python":
            runpy.run_path(words[1])
            keep_few_rows()
            continue
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(SAID.encode())))
        assert call(shortened(words)[1:]) == 0, f"{words}: {capfd.readouterr().err}"
    check_what_is_left()


@pytest.mark.slow
def test_the_story_is_killed_in_the_middle_and_goes_on() -> None:
    """Each command and each step in a process of its own, the chats in a pseudo-terminal."""
    pipelines, server = 0, None
    port = str(free_port())
    Path("client.py").write_text(FILES["client.py"].replace("8010", port))
    for words in COMMANDS:
        command = [sys.executable, *(["-m"] if words[0] == "llmtk" else []), *shortened(words)[words[0] == "python" :]]
        pipelines += words[1:] == ["pipeline", "story.yaml"]
        if words[1:] == ["pipeline", "story.yaml"] and pipelines == 1:
            killed_in_the_middle([*command, "steps.rm.train.max_steps=100000", "steps.rm.train.save_steps=1"])
            continue
        if words[1] == "serve":
            server = served([port if word == "8010" else word for word in command], int(port))
            continue
        if words[1] == "client.py" and server is None:
            continue
        done = in_a_terminal(command) if words[1] == "chat" else subprocess.run(command, check=False).returncode
        assert done == 0, words
        if words[1] == "data.py":
            keep_few_rows()
        if words[1] == "client.py" and server is not None:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 128 + signal.SIGTERM
    check_what_is_left()


def served(command: list[str], port: int) -> subprocess.Popen[bytes] | None:
    """Start a server, and wait until it answers; None where what it needs is not installed."""
    if any(find_spec(name) is None for name in serving.NEEDED["transformers"][0]):
        return None
    server = subprocess.Popen(command)
    serving.wait_for(server, LOCAL, port)
    return server


def killed_in_the_middle(command: list[str]) -> None:
    """Start the pipeline, and kill it, as the mains switch would, when the reward model is being trained."""
    process = subprocess.Popen(command)
    checkpoints = Path("runs/story/rm/checkpoints")
    assert until(lambda: any(checkpoints.glob("checkpoint-*")) or process.poll() is not None, seconds=300)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not Path("runs/story/ppo").exists()


def until(done: Callable[[], bool], seconds: float) -> bool:
    """Wait until something is the case; say whether it came to be."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()


def in_a_terminal(command: list[str]) -> int:
    """Run a command in a pseudo-terminal, type what is to be said, and return its exit code."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "xterm"})
    os.close(slave)
    seen = ""
    typed = iter(SAID.splitlines(keepends=True))
    while process.poll() is None:
        if select.select([master], [], [], 0.1)[0]:
            try:
                seen += os.read(master, 65536).decode(errors="replace")
            except OSError:
                break
        if re.search(r"> \S*$", seen):
            os.write(master, next(typed, "").encode())
            seen = ""
    return process.wait(60)


def check_what_is_left() -> None:
    for name in ("pt", "sft", "rm", "ppo", "dpo"):
        assert RunFolder(Path("runs/story", name)).finished()
    answers = [json.loads(line) for line in Path("ppo.jsonl").read_text().splitlines()]
    assert len(answers) == 16
    assert all("completion" in answer for answer in answers)
    assert "<html" in Path("runs/story/ppo/report.html").read_text()
    assert Path("model/model.safetensors").is_file()
