"""What `llmtk run` makes of its words. What a run then does is tested elsewhere."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of a configuration file in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("stage: toy\ntrain: {seed: 5e-1}\n")
    return "config.yaml"


FILE = {"stage": "toy", "train": {"seed": 0.5}}


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["toy"], ("toy", {}, None)),
        (["toy", "a.b=1"], ("toy", {"a": {"b": 1}}, None)),
        (["toy", "config.yaml"], ("toy", FILE, {}, None)),
        (["config.yaml"], (None, FILE, {}, None)),
        (["config.yaml", "toy", "a=x.yaml"], ("toy", FILE, {"a": "x.yaml"}, None)),
        (["toy", "--resume"], ("toy", {}, "auto")),
        (["toy", "--resume", "auto", "a=1"], ("toy", {"a": 1}, "auto")),
        (
            ["toy", "--resume", "runs/a/checkpoints/checkpoint-000010"],
            ("toy", {}, "runs/a/checkpoints/checkpoint-000010"),
        ),
        (["toy", "--resume", "output_dir=runs/a"], ("toy", {"output_dir": "runs/a"}, "auto")),
        (["--resume", "config.yaml"], (None, FILE, {}, "auto")),
    ],
)
def test_words_become_a_run(file: str, runs: list[Any], llmtk: Any, words: list[str], asked: Any) -> None:
    assert llmtk("run", *words) == (0, "", "")
    assert runs == [asked, "trained"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name a stage: llmtk run STAGE"),
        (["a=1"], "Name a stage: llmtk run STAGE"),
        (["toy", "other"], "One stage at most, got toy and other. A setting is written KEY=VALUE."),
        (["a.yaml", "b.yml"], "One configuration file at most, got a.yaml and b.yml."),
        (["toy", "none.yaml"], "none.yaml: there is no such configuration file"),
        (["toy", "./rows.jsonl"], "./rows.jsonl is no configuration. To train on it: data.train=./rows.jsonl"),
        (["toy", "a..b=1"], "a..b=1: the key is incomplete"),
        (["toy", "--nope"], "No such option '--nope'.\nA setting is written without dashes: KEY=VALUE"),
        (["toy", "--learning_rate", "1e-4"], "A setting is written without dashes: train.learning_rate=VALUE"),
        (["toy", "--load-in-4bit"], "A setting is written without dashes: model.quantization=4bit"),
    ],
)
def test_wrong_words_are_bad_input(file: str, runs: list[Any], llmtk: Any, words: list[str], said: str) -> None:
    code, _, err = llmtk("run", *words)
    assert code == 2
    assert said in err
    assert runs == []
