"""What a run does at all (do_train, do_eval), what it says of itself (log_level, run.log), and how its ranks talk."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from llmtk import ConfigurationError, Run, hookimpl
from llmtk.config.sections import TrainConfig
from llmtk.training import backend

from .kit import EVAL, Lm, lines, make, series

# do_train and do_eval


def test_without_training_the_model_is_evaluated_as_it_is(tmp_path, folder, capsys):
    result = make(tmp_path / "run", model=folder, eval=EVAL, do_train=False).train()
    elsewhere = make(tmp_path / "other", model=folder, eval=EVAL, max_steps=1, learning_rate=0.0).train()
    assert result.metrics == pytest.approx(elsewhere.metrics)
    assert (result.steps, result.final_loss) == (0, None)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"results.json", "metrics.jsonl", "run.log", "config.yaml"} <= left
    assert not left & {"model.safetensors", "checkpoints", "README.md", "loss.png"}
    assert json.loads((tmp_path / "run" / "results.json").read_text())["metrics"] == result.metrics
    said = capsys.readouterr().out
    assert "steps      none (train.do_train: false)" in said
    assert "Done: 3 rows evaluated" in said
    with pytest.raises(ConfigurationError, match="trained nothing: there is no model in it"):
        Run.open(tmp_path / "run")


def test_without_training_there_must_be_something_to_evaluate(tmp_path):
    with pytest.raises(ConfigurationError, match="do_train: false needs evaluation data"):
        make(tmp_path / "run", do_train=False).train()
    with pytest.raises(ConfigurationError, match="do_train: false evaluates, and do_eval: false"):
        make(tmp_path / "run", eval=EVAL, do_train=False, do_eval=False)


def test_a_run_does_not_go_on_without_training(tmp_path):
    make(tmp_path / "run", max_steps=1).train()
    with pytest.raises(ConfigurationError, match="llmtk evaluate RUN"):
        make(tmp_path / "run", max_steps=1, eval=EVAL, do_train=False, resume="auto")


def test_do_eval_false_makes_no_evaluation(tmp_path):
    run = make(tmp_path / "run", eval=EVAL, do_eval=False)
    run.train()
    assert series(run, "loss")
    assert not series(run, "eval_loss")
    assert make(tmp_path / "again", resume=None, eval=EVAL).train().metrics
    with pytest.raises(ConfigurationError, match="do_eval: false and eval_strategy: steps exclude each other"):
        make(tmp_path / "other", eval=EVAL, do_eval=False, eval_strategy="steps")
    with pytest.raises(ConfigurationError, match="needs evaluations, and do_eval: false makes none"):
        make(tmp_path / "other", eval=EVAL, do_eval=False, load_best_model_at_end=True).train()


# The log


class Speaks(Lm):
    """Logs as a library would, at each level."""

    def build_models(self, run):
        run.notify("here I am")
        for level in (logging.DEBUG, logging.INFO, logging.ERROR):
            logging.getLogger("peft.tuners").log(level, "peft at %d", level)
        return super().build_models(run)


def log_of(run):
    return (run.output_dir / "run.log").read_text()


def test_the_log_has_what_the_run_said_before_and_after_it_had_a_folder(tmp_path, capsys):
    run = make(tmp_path / "run", Speaks, logging_steps=2)
    run.train()
    said, log = capsys.readouterr().out.splitlines(), log_of(run)
    assert all(line in log for line in said)
    assert log.index("here I am") < log.index("stage      lm") < log.index("step 2/4") < log.index("Done: 4 steps")
    assert not logging.getLogger("llmtk").handlers


KEPT = {"passive": [40], "info": [20, 40], "debug": [10, 20, 40], "critical": []}


@pytest.mark.parametrize(("level", "kept"), KEPT.items())
def test_log_level_is_that_of_the_libraries(tmp_path, level, kept):
    before = logging.getLogger("peft").level
    run = make(tmp_path / "run", Speaks, max_steps=1, log_level=level)
    run.train()
    assert [number for number in (10, 20, 40) if f"peft.tuners: peft at {number}" in log_of(run)] == kept
    assert logging.getLogger("peft").level == before


class Fails:
    name = "fails"

    def __init__(self, error):
        self.error = error

    @hookimpl
    def step_finished(self, run, step):
        raise self.error


def test_the_log_says_why_a_run_failed_and_a_resumed_run_writes_behind_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "hf_abcdefgh")
    with pytest.raises(Exception, match="hf_abcdefgh"):
        make(tmp_path / "run", plugins=[Fails(KeyError("with hf_abcdefgh"))], max_steps=1).train()
    run = make(tmp_path / "run", resume="auto", max_steps=1)
    run.train()
    log = log_of(run)
    assert "ERROR llmtk: PluginError" in log
    assert log.index("ERROR") < log.index("Done: 1 step,")
    assert "hf_abcdefgh" not in log
    assert "${SOME_TOKEN}" in log


# Hardware, said before anything is loaded


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")


def test_bfloat16_on_an_old_gpu_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    old_gpu(monkeypatch)
    run = make(tmp_path / "run", rows=str(tmp_path / "missing.jsonl"), bf16=True)
    with pytest.raises(ConfigurationError, match=r"Tesla P100 has no bfloat16\. Use fp16: true, or bf16: false"):
        run.train()


@pytest.mark.parametrize(
    ("settings", "has", "precision", "why"),
    [
        ({}, "old GPU", "no", "the device has no bfloat16"),
        ({"bf16": False}, "old GPU", "no", "train.bf16"),
        ({"fp16": True}, "old GPU", "fp16", "train.fp16"),
        ({}, "units", "bf16", "this CPU has bfloat16 matrix units"),
        ({}, "none", "no", "this CPU has no bfloat16 matrix units"),
        ({"bf16": True}, "none", "bf16", "train.bf16"),
    ],
)
def test_precision_by_default_is_what_the_device_has(monkeypatch, settings, has, precision, why):
    if has == "old GPU":
        old_gpu(monkeypatch)
    else:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has == "units")
    assert backend.choose_precision(TrainConfig(**settings)) == (precision, why)


def test_float16_without_a_gpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigurationError, match="fp16 needs a CUDA device"):
        make(tmp_path / "run", bf16=None, fp16=True, rows=str(tmp_path / "missing.jsonl")).train()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has a precision of its own")
def test_the_plan_says_the_precision_and_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    make(tmp_path / "run", bf16=None, max_steps=1).train()
    assert "compute    float32 (this CPU has no bfloat16 matrix units) on cpu x 1" in capsys.readouterr().out


# Ranks


def test_the_ranks_talk_through_what_is_asked_for():
    made = backend.Backend(TrainConfig(bf16=False, ddp_backend="gloo"))
    assert made.accelerator.init_handler.backend == "gloo"
    assert backend.Backend(TrainConfig(bf16=False)).accelerator.init_handler is None


@pytest.mark.parametrize(
    ("name", "said"),
    [("nccl", "nccl is for CUDA devices"), ("mpi", "built without mpi"), ("hccl", "built without hccl")],
)
def test_what_the_ranks_cannot_talk_through_is_refused(monkeypatch, name, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name in ("gloo", "nccl"))
    with pytest.raises(ConfigurationError, match=said):
        backend.Backend(TrainConfig(bf16=False, ddp_backend=name))


def test_unused_parameters_are_looked_for_where_it_is_asked():
    for wanted in (False, True):
        made = backend.Backend(TrainConfig(bf16=False, ddp_find_unused_parameters=wanted))
        assert made.accelerator.ddp_handler.find_unused_parameters is wanted


def test_seeds_draw_the_weights_and_the_order_apart(tmp_path):
    first, other, shuffled = (
        make(tmp_path / str(seeds), logging_steps=1, learning_rate=0.0, max_steps=3, **seeds)
        for seeds in ({"seed": 1}, {"seed": 2, "data_seed": 1}, {"seed": 1, "data_seed": 2})
    )
    for run in (first, other, shuffled):
        run.train()
    tokens = [series(run, "tokens") for run in (first, other, shuffled)]
    assert tokens[0] == tokens[1] != tokens[2]
    drawn = [run.model.lm_head.weight for run in (first, other, shuffled)]
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert len(lines(first)) == 3


# What had no test of its own


class CountsEvaluations(Lm):
    """Counts the rows of each micro-batch of an evaluation."""

    def evaluate_batch(self, run, batch):
        self.rows = [*getattr(self, "rows", []), len(batch)]
        return super().evaluate_batch(run, batch)


@pytest.mark.parametrize(("size", "rows"), [(1, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_evaluations_have_micro_batches_of_their_own_size(tmp_path, size, rows):
    run = make(tmp_path / "run", CountsEvaluations, eval=EVAL, max_steps=1, per_device_eval_batch_size=size)
    run.train()
    assert run.stage.rows == rows


@pytest.mark.parametrize(
    ("saving", "steps"),
    [
        ({"save_strategy": "epoch"}, [3, 6, 7]),
        ({"save_strategy": "steps", "save_steps": 2}, [2, 4, 6, 7]),
        ({"save_strategy": "no"}, [7]),
        ({"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}, [6, 7]),
    ],
    ids=["epoch", "steps", "no", "few"],
)
def test_checkpoints_are_written_when_it_is_asked(tmp_path, saving, steps):
    run = make(tmp_path / "run", max_steps=7, **saving)
    run.train()
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [f"checkpoint-{step:06d}" for step in steps]


@pytest.mark.parametrize("which", ["auto", "path"])
def test_resume_from_checkpoint_is_the_same_as_resume(tmp_path, which):
    make(tmp_path / "run", max_steps=2, logging_steps=1).train()
    name = str(tmp_path / "run" / "checkpoints" / "checkpoint-000002") if which == "path" else which
    run = make(tmp_path / "run", max_steps=3, logging_steps=1, resume_from_checkpoint=name)
    assert run.train().steps == 3
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


@pytest.mark.parametrize(("settings", "name"), [({"run_name": "trial"}, "trial"), ({}, "run")])
def test_trackers_know_the_run_by_its_name(tmp_path, settings, name):
    run = make(tmp_path / "run", report_to=["tensorboard"], max_steps=1, **settings)
    run.train()
    (file,) = run.output_dir.rglob("events.out.tfevents*")
    assert name in file.relative_to(run.output_dir).parts
