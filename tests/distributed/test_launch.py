"""`llmtk launch` starts a run that really has two ranks, and fails as a run does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtk.cli import call

SETTINGS = (
    "model.name_or_path=builtin",
    "train.max_steps=3",
    "train.learning_rate=1e-3",
    "train.logging_steps=1",
    "train.bf16=false",
)


def llmtk(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "llmtk", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """Return the file of a few rows."""
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i)} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"data.train={file}"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def test_two_processes_train_as_one(tmp_path: Path, rows: str) -> None:
    words = ("sft", *SETTINGS, rows)
    alone = ("train.per_device_train_batch_size=8", f"output_dir={tmp_path / 'one'}")
    assert call(["run", *words, *alone]) == 0
    shared = ("train.per_device_train_batch_size=4", f"output_dir={tmp_path / 'two'}")
    done = llmtk("launch", "-n", "2", *words, *shared)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "-m accelerate.commands.launch" in done.stdout.splitlines()[0]
    ranks = [json.loads((tmp_path / name / "run.json").read_text())["environment"]["ranks"] for name in ("one", "two")]
    assert ranks == [1, 2]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert (tmp_path / "two" / "model.safetensors").is_file()


def test_bad_input_ends_before_any_process_is_started(tmp_path: Path, rows: str) -> None:
    done = llmtk("launch", "-n", "2", "sft", "train.learnin_rate=1", rows, f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "train.learnin_rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
