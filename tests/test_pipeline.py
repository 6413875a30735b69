"""Pipelines: what is run, gone on with, run again and left alone, by runs of two steps on the built-in model.

Steps run in this process here, which spares the time in which each would import everything; the last tests have
processes of their own, and kill them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_pref import demo_rows

from llmtk.cli import call
from llmtk.demo import addition
from llmtk.pipeline import Pipeline, record
from llmtk.pipeline.deciding import AGAIN, RESUME, RUN, SKIP
from llmtk.pipeline.inputs import Hashes, inputs_of
from llmtk.pipeline.reading import read_steps
from llmtk.reporting.stored import is_locked
from llmtk.run import Run

FILE = """
train: {max_steps: 2, logging_steps: 1, per_device_train_batch_size: 4, bf16: false}
steps:
  sft: {model: builtin, data: {train: rows.jsonl, eval: 4.jsonl}}
  dpo: {model: step:sft, data: pairs.jsonl, train: {save_steps: 1}}
"""


def run_here(_: Pipeline, words: list[str]) -> int:
    """Run a step in this process."""
    return call(["run", *words[words.index("llmtk.pipeline.step") + 2 :]])


def write_rows(file: str, rows: list[Any]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def to_do(*overrides: str, **options: Any) -> dict[str, str]:
    """Return what would be done with each step."""
    return {one.step.name: one.action for one in Pipeline.read("p.yaml", overrides).plan(**options)}


def why(*overrides: str) -> dict[str, str]:
    return {one.step.name: one.why for one in Pipeline.read("p.yaml", overrides).plan()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a pipeline that has finished."""
    folder = tmp_path_factory.mktemp("made")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Pipeline, "_wait", run_here)
        write_rows("rows.jsonl", addition.rows("train", 16))
        write_rows("4.jsonl", addition.rows("held-out", 4))
        write_rows("pairs.jsonl", demo_rows("train", 16))
        Path("p.yaml").write_text(FILE)
        assert call(["pipeline", "p.yaml"]) == 0
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in. Nothing runs in it."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(Pipeline, "_wait", lambda *_: pytest.fail("a step was run"))
    return tmp_path / "here"


def interrupt(step: str) -> None:
    """Leave a step as a kill after its first checkpoint leaves it."""
    folder = Path("runs/p", step)
    for file in (*folder.glob("*.safetensors"), folder / "results.json"):
        file.unlink()
    shutil.rmtree(folder / "checkpoints" / "checkpoint-000002")
    record = json.loads(Path("runs/p/pipeline.json").read_text())
    record["steps"][step]["output"] = None
    Path("runs/p/pipeline.json").write_text(json.dumps(record))


def test_each_step_takes_what_a_former_one_made(made: Path) -> None:
    folders = [made / "runs/p" / name for name in ("sft", "dpo")]
    assert all(json.loads((folder / "results.json").read_text())["steps"] == 2 for folder in folders)
    assert "name_or_path: runs/p/sft" in (folders[1] / "config.yaml").read_text()
    record = json.loads((made / "runs/p/pipeline.json").read_text())["steps"]
    files = record["dpo"]["inputs"]["files"]
    assert files["step:sft/model.safetensors"] == record["sft"]["output"]["model.safetensors"]
    assert set(record["sft"]["inputs"]["files"]) == {"rows.jsonl", "4.jsonl"}
    assert (made / "runs/p/dpo.yaml").is_file()


@pytest.mark.usefixtures("here")
def test_nothing_is_run_where_nothing_has_changed(capfd: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").touch()
    Path("runs/p/sft/report.html").write_text("a report changes no model")
    assert call(["pipeline", "p.yaml"]) == 0
    said = capfd.readouterr().out.splitlines()
    assert said[1].split() == ["sft", "sft", "-", "skip", "finished,", "nothing", "has", "changed"]
    assert said[-4].split() == ["STEP", "STAGE", "STATUS", "STEPS", "SECONDS", "LOSS", "METRIC"]
    assert said[-3].split()[:4] == ["sft", "sft", "finished", "2"]
    assert said[-3].split()[-2] == "eval_loss"
    assert said[-1] == "All is in runs/p"


@pytest.mark.usefixtures("here")
def test_a_folder_may_be_moved() -> None:
    Path("runs").rename("moved")
    assert set(to_do("output_dir=moved/p").values()) == {SKIP}


def change_rows() -> None:
    write_rows("rows.jsonl", addition.rows("train", 15))


def change_model() -> None:
    Path("runs/p/sft/generation_config.json").write_text("{}")


def lose_model() -> None:
    Path("runs/p/dpo/model.safetensors").unlink()


def remove_last() -> None:
    shutil.rmtree("runs/p/dpo")


def interrupt_last() -> None:
    interrupt("dpo")


@pytest.mark.parametrize(
    ("change", "overrides", "actions"),
    [
        (None, [], [SKIP, SKIP]),
        (None, ["train.log_level=info", "steps.sft.train.save_total_limit=1"], [SKIP, SKIP]),  # the model is the same
        (None, ["train.adam_beta1=0.9"], [SKIP, SKIP]),  # the default, spelt out
        (None, ["steps.dpo.dpo.beta=0.2"], [SKIP, AGAIN]),
        (None, ["steps.sft.train.max_steps=3"], [AGAIN, AGAIN]),
        (change_rows, [], [AGAIN, AGAIN]),
        (change_model, [], [AGAIN, AGAIN]),
        (lose_model, [], [SKIP, AGAIN]),
        (remove_last, [], [SKIP, RUN]),
        (interrupt_last, [], [SKIP, RESUME]),
        (interrupt_last, ["steps.dpo.train.max_steps=3"], [SKIP, RESUME]),
        (interrupt_last, ["steps.dpo.dpo.beta=0.2"], [SKIP, AGAIN]),
    ],
)
@pytest.mark.usefixtures("here")
def test_what_is_to_be_done_follows_from_what_has_changed(
    change: Callable[[], None] | None, overrides: list[str], actions: list[str]
) -> None:
    if change is not None:
        change()
    assert list(to_do(*overrides).values()) == actions


@pytest.mark.usefixtures("here")
def test_inputs_are_the_files_that_settings_name(tmp_path: Path) -> None:
    Path("names.yaml").write_text("few: 4.jsonl")
    Path("chat.jinja").write_text("{{ messages }}")
    Path("linear").touch()  # as the default schedule is called
    settings = {
        "model": "builtin",
        "data": {"train": ["few", {"path": "rows.jsonl"}], "catalog": "names.yaml", "template": "chat.jinja"},
        "grpo": {"rewards": [{"file": "4.jsonl", "function": "x"}], "stop": ["nowhere"]},
    }
    files = inputs_of(Run.from_layers("grpo", settings), tmp_path, Hashes({})).files
    assert set(files) == {"4.jsonl", "rows.jsonl", "names.yaml", "chat.jinja"}
    streamed = {"model": "runs/p/sft", "data": {"train": "rows.jsonl", "streaming": True}, "train": {"max_steps": 1}}
    files = dict(inputs_of(Run.from_layers("sft", streamed), Path("runs/p"), Hashes({})).files)
    assert files.pop("rows.jsonl") == f"{os.path.getsize('rows.jsonl')} bytes"
    assert {file.split("/")[0] for file in files} == {"step:sft"}
    assert not {"step:sft/run.json", "step:sft/results.json", "step:sft/config.yaml"} & set(files)


@pytest.mark.usefixtures("here")
def test_why_is_said() -> None:
    assert why("steps.sft.train.seed=1", "steps.dpo.dpo.beta=0.2") == {
        "sft": "train.seed: 42 -> 1",
        "dpo": "dpo.beta: 0.1 -> 0.2",
    }
    assert why("steps.sft.train.seed=1")["dpo"] == "if sft should come out other than before"
    many = [f"steps.sft.train.{key}" for key in ("seed=1", "adam_beta1=0.8", "adam_beta2=0.9", "weight_decay=1")]
    assert why(*many, "steps.sft.train.max_steps=3")["sft"].endswith("train.seed: 42 -> 1, and 1 more")
    change_rows()
    assert why()["sft"] == "rows.jsonl: its content"
    interrupt("dpo")
    assert why("steps.dpo.train.max_steps=9")["dpo"] == (
        "it was interrupted after step 1; train.max_steps: 2 -> 9; "
        "or run again, if sft should come out other than before"
    )
    assert to_do(only=["dpo"]) == {"dpo": RESUME}
    assert to_do(only=["dpo"], rerun=["dpo"]) == {"dpo": AGAIN}


@pytest.mark.usefixtures("here")
def test_an_interrupted_step_goes_on_from_its_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = lines("runs/p/dpo/metrics.jsonl"), []
    interrupt("dpo")
    monkeypatch.setattr(Pipeline, "_wait", lambda _, words: asked.append(words) or run_here(_, words))
    # What is not given any more must not go on being what it was: the run's own file has save_steps: 1.
    Path("p.yaml").write_text(FILE.replace("train: {save_steps: 1}", "train: {max_steps: 3}"))
    assert call(["pipeline", "p.yaml"]) == 0
    assert [words[-2:] for words in asked] == [["--resume", "auto"]]
    after = lines("runs/p/dpo/metrics.jsonl")
    assert after[0] == before[0]
    assert [line["step"] for line in after] == [1, 2, 3]
    assert "save_steps: 500" in Path("runs/p/dpo/config.yaml").read_text()
    assert not Path("runs/p/old").exists()
    assert set(to_do().values()) == {SKIP}


@pytest.mark.usefixtures("here")
def test_a_changed_step_is_run_again_and_so_is_what_takes_from_it_and_the_old_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Pipeline, "_wait", run_here)
    was = {name: Path(f"runs/p/{name}/model.safetensors").read_bytes() for name in ("sft", "dpo")}
    assert call(["pipeline", "p.yaml", "steps.sft.train.learning_rate=1e-3"]) == 0
    for name, weights in was.items():
        assert Path(f"runs/p/old/{name}-1/model.safetensors").read_bytes() == weights
        assert Path(f"runs/p/{name}/model.safetensors").read_bytes() != weights
    assert set(to_do("steps.sft.train.learning_rate=1e-3").values()) == {SKIP}
    assert call(["pipeline", "p.yaml", "--only", "sft"]) == 0
    assert {path.name for path in Path("runs/p/old").iterdir()} == {"sft-1", "sft-2", "dpo-1"}


@pytest.mark.usefixtures("here")
def test_what_takes_from_a_step_that_comes_out_as_before_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Pipeline, "_wait", run_here)
    assert to_do(rerun=["sft"]) == {"sft": AGAIN, "dpo": AGAIN}
    assert call(["pipeline", "p.yaml", "--rerun", "sft"]) == 0
    assert "[2/2] dpo: skip" in capfd.readouterr().out


@pytest.mark.usefixtures("here")
def test_bad_input_of_any_step_is_told_before_the_first_begins(capfd: pytest.CaptureFixture[str]) -> None:
    Path("bad.jsonl").write_text('{"prompt": "a"}\n')
    Path("bad.yaml").write_text("""
train: {bf16: false, max_steps: 1}
steps:
  sft: {model: builtin, data: {train: rows.jsonl, evla: 0.1}}
  none: {model: builtin, data: rows.jsonl}
  gone: {stage: dpo, model: step:sft, data: pair.jsonl}
  rows: {stage: dpo, model: step:sft, data: bad.jsonl}
  key: {stage: dpo, model: step:sft, data: pairs.jsonl, dpo: {bta: 1}}
  model: {stage: sft, model: nowhere/at/all, data: rows.jsonl}
""")
    assert call(["pipeline", "bad.yaml"]) == 2
    said = capfd.readouterr().err
    for problem in (
        "error: step sft: data.evla: unknown key",
        "step none: Unknown stage 'none'",
        "step gone: pair.jsonl does not exist. Did you mean 'pairs.jsonl'?",
        "step rows: bad.jsonl",
        "step key: dpo.bta: unknown key",
        "step model: model.name_or_path: there is no folder nowhere/at/all",
    ):
        assert problem in said
    assert "Traceback" not in said
    assert not Path("runs/bad").exists()


@pytest.mark.usefixtures("here")
def test_what_a_pipeline_has_not_made_is_not_touched(capfd: pytest.CaptureFixture[str]) -> None:
    Path("other.yaml").write_text(FILE + "output_dir: runs/other\n")
    Path("runs/other/dpo").mkdir(parents=True)
    Path("runs/other/dpo/mine").touch()
    assert call(["pipeline", "other.yaml"]) == 2
    assert "step dpo: runs/other/dpo was not made by this pipeline" in capfd.readouterr().err
    Path("runs/p/pipeline.json").write_text('{"steps": {"sft": {}}')
    assert call(["pipeline", "p.yaml"]) == 2
    assert "pipeline.json is damaged" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "sfd"], "there is no step 'sfd'; they are sft, dpo. Did you mean 'sft'?"),
        (["--only", "sft", "--rerun", "dpo"], "dpo cannot be run again where it is left out"),
        (["output_dir=runs/new", "--only", "dpo"], "dpo takes from sft, which is not finished"),
        (["output_dir=rows.jsonl"], "rows.jsonl"),
        (["train=3"], "train"),
    ],
)
@pytest.mark.usefixtures("here")
def test_words_that_cannot_be_followed(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["pipeline", "p.yaml", *words]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.usefixtures("here")
def test_one_pipeline_at_a_time_and_none_under_a_launcher(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("runs/p/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(["pipeline", "p.yaml"]) == 2
    assert "is in use by process" in capfd.readouterr().err
    monkeypatch.setattr(record, "PATIENCE", 0.1)
    with open("runs/p/dpo/.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert call(["pipeline", "p.yaml"]) == 2
    assert "step dpo: runs/p/dpo is in use by another process" in capfd.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert call(["pipeline", "p.yaml"]) == 2
    assert "llmtk pipeline -n N" in capfd.readouterr().err


@pytest.mark.parametrize(("code", "how"), [(3, "exit code 3"), (-9, "SIGKILL")])
@pytest.mark.usefixtures("here")
def test_a_step_that_fails_ends_the_pipeline(
    code: int, how: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(Pipeline, "_wait", lambda _, words: asked.append(words) or code)
    assert call(["pipeline", "p.yaml", "train.seed=1", "-n", "2"]) == 1
    assert f"error: step sft ended with {how}. Mend what is wrong with it" in capfd.readouterr().err
    assert len(asked) == 1
    assert asked[0][asked[0].index("--num_processes") + 1] == "2"
    assert asked[0][-4:] == ["--module", "llmtk.pipeline.step", "runs/p/.lock", "runs/p/sft.yaml"]
    assert to_do("train.seed=1") == {"sft": RUN, "dpo": AGAIN}


@pytest.mark.usefixtures("here")
def test_a_signal_ends_the_pipeline_with_its_step(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(_: Pipeline, __: Any) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(Pipeline, "_wait", stopped)
    assert call(["pipeline", "p.yaml", "train.seed=1"]) == 1
    assert "SIGTERM stopped the pipeline at step dpo. Go on with the same command" in capfd.readouterr().err


@pytest.mark.usefixtures("here")
def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(Pipeline, "_wait", lambda *_: 1)
    assert call(["pipeline", "p.yaml", "train.metric_for_best_model=${MY_TOKEN}"]) == 1
    for file in ("pipeline.json", "sft.yaml"):
        assert "hunter2" not in Path("runs/p", file).read_text()
        assert "${MY_TOKEN}" in Path("runs/p", file).read_text()


@pytest.mark.usefixtures("here")
def test_blocks_of_the_page_run(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "pipelines.md").read_text()
    ((file, text),) = re.findall(r"^```yaml\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path(file).write_text(text)
    folder, steps = read_steps(file)
    assert (str(folder), [step.stage for step in steps]) == ("runs/first", ["sft", "rm", "ppo"])
    assert dict(steps[2].takes) == {"model.name_or_path": "sft", "ppo.rewards.0.model": "judge"}
    (python,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    Path(file).write_text(f"{FILE}output_dir: runs/p\n")
    monkeypatch.setattr(Pipeline, "_wait", run_here)
    names: dict[str, Any] = {}
    exec(python, names)
    assert [one["status"] for one in names["pipeline"].outcomes()] == ["finished", "finished"]


def test_a_pipeline_that_is_killed_stops_its_step_and_goes_on(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9, when the second step is in the middle of its steps, in a process of its own."""
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    shutil.rmtree("runs/p/dpo")
    words = ["p.yaml", "steps.dpo.train.max_steps=100000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen([sys.executable, "-m", "llmtk", "pipeline", *words], env=environment)
    checkpoints = Path("runs/p/dpo/checkpoints")
    assert until(lambda: any(checkpoints.glob("checkpoint-*")) or killed.poll() is not None)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    monkeypatch.setattr(Pipeline, "_wait", run_here)
    reached = len(lines("runs/p/dpo/metrics.jsonl"))
    # The same command waits for the step that was left behind; it stops by itself, and leaves a checkpoint.
    assert (
        call(["pipeline", "p.yaml", f"steps.dpo.train.max_steps={reached + 20}", "steps.dpo.train.save_steps=99"]) == 0
    )
    log = Path("runs/p/dpo/run.log").read_text()
    assert "SIGTERM stopped the run after step" in log
    assert "going on from checkpoint-" in log
    assert [line["step"] for line in lines("runs/p/dpo/metrics.jsonl")] == list(range(1, reached + 21))


def test_a_pipeline_that_is_begun_before_an_old_step_hears_of_it_waits_for_that(tmp_path: Path) -> None:
    """The step that a killed pipeline left behind asks for the lock only when the new one has it."""
    (tmp_path / "dpo").mkdir()
    told: list[str] = []
    said = threading.Event()
    with (tmp_path / "dpo" / ".lock").open("w") as running:
        fcntl.flock(running, fcntl.LOCK_EX)

        def end() -> None:
            time.sleep(0.2)
            with (tmp_path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH)
                said.wait(timeout=10)
                running.close()

        step = threading.Thread(target=end)
        step.start()
        with record.held(tmp_path, lambda line: (told.append(line), said.set())):
            step.join(timeout=10)
            assert not is_locked(tmp_path / "dpo" / ".lock")
    assert [line.partition(" by ")[0] for line in told] == [f"A run below {tmp_path} was left behind"]


def until(done: Callable[[], bool], seconds: float = 90.0) -> bool:
    """Wait until something is the case; say whether it came to be."""
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.05)
    return done()
