"""Tasks of one's own through lm-evaluation-harness, against log-probs by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llmtk
from llmtk.cli import call
from llmtk.demo import addition
from llmtk.models.checks import resolve

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of a task: which of two sums is right."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = []
    for row in addition.rows("eval", 12):
        (question, answer) = (message["content"] for message in row["messages"])
        rows.append({"prompt": question, "choices": [str(int(answer) + 1), answer], "label": 1})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(tmp_path / "rows.jsonl"))
    return tmp_path / "sums.yaml"


def by_hand(rows: list[str]) -> float:
    """Return the share of rows whose right answer is the likelier one."""
    model, tokenizer = llmtk.load(resolve("builtin"))
    right = 0
    for row in map(json.loads, rows):
        logps = []
        for choice in row["choices"]:
            ids = torch.tensor([tokenizer(row["prompt"] + choice)["input_ids"]])
            answer = len(tokenizer(choice, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                table = model(ids).logits[0, :-1].double().log_softmax(-1)
            logps.append(float(table[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-answer:].sum()))
        right += logps.index(max(logps)) == row["label"]
    return right / len(rows)


def test_a_task_of_ones_own(task: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["evaluate", "builtin", "--tasks", str(task), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    rows = (task.parent / "rows.jsonl").read_text().splitlines()
    assert found == {"sums/acc": pytest.approx(by_hand(rows))}
    assert 0 < found["sums/acc"] < 1


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("missing.yaml", "cannot be read"),
        ("empty.yaml", "defines no task"),
        pytest.param("hellaswagg", "hellaswag", marks=pytest.mark.slow),  # it reads all tasks that there are
    ],
)
def test_a_task_that_is_unknown_is_refused(
    tasks: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.yaml").write_text("dataset_path: json\n")
    assert call(["evaluate", "builtin", "--tasks", tasks]) == 2
    assert told in capsys.readouterr().err
