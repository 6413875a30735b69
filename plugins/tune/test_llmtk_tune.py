"""Sweeps: what is drawn and checked, real trials that are stopped and go on, and trials that fail or are pruned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import llmtk_tune
import pytest
from llmtk_tune_space import Choice, Range, read_space

from llmtk.cli import call
from llmtk.demo import addition
from llmtk.errors import ConfigurationError
from llmtk.pipeline.record import held
from llmtk.reporting.stored import StoredRun

FAKE = '''
"""A run that takes no time: its loss over four evaluations is its learning rate, less what it has learnt."""
import json, sys, time
from pathlib import Path
given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
rate, folder = json.loads(given["train.learning_rate"]), Path(given["output_dir"])
if rate == 0.666:
    sys.exit("error: the loss is not finite")
if rate == 0.222:
    print("error: no row is left", file=sys.stderr)
    sys.exit(2)
folder.mkdir()
(folder / "config.yaml").write_text("stage: sft")
with (folder / "metrics.jsonl").open("w") as lines:
    for step in range(1, 5):
        print(json.dumps({"step": step, "eval_loss": rate - step / 100}), file=lines, flush=True)
        time.sleep(0.3 if rate > 0.8 else 0)
(folder / "results.json").write_text("{}")
'''


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What all trials share, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, addition.rows("train", 12))))
    train = ["train.max_steps=4", "train.logging_steps=1", "train.eval_strategy=steps", "train.eval_steps=1"]
    return ["tune", "sft", "model.name_or_path=builtin", "data.train=rows.jsonl", "data.eval=0.25", *train]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials are runs that take no time."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(llmtk_tune, "RUN", [sys.executable, str(tmp_path / "fake.py")])


def results(folder: str = "runs/tune-sft") -> dict[str, Any]:
    read: dict[str, Any] = json.loads(Path(folder, "results.json").read_text())
    return read


def test_values_are_lists_and_ranges() -> None:
    space = read_space(["a.b=1e-5..1e-3:log", "r=4..64", "x=0.5..2", "kind=linear,cosine", "m=[q, v],[k],all"])
    assert space == {
        "a.b": Range(1e-5, 1e-3, log=True),
        "r": Range(4, 64),
        "x": Range(0.5, 2),
        "kind": Choice(("linear", "cosine")),
        "m": Choice((["q", "v"], ["k"], "all")),
    }
    assert [space["m"].value(drawn) for drawn in space["m"].distribution().choices] == [["q", "v"], ["k"], "all"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("over", "told"),
    [
        ("beta", "write KEY=VALUES"),
        ("a=", "write KEY=VALUES"),
        ("a=3..1", "from the smaller"),
        ("a=0..1:log", "begins above 0"),
        ("a=x..y", "between two numbers"),
        ("a=1,1", "stands twice"),
        ("a=[1,2", "a=[1,2"),
        ("output_dir=a,b", "folder of its own"),
    ],
)
def test_what_is_no_space_is_refused(over: str, told: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        read_space([over])
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--over", "train.lerning_rate=1,2"], "learning_rate"),
        (["--over", "train.learning_rate=-1..1"], "value -1"),
        (["--over", "train.seed=1,2", "data.eval=null"], "nothing to judge trials by"),
        (["--over", "train.seed=1,2", "output_dir=x"], "--output-dir"),
        (["--over", "train.seed=1..9", "--sampler", "grid"], "listed values alone"),
        (["--over", "train.seed=1,2", "--output-dir", "rows.jsonl"], "rows.jsonl"),
        (["--over", "train.seed=1,2", "--output-dir", "."], "holds other files"),
    ],
)
def test_a_mistake_is_told_before_any_trial(
    words: list[str], more: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([*words, *more]) == 2
    assert told in capsys.readouterr().err
    assert not list(Path().rglob("trial-*"))


def test_one_sweep_at_a_time(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with held(Path("runs/tune-sft"), print):
        assert call([*words, "--over", "train.seed=1,2"]) == 2
    assert "output_dir runs/tune-sft is in use by process" in capsys.readouterr().err


@pytest.mark.usefixtures("fake")
def test_the_sampler_comes_near_the_best(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sweep = [*words, "--over", "train.learning_rate=0.01..0.7", "--seed", "3"]
    assert call([*sweep, "--trials", "3"]) == 0
    first = results()["trials"]
    assert call([*sweep, "--trials", "12"]) == 0
    told = results()
    assert told["trials"][:3] == first
    values = [trial["value"] for trial in told["trials"]]
    assert values == pytest.approx([trial["settings"]["train.learning_rate"] - 0.04 for trial in told["trials"]])
    assert told["best"] == values.index(min(values)) + 1
    assert len(set(values)) == 12
    assert min(values) < 0.1
    assert Path("runs/tune-sft/sweep.png").stat().st_size > 5000
    assert f"train.learning_rate={min(values) + 0.04}"[:24] in capsys.readouterr().out
    assert call([*words, "--over", "train.learning_rate=0.01..0.9"]) == 2
    assert "cannot go on with other settings" in capsys.readouterr().err


@pytest.mark.usefixtures("fake")
def test_a_trial_that_fails_does_not_end_the_sweep(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call([*words, "--over", "train.learning_rate=0.5,0.666,0.222,0.3"]) == 0
    assert [trial["state"] for trial in results()["trials"]] == ["finished", "failed", "failed", "finished"]
    assert results()["best"] == 4
    told = capsys.readouterr()
    assert "the loss is not finite" in told.err
    assert "no row is left" in told.err


@pytest.mark.usefixtures("fake")
def test_a_first_trial_that_cannot_begin_ends_the_sweep(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call([*words, "--over", "train.learning_rate=0.222,0.3"]) == 2
    assert "no row is left" in capsys.readouterr().err


@pytest.mark.usefixtures("fake")
def test_no_trial_that_ends_is_an_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call([*words, "--over", "train.learning_rate=0.666"]) == 1
    assert "no trial came to an end" in capsys.readouterr().err


@pytest.mark.usefixtures("fake")
def test_a_trial_that_does_worse_is_pruned(words: list[str]) -> None:
    rates = "0.1,0.2,0.3,0.15,0.25,0.9,0.12"
    assert call([*words, "--over", f"train.learning_rate={rates}", "--prune"]) == 0
    assert [trial["state"] for trial in results()["trials"]].index("pruned") == 5
    assert len(StoredRun.read("runs/tune-sft/trial-006").curve("eval_loss")) < 4


def test_a_sweep_that_is_stopped_goes_on(words: list[str]) -> None:
    """A real run is stopped in its midst, and ends as if it had not been."""
    sweep = [*words, "--over", "train.learning_rate=1e-3"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen([sys.executable, "-m", "llmtk", *sweep], env=environment)
    metrics = Path("runs/tune-sft/trial-001/metrics.jsonl")
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert child.poll() is None
        time.sleep(0.02)
    child.terminate()
    assert child.wait() == 1
    assert StoredRun.read("runs/tune-sft/trial-001").status == "unfinished"
    assert call(sweep) == 0
    (trial,) = results()["trials"]
    curve = StoredRun.read(trial["folder"]).curve("eval_loss")
    assert (trial["state"], trial["value"]) == ("finished", curve[-1][1])
    assert [step for step, _ in curve] == [1, 2, 3, 4]
