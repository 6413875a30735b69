"""The commands of docs/runs.md run as they stand, on a run of two steps."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmtk.cli import call
from llmtk.demo import addition

PAGE = Path(__file__).parents[1] / "docs" / "runs.md"
COMMANDS = re.findall(r"^    llmtk (.+?)(?:  +#.*)?$", PAGE.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of an adapter, its data and its configuration."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, addition.rows("train", 16))))
    settings = {
        "model": {"name_or_path": "builtin"},
        "data": {"train": str(folder / "rows.jsonl"), "eval": 0.25},
        "peft": {"r": 2},
        "train": {"max_steps": 2, "logging_steps": 1},
    }
    (folder / "config.yaml").write_text(json.dumps(settings))
    assert call(["run", "sft", str(folder / "config.yaml"), f"output_dir={folder / 'runs/RUN'}"]) == 0
    (folder / "RUN").symlink_to(folder / "runs/RUN")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(
    command: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr("os.execv", lambda *_: None)
    monkeypatch.setattr("llmtk.cli.launch.check_port", lambda *_: None)  # others may be at the usual one
    words = [word if word != "FOLDER" else str(tmp_path / "model") for word in shlex.split(command)]
    lacks = "--quantize" in words and find_spec("bitsandbytes") is None
    assert call(words) == (2 if lacks else 0)
    assert (tmp_path / "model" / "config.json").exists() == ("--merge" in words and not lacks)
