"""`llmtk runs`: folders of runs, as they are written, listed, shown and compared without a model."""

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest

from llmtk.reporting.comparison import differences, sparklines

CONFIG = """\
stage: toy
model: {{name_or_path: {model}}}
train: {{learning_rate: {rate}, seed: 1}}
toy: {{secret: "${{TOKEN_OF_NOBODY}}"}}
output_dir: {folder}
"""


def write_run(folder: Path, rate: str = "1e-3", losses: tuple[Any, ...] = (2.0, 1.0), finished: bool = True) -> Path:
    """Write what a run of two logged steps leaves."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(model="base", rate=rate, folder=folder))
    info = {"plugins": [["toy", "llmtk-stage-toy 1.0"]], "data": {"train": {"rows": 7}}, "precision": "float32"}
    (folder / "run.json").write_text(json.dumps(info))
    lines = [{"step": 10 * i, "epoch": 0.5 * i, "loss": loss} for i, loss in enumerate(losses, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        results = {"final_loss": losses[-1], "steps": 10 * len(losses), "metrics": {"eval_loss": 1.5}}
        (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_are_listed_newest_last_with_their_status(here: Path, llmtk: Any) -> None:
    import os

    for age, (name, finished) in enumerate({"c": True, "a": False, "sweep/b": True}.items()):
        file = write_run(here / "runs" / name, finished=finished) / "run.json"
        os.utime(file, (1000 + age, 1000 + age))
    (here / "runs/c/checkpoints/x").mkdir(parents=True)
    for name in ("config.yaml", "run.json"):
        (here / "runs/c/checkpoints/x" / name).write_text("")
    assert llmtk("runs", "list") == (
        0,
        "RUN           STAGE  STATUS      STEPS  LOSS  EVAL_LOSS  MODEL\n"
        "runs/c        toy    finished    20     1     -          base\n"
        "runs/a        toy    unfinished  20     1     -          base\n"
        "runs/sweep/b  toy    finished    20     1     -          base\n",
        "",
    )
    assert [run["run"] for run in json.loads(llmtk("runs", "list", "runs/sweep", "--json")[1])] == ["runs/sweep/b"]


def test_a_run_whose_folder_is_locked_is_running(here: Path, llmtk: Any) -> None:
    write_run(here / "runs/a")
    with (here / "runs/a/.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert json.loads(llmtk("runs", "list", "--json")[1])[0]["status"] == "running"
    assert json.loads(llmtk("runs", "list", "--json")[1])[0]["status"] == "finished"


def test_a_damaged_run_is_listed_with_what_is_wrong_and_the_others_too(here: Path, llmtk: Any) -> None:
    write_run(here / "runs/a")
    (write_run(here / "runs/b") / "results.json").write_text("{")
    (write_run(here / "runs/c") / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\nx\n{"step": 2}\n')
    code, out, _ = llmtk("runs", "list")
    assert code == 0
    assert "    problem: runs/b/results.json is damaged: " in out
    assert "    problem: runs/c/metrics.jsonl is damaged: " in out
    assert out.count("finished") == 1
    assert llmtk("runs", "show", "runs/b")[0] == 2


def test_no_run_at_all_says_how_to_make_one(here: Path, llmtk: Any) -> None:
    assert "there is no such folder" in llmtk("runs", "list")[2]
    (here / "runs").mkdir()
    assert llmtk("runs", "list") == (0, "There is no run in runs. Train one: llmtk run STAGE\n", "")


@pytest.mark.parametrize("words", [["show", "runs/x"], ["compare", "runs/a", "runs/x"]])
def test_no_such_run(here: Path, llmtk: Any, words: list[str]) -> None:
    write_run(here / "runs/a")
    code, _, err = llmtk("runs", *words)
    assert (code, err) == (2, "error: runs/x: there is no such run. `llmtk runs list` lists those there are\n")
    (here / "runs/x").mkdir()
    assert "runs/x holds no run" in llmtk("runs", *words)[2]


def test_show_tells_results_facts_and_curve_and_no_secret(
    here: Path, llmtk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN_OF_NOBODY", "hunter22")
    write_run(here / "a")
    code, out, _ = llmtk("runs", "show", "a")
    assert code == 0
    lines = [line.split(maxsplit=1) for line in out.splitlines() if line]
    for line in (
        ["stage", "toy"],
        ["eval_loss", "1.5"],
        ["data.train.rows", "7"],
        ["plugins.toy", "llmtk-stage-toy 1.0"],
    ):
        assert line in lines
    assert "loss up to step 20, between 1 and 2" in out
    shown = json.loads(llmtk("runs", "show", "a", "--json")[1])
    assert shown["config"]["toy"] == {"secret": "${TOKEN_OF_NOBODY}"}
    assert (shown["steps"], shown["loss"]) == (20, 1.0)


def test_compare_tells_what_differs_and_draws_on_one_scale(here: Path, llmtk: Any) -> None:
    write_run(here / "a")
    write_run(here / "b", rate="2e-3", losses=(3.0, 2.0, None))
    code, out, _ = llmtk("runs", "compare", "a", "b")
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["train.learning_rate", "0.001", "0.002"] in lines
    assert ["steps", "20", "30"] in lines
    assert ["final_loss", "1", "2"] in lines
    for equal in ("train.seed", "output_dir", "model.name_or_path", "plugins.toy"):
        assert equal not in out
    assert "FACTS" in out
    assert "loss up to step 20, between 1 and 3" in out
    assert ["2", "->", "1", "lowest", "1", "(step", "20)", "highest", "2", "(step", "10)"] in [
        line[2:] for line in lines
    ]
    compared = json.loads(llmtk("runs", "compare", "a", "b", "--json")[1])
    assert compared["settings"] == {"train.learning_rate": [0.001, 0.002]}
    assert compared["curves"] == {"loss": [[[10, 2.0], [20, 1.0]], [[10, 3.0], [20, 2.0]]]}


def test_a_metric_that_no_run_has_is_an_error_that_lists_those_there_are(here: Path, llmtk: Any) -> None:
    write_run(here / "a")
    code, _, err = llmtk("runs", "compare", "a", "a", "--metric", "los")
    assert code == 2
    assert "--metric los: none of the runs has it; they have loss. Did you mean 'loss'?" in err
    assert llmtk("runs", "compare", "a")[0] == 2


def test_a_line_that_is_being_written_is_left_out(here: Path, llmtk: Any) -> None:
    with (write_run(here / "a") / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 30, "lo')
    assert json.loads(llmtk("runs", "show", "a", "--json")[1])["steps"] == 20


def test_what_steers_a_terminal_is_not_printed(here: Path, llmtk: Any) -> None:
    folder = write_run(here / "a")
    (folder / "run.json").write_text(json.dumps({"precision": "\x1b[2Jfloat32"}))
    assert "\x1b" not in llmtk("runs", "show", "a")[1]


def test_differences_are_by_dotted_key() -> None:
    mappings = [{"a": {"b": 1, "c": [1]}, "d": {}}, {"a": {"b": 2, "c": [1]}, "d": {}}, {"a": {"b": 1}}]
    assert differences(mappings) == {"a.b": [1, 2, 1], "a.c": [[1], [1], None], "d": [{}, {}, None]}


def test_curves_are_drawn_in_columns_on_one_scale() -> None:
    falling = [(1, 8.0), (2, 4.0), (3, 4.0), (4, 1.0)]
    assert sparklines([falling, [(2, 1.0)]], width=4) == ["█▄▄▁", " ▁  "]
    assert sparklines([falling], width=2) == ["▆▂"]  # means: 6 and 2.5
    assert sparklines([[(5, 1.0), (10, 1.0)]], width=4) == [" ▅▅▅"]
    assert sparklines([[], []], width=3) == ["   ", "   "]
