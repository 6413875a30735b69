"""The examples in docs/examples run as they stand, each for a few steps, through the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from llmtk.cli import call
from llmtk.config.reading import read_file
from llmtk.data import read_rows
from llmtk.demo import addition
from llmtk.ports import free_port

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\n" * 60


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def _in_the_repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files name their data as it lies below the repository, and Shakespeare by a variable."""
    text = tmp_path / "tinyshakespeare.txt"
    text.write_text(TEXT)
    monkeypatch.setenv("TINYSHAKESPEARE", str(text))
    monkeypatch.chdir(ROOT)


def settings(folder: Path) -> list[str]:
    """Return what makes an example short: few steps, and a folder of its own."""
    return ["train.max_steps=3", f"output_dir={folder}"]


@pytest.mark.usefixtures("_in_the_repository")
@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_an_example_runs(file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Evaluated at the end of training at the latest, whatever steps the file names.
    assert call(["run", str(file), *settings(tmp_path / "run")]) == 0, capfd.readouterr().err
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["steps"] == 3
    assert results["metrics"]["eval_loss"] > 0
    weights = "adapter_model" if file.stem == "memory-saving" else "model"
    assert (tmp_path / "run" / f"{weights}.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_in_the_repository")
def test_two_processes_run_as_the_file_says(tmp_path: Path) -> None:
    """By the header's own command, but for the address, which is this machine's alone."""
    file = EXAMPLES / "two-processes.yaml"
    header = re.search(r"torchrun (--standalone) (.*)", file.read_text())
    assert header is not None
    port = str(free_port())
    words = header[2].split()
    assert words[-1] == "docs/examples/two-processes.yaml"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1", "--master-port", port]
    environment = os.environ | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})
    done = subprocess.run(
        [*torchrun, *words, *settings(tmp_path / "run")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cpu x 2" in done.stdout
    assert done.stdout.count("Done: 3 steps") == 1, "one process speaks"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["steps"] == 3


def test_the_overview_names_every_example_and_every_example_how_it_is_run() -> None:
    overview = (EXAMPLES / "README.md").read_text()
    for file in FILES:
        assert f"[{file.name}]({file.name})" in overview
        assert f"llmtk run docs/examples/{file.name}" in file.read_text()
        assert read_file(file)["output_dir"] == f"runs/{file.stem}"


SOLUTIONS = ROOT.parent / "shared" / "data" / "gsm8k_model_solutions_600.jsonl"


@pytest.mark.skipif(not SOLUTIONS.exists(), reason=f"{SOLUTIONS} is absent")
def test_marked_solutions_become_preferences(tmp_path: Path) -> None:
    script = EXAMPLES / "gsm8k_preferences.py"
    pairs, labels = (tmp_path / f"{name}.jsonl" for name in ("pairs", "labels"))
    subprocess.run([sys.executable, str(script), str(SOLUTIONS), str(pairs), str(labels)], check=True)
    marks = {f" {s['solution']}": s["is_correct"] for line in SOLUTIONS.read_text().splitlines()
             for s in json.loads(line).values() if isinstance(s, dict)}  # fmt: skip
    found = read_rows(str(pairs), ["pair"])
    assert len(found) == 1053
    assert all(marks[row.chosen] and not marks[row.rejected] for row in found)
    labelled = read_rows(str(labels), ["labelled"])
    assert {row.label for row in labelled} == {True, False}
    tiny = [
        "train.max_steps=2",
        "data.max_length=512",
        "train.per_device_train_batch_size=2",
        "model.name_or_path=builtin",
    ]
    for stage, file in (("dpo", pairs), ("kto", labels), ("rm", pairs)):
        assert call(["run", stage, *tiny, f"data.train={file}", f"output_dir={tmp_path / stage}"]) == 0
        assert json.loads((tmp_path / stage / "results.json").read_text())["steps"] == 2


def test_the_data_are_those_of_the_demo() -> None:
    lines = (EXAMPLES / "addition.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == addition.rows("train", 200)
