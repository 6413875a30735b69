"""Runs that are stopped and go on: bit-identical to runs never stopped, or refused with what differs."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from llmtk import CheckpointError, ConfigurationError, LossOutput, Mean, Round, Run, Term, hookimpl
from llmtk.cli.run import made
from llmtk.run import Interrupted
from llmtk.training import checkpoints

from .kit import EVAL, GPT2, ROWS, Lm, assert_same_run, group_of, lines, make, series, weights


class StopAt:
    """Sends a signal in step_finished."""

    name = "stop-at"

    def __init__(self, *steps, number=signal.SIGTERM):
        self.steps, self.number = steps, number

    @hookimpl
    def step_finished(self, run, step):
        if step.step in self.steps:
            os.kill(os.getpid(), self.number)


class Draws(Lm):
    """Uses all that a checkpoint must keep: dropout, generators, more rows, and several windows in a round."""

    dropout = True
    windows_per_round = 2

    def prepare_batch(self, run, rows):
        if run.model.training:
            rows = rows + run.draw(1)
        groups = [group_of(row) for row in rows]
        if run.model.training:
            order = torch.randperm(len(groups), generator=run.generator("order")).tolist()
            groups = [groups[index] for index in order]
        return Round([Round.of(groups).windows[0], Round.of(groups[::-1]).windows[0]], {"rows": Mean(len(rows), 1)})

    def compute_loss(self, run, batch):
        output = super().compute_loss(run, batch)
        noise = 1 + 0.1 * torch.rand((), generator=run.generator("noise")) if run.model.training else 1
        return LossOutput({"loss": Term(output.terms["loss"].sum * noise, "tokens")}, output.metrics)


GPT2_DROPOUT = {"from_config": GPT2 | {"resid_pdrop": 0.2}, "tokenizer": {"kind": "byte"}}
CASES = {
    "plain": {},
    "everything that draws, inside a round": {"stage": Draws, "model": GPT2_DROPOUT, "logging_steps": 2},
    "evaluations and samples": {
        "eval": EVAL,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "sections": {"samples": {"count": 2, "max_new_tokens": 4, "temperature": 1.0}},
    },
    "sums between two lines of the log": {"logging_steps": 5, "eval": EVAL},
    "an adapter": {"sections": {"peft": {"r": 2, "lora_dropout": 0.1}}, "stage": Draws},
    "plain AdamW": {"optim": "adamw_torch", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "adafactor": {"optim": "adafactor"},
    "bfloat16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True, "stage": Draws, "model": GPT2_DROPOUT},
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_by_a_signal_goes_on_as_if_it_never_was(tmp_path, folder, case):
    settings = {"max_steps": 6, "logging_steps": 1} | CASES[case]
    if "peft" in settings.get("sections", {}):
        settings["model"] = folder
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Interrupted, match=r"SIGTERM stopped the run after step 3; .*--resume auto"):
        make(tmp_path / "parts", plugins=[StopAt(3)], **settings).train()
    parts = make(tmp_path / "parts", resume="auto", **settings)
    assert parts.train().steps == 6
    assert_same_run(whole, parts)
    assert parts.state.to_json() == whole.state.to_json()


def test_a_run_may_be_stopped_after_every_step(tmp_path):
    settings = {"stage": Draws, "model": GPT2_DROPOUT, "max_steps": 5, "eval": EVAL, "logging_steps": 3}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    for step in range(1, 5):
        with pytest.raises(Interrupted):
            make(tmp_path / "parts", resume="auto", plugins=[StopAt(step)], **settings).train()
    parts = make(tmp_path / "parts", resume="auto", **settings)
    parts.train()
    assert_same_run(whole, parts)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_the_last_step_lets_the_run_finish(tmp_path, number):
    run = make(tmp_path / "run", plugins=[StopAt(4, number=number)])
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    assert run.train().steps == 4
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


class Signalled(Lm):
    """Sends a signal during the evaluation after a step, in the first of its two windows."""

    at = None
    number = signal.SIGTERM

    def evaluate_batch(self, run, batch):
        if run.step == type(self).at:
            type(self).at = None
            os.kill(os.getpid(), self.number)
        return super().evaluate_batch(run, batch)


@pytest.mark.parametrize(("step", "signalled"), [(2, signal.SIGINT), (2, signal.SIGTERM), (4, signal.SIGTERM)])
def test_an_evaluation_cut_short_is_made_when_the_run_goes_on(tmp_path, step, signalled):
    """In the middle of the run, and after its last step."""

    class Here(Signalled):
        name = "lm"
        number = signalled

    settings = {"eval": EVAL, "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 2}
    whole = make(tmp_path / "whole", Here, logging_steps=1, **settings)
    whole.train()
    Here.at = step
    with pytest.raises(Interrupted, match=f"{signalled.name} stopped the run after step {step}"):
        make(tmp_path / "parts", Here, logging_steps=1, **settings).train()
    assert [line["step"] for line in lines(whole) if "eval_loss" in line] == [2, 4]
    parts = make(tmp_path / "parts", Here, logging_steps=1, resume="auto", **settings)
    assert parts.train().steps == 4
    assert_same_run(whole, parts)


@pytest.mark.parametrize(
    ("within", "number"),
    [
        ("write_tensors", signal.SIGTERM),
        ("save_rank", signal.SIGINT),
        ("commit", signal.SIGTERM),
        ("_sync", signal.SIGINT),
        ("prune", signal.SIGTERM),
    ],
)
def test_a_save_ends_whole_though_a_signal_comes_in_its_midst(tmp_path, monkeypatch, within, number):
    settings = {"save_steps": 2, "max_steps": 5, "save_total_limit": 2, "logging_steps": 1}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    do, pending = getattr(checkpoints, within), [number]

    def signalled(*given, **named):
        if pending:
            os.kill(os.getpid(), pending.pop())
        return do(*given, **named)

    monkeypatch.setattr(checkpoints, within, signalled)
    with pytest.raises(Interrupted, match=f"{number.name} stopped the run after step 3"):
        make(tmp_path / "parts", **settings).train()
    left = checkpoints.list_checkpoints(tmp_path / "parts" / "checkpoints")
    assert [step for step, _ in left] == [2, 3]
    assert [checkpoints.verify(path) for _, path in left] == [None, None]
    parts = make(tmp_path / "parts", resume=str(left[0][1]), **settings)
    assert parts.train().steps == 5
    assert_same_run(whole, parts)


def test_going_on_from_an_older_checkpoint(tmp_path, capsys):
    """Its future is removed, so that pruning and the next resume are not led astray."""
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 1}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    again = make(
        tmp_path / "whole", resume=str(whole.checkpoints / "checkpoint-000002"), plugins=[StopAt(3)], **settings
    )
    with pytest.raises(Interrupted):
        again.train()
    assert "later checkpoints are removed (2)" in capsys.readouterr().out
    assert [path.name[-1] for path in sorted(whole.checkpoints.iterdir())] == ["2", "3"]
    assert series(again, "step") == [1, 2, 3]
    parts = make(tmp_path / "whole", resume="auto", **settings)
    parts.train()
    fresh = make(tmp_path / "fresh", **settings)
    fresh.train()
    assert_same_run(fresh, parts)


def test_a_damaged_checkpoint_is_passed_over_and_the_run_is_the_same(tmp_path, capsys):
    settings = {"max_steps": 4, "save_steps": 1, "logging_steps": 1, "save_total_limit": 2}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", plugins=[StopAt(3)], **settings).train()
    damaged = tmp_path / "parts" / "checkpoints" / "checkpoint-000003"
    with (damaged / "optimizer.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged.*--resume auto"):
        make(tmp_path / "parts", resume=str(damaged), **settings).train()
    parts = make(tmp_path / "parts", resume="auto", **settings)
    parts.train()
    assert "checkpoint-000003 is damaged and passed over: optimizer.safetensors" in capsys.readouterr().out
    assert_same_run(whole, parts)
    assert [checkpoints.verify(path) for path in parts.checkpoints.iterdir()] == [None, None]


def test_a_folder_without_a_sound_checkpoint_starts_from_the_beginning(tmp_path, capsys):
    settings = {"logging_steps": 1, "save_strategy": "no"}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", plugins=[StopAt(2)], **settings).train()
    (tmp_path / "parts" / "checkpoints" / "checkpoint-000002" / "manifest.json").unlink()
    parts = make(tmp_path / "parts", resume="auto", **settings)
    parts.train()
    assert "no sound checkpoint: the run starts from the beginning" in capsys.readouterr().out
    assert [path.name for path in parts.checkpoints.iterdir()] == ["checkpoint-000004"]
    assert_same_run(whole, parts)


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    settings = {"lr_scheduler_type": "constant", "logging_steps": 1}
    long = make(tmp_path / "long", max_steps=4, **settings)
    long.train()
    make(tmp_path / "parts", max_steps=2, **settings).train()
    parts = make(tmp_path / "parts", max_steps=4, resume="auto", **settings)
    parts.train()
    assert_same_run(long, parts)


def test_a_run_that_goes_on_with_more_steps_follows_the_longer_schedule_at_once(tmp_path):
    settings = {"lr_scheduler_type": "linear", "learning_rate": 0.06, "logging_steps": 1}
    make(tmp_path / "run", max_steps=4, **settings).train()
    longer = make(tmp_path / "run", max_steps=6, resume="auto", **settings)
    longer.train()
    assert series(longer, "learning_rate")[-2:] == pytest.approx([0.02, 0.01], rel=1e-12)


class Counter:
    """Keeps a number, a tensor and a list."""

    name = "counter"

    def __init__(self):
        self.sum, self.mean, self.seen = 0, torch.zeros(2, dtype=torch.bfloat16), []

    @hookimpl
    def step_finished(self, run, step):
        self.sum += step.step
        self.mean += step.step
        self.seen.append(step.loss)

    @hookimpl
    def extra_checkpoint_state(self, run):
        return {"sum": self.sum, "mean": self.mean, "seen": self.seen}

    @hookimpl
    def restore_checkpoint_state(self, run, state):
        self.sum, self.mean, self.seen = state["sum"], state["mean"], state["seen"]


class Twin(Counter):
    name = "twin"

    @hookimpl
    def step_finished(self, run, step):
        self.sum -= 1


def test_plugins_get_their_own_state_back(tmp_path):
    whole, first, second, twin = Counter(), Counter(), Counter(), Twin()
    make(tmp_path / "whole", plugins=[whole, Twin()]).train()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", plugins=[first, Twin(), StopAt(2)]).train()
    make(tmp_path / "parts", plugins=[second, twin], resume="auto").train()
    assert (second.sum, second.seen) == (whole.sum, whole.seen) == (10, whole.seen)
    assert second.mean.dtype == torch.bfloat16
    assert torch.equal(second.mean, whole.mean)
    assert twin.sum == -4


def test_other_plugins_that_keep_state_are_refused_and_all_listed(tmp_path):
    with pytest.raises(Interrupted):
        make(tmp_path / "run", plugins=[Counter(), StopAt(2)]).train()
    with pytest.raises(ConfigurationError) as caught:
        make(tmp_path / "run", plugins=[Twin()], resume="auto").train()
    assert str(caught.value).splitlines()[1:] == [
        "  counter has state there, and is not among this run's plugins",
        "  twin keeps state, and there is none of it",
    ]
    make(tmp_path / "run", plugins=[Counter()], resume="auto").train()  # who keeps none may change


def test_other_plugins_of_the_configuration_are_refused(stopped):
    with pytest.raises(
        ConfigurationError, match=r"other settings:\n  plugins\.auxiliary-loss\.z_loss: None -> 0\.1\nTake them back"
    ):
        make(stopped, plugins={"auxiliary-loss": {"z_loss": 0.1}}, resume="auto").train()


def test_state_that_is_not_data_is_refused_with_the_plugins_name(tmp_path):
    class Objects:
        name = "objects"

        @hookimpl
        def extra_checkpoint_state(self, run):
            return {"model": run.model}

    with pytest.raises(CheckpointError, match="objects: checkpoint state is tensors and JSON"):
        make(tmp_path / "run", plugins=[Objects()]).train()


# What a run may not go on with


@pytest.fixture
def stopped(tmp_path):
    """A run that a signal stopped after step 2."""
    with pytest.raises(Interrupted):
        make(tmp_path / "run", plugins=[StopAt(2)], logging_steps=1).train()
    return tmp_path / "run"


def test_other_settings_are_refused_and_all_listed(stopped, capsys):
    capsys.readouterr()
    written = (stopped / "config.yaml").read_bytes()
    with pytest.raises(ConfigurationError) as caught:
        make(stopped, resume="auto", learning_rate=0.5, weight_decay=0.1, logging_steps=2).train()
    assert str(caught.value).splitlines()[1:] == [
        "  train.learning_rate: 0.01 -> 0.5",
        "  train.weight_decay: 0.0 -> 0.1",
        "Take them back to go on, or give another output_dir to begin anew",
    ]
    assert "stands. Go on from it" not in capsys.readouterr().out
    assert (stopped / "config.yaml").read_bytes() == written
    make(stopped, resume="auto").train()  # and the folder is free


@pytest.mark.parametrize("section", ["fsdp", "deepspeed", "peft"])
def test_null_takes_a_section_away_that_the_run_had(tmp_path, section):
    (tmp_path / "config.yaml").write_text(f"stage: sft\ndata: {{train: rows.jsonl}}\n{section}: {{}}\n")
    words = ["sft", f"output_dir={tmp_path}"]
    assert getattr(made(words, "auto").config, section) is not None
    assert getattr(made([*words, f"{section}=null"], "auto").config, section) is None
    assert getattr(Run("sft", output_dir=str(tmp_path), resume="auto", **{section: None}).config, section) is None


@pytest.mark.parametrize(
    "rows", [ROWS[::-1], [*ROWS[:-1], {"text": "another"}]], ids=["in another order", "one row changed"]
)
def test_other_rows_are_refused(stopped, rows):
    with pytest.raises(ConfigurationError, match="the rows themselves: the data has changed"):
        make(stopped, rows=rows, resume="auto").train()


def test_another_stage_is_refused(stopped):
    class Other(Lm):
        name = "other"

    with pytest.raises(ConfigurationError, match="holds a run of stage lm, which other cannot go on with"):
        make(stopped, Other, resume="auto")


def test_a_changed_record_is_refused(stopped):
    (stopped / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl has 0 bytes, the checkpoint knew \d+"):
        make(stopped, resume="auto", logging_steps=1).train()


def test_a_damaged_record_is_refused(stopped):
    file = stopped / "metrics.jsonl"
    whole = file.read_bytes()
    for byte in (b"\xff", b"["):
        file.write_bytes(byte + whole[1:])
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl:1 is damaged"):
            make(stopped, resume="auto", logging_steps=1).train()


def test_lines_after_the_checkpoint_are_cut(stopped):
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1')
    run = make(stopped, resume="auto", logging_steps=1)
    run.train()
    assert series(run, "step") == [1, 2, 3, 4]


def test_a_folder_with_a_run_is_not_written_to(stopped):
    before = {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    with pytest.raises(ConfigurationError, match="holds a run of stage lm"):
        make(stopped).train()
    assert before == {path: path.read_bytes() for path in stopped.iterdir() if path.is_file()}


def test_a_folder_with_files_or_a_file_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").write_text("precious")
    for path, message in (("a", "holds files"), ("a/thesis.txt", "is a file"), ("a/thesis.txt/b", "is a file")):
        with pytest.raises(ConfigurationError, match=message):
            make(tmp_path / path).train()


def test_a_folder_in_use_is_refused(tmp_path):
    class Second:
        name = "second"

        @hookimpl
        def step_finished(self, run, step):
            if step.step == 1:
                with pytest.raises(ConfigurationError, match=f"is in use by process {os.getpid()}"):
                    make(run.output_dir, resume="auto").train()

    make(tmp_path / "run", plugins=[Second()]).train()


@pytest.mark.parametrize(
    ("resume", "message"),
    [("{run}/checkpoints/checkpoint-000009", "there is no such checkpoint"), ("{other}", "belongs to the run in")],
)
def test_a_checkpoint_that_is_not_this_runs_is_refused(stopped, tmp_path, resume, message):
    other = tmp_path / "other" / "checkpoints" / "checkpoint-000001"
    other.mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=message):
        make(stopped, resume=resume.format(run=stopped, other=other))


def test_resuming_needs_a_folder():
    with pytest.raises(ConfigurationError, match="--resume auto needs output_dir"):
        Run(Lm, resume="auto")


def test_metrics_hold_nothing_of_the_clock(tmp_path):
    runs = [make(tmp_path / name, eval=EVAL, logging_steps=1) for name in "ab"]
    for run in runs:
        run.train()
    assert_same_run(*runs)
    assert not {"time", "seconds_per_step", "tokens_per_second"} & {key for line in lines(runs[0]) for key in line}
    assert all(line["tokens_per_second"] > 0 and line["time"] > 1e9 for line in lines(runs[0], "timings"))
    assert weights(runs[0]).keys() == weights(runs[1]).keys()


def test_a_run_whose_configuration_lost_its_stage_is_told(tmp_path):
    folder = tmp_path / "run"
    make(folder, max_steps=1).train()
    stored = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(stored.replace("stage:", "sage:", 1))
    with pytest.raises(ConfigurationError, match="is damaged: it names no stage"):
        Run.open(folder)
