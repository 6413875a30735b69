"""Disks that are full, read-only or failing, while a run writes: what stands stays whole, and the run goes on from it.

A small disk is mounted in a namespace of its own, which needs no rights; where none may be made, the tests skip.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmtk.cli import call
from llmtk.config.reading import to_yaml
from llmtk.demo import addition
from llmtk.training import checkpoints

ROOM = 4096
"""KiB on the disk."""
LIMIT = 120
NAMESPACE = ["unshare", "--map-root-user", "--mount"]
TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


def settings(folder: Path, steps: int) -> dict[str, Any]:
    """Return a run whose checkpoints take about an eighth of the disk."""
    return {
        "stage": "sft",
        "model": {"from_config": TINY, "tokenizer": {"kind": "byte"}},
        "data": {"train": addition.rows("train", 16), "max_length": 64},
        "train": {
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "bf16": False,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": 1,
        },
        "output_dir": str(folder),
    }


def on_disk(what: str, tmp_path: Path) -> dict[str, Any]:
    """Do a part of this file in a process with a small disk, and return what it tells."""
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here (unshare --map-root-user --mount)")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*NAMESPACE, sys.executable, __file__, what, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def test_a_disk_that_is_full_in_a_save_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    told = on_disk("full", tmp_path)
    assert told["first"]["code"] == 0, told
    assert told["full"]["code"] == 1
    assert "No space left on device" in told["full"]["said"]
    assert "checkpoint" in told["full"]["said"]
    assert "Traceback" not in told["full"]["said"]
    assert "fault in llmtk" not in told["full"]["said"]
    assert "The checkpoint of step 4 stands" in told["full"]["said"]
    assert told["sound"] == ["checkpoint-000004"]
    assert told["freed"]["code"] == 0, told
    assert told["same"] == []


def test_a_disk_that_became_read_only_is_named(tmp_path: Path) -> None:
    told = on_disk("read_only", tmp_path)
    assert told["new"]["code"] == 2
    assert "cannot be written to: Read-only file system" in told["new"]["said"]
    assert told["resumed"]["code"] in (1, 2)
    assert "Read-only file system" in told["resumed"]["said"]
    assert "fault in llmtk" not in told["new"]["said"] + told["resumed"]["said"]
    assert told["sound"] == ["checkpoint-000004"]


def test_a_disk_that_fails_in_a_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: Any) -> None:
    """EIO comes when data are made durable, which is when a kernel tells of what it could not write."""
    folder = tmp_path / "run"
    assert run(tmp_path, folder, 4)["code"] == 0
    real, count = os.fsync, 0

    def failing(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count > 3:
            raise OSError(5, os.strerror(5))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", failing)
    told = run(tmp_path, folder, 8, "--resume")
    assert told["code"] == 1
    assert "Input/output error" in told["said"]
    assert "fault in llmtk" not in told["said"]
    assert sound(folder) == ["checkpoint-000004"]
    monkeypatch.undo()
    assert run(tmp_path, folder, 8, "--resume")["code"] == 0
    assert run(tmp_path, tmp_path / "whole", 8)["code"] == 0
    assert different(folder, tmp_path / "whole") == []


def run(home: Path, folder: Path, steps: int, *words: str) -> dict[str, Any]:
    """Run the command, and return its exit code and all that it said."""
    config = home / "config.yaml"
    config.write_text(to_yaml(settings(folder, steps)))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = call(["run", str(config), *words])
    return {"code": code, "said": said.getvalue()}


def sound(folder: Path) -> list[str]:
    """Return the names of the checkpoints that are whole."""
    return [
        path.name for _, path in checkpoints.list_checkpoints(folder / "checkpoints") if not checkpoints.verify(path)
    ]


def different(folder: Path, whole: Path) -> list[str]:
    """Return which of the results differ."""
    last = "checkpoints/checkpoint-000008"
    names = ("metrics.jsonl", "model.safetensors", f"{last}/weights.safetensors", f"{last}/optimizer.safetensors")
    return [name for name in names if (folder / name).read_bytes() != (whole / name).read_bytes()]


# In the process with the disk


def mount(home: Path) -> Path:
    """Mount the small disk."""
    disk = home / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}k", "none", disk], check=True)
    return disk


def full(home: Path) -> dict[str, Any]:
    """Train to step 4, fill the disk, go on, make room, and go on again."""
    disk = mount(home)
    folder = disk / "run"
    told: dict[str, Any] = {"first": run(home, folder, 4)}
    filler = disk / "filler"
    filler.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 32 * 1024)))
    told["full"] = run(home, folder, 8, "--resume")
    told["sound"] = sound(folder)
    filler.unlink()
    told["freed"] = run(home, folder, 8, "--resume")
    run(home, home / "whole", 8)
    return told | {"same": different(folder, home / "whole")}


def read_only(home: Path) -> dict[str, Any]:
    """Train to step 4, let nobody write any more, and try a new run and the old one."""
    disk = mount(home)
    run(home, disk / "run", 4)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    return {
        "new": run(home, disk / "new", 4),
        "resumed": run(home, disk / "run", 8, "--resume"),
        "sound": sound(disk / "run"),
    }


if __name__ == "__main__":
    print(json.dumps({"full": full, "read_only": read_only}[sys.argv[1]](Path(sys.argv[2]))))
