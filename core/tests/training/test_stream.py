"""Runs on data that are read as they go: each row once an epoch, and resumed at a row as if never stopped."""

from __future__ import annotations

import json
import os
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtk import ConfigurationError, LlmtkError, NothingLeft, Run, hookimpl
from llmtk.contract import Data
from llmtk.data import stream
from llmtk.run import Interrupted

from .kit import EVAL, LLAMA, Lm, assert_same_run

TEXTS = [f"row number {n}, {'long ' * (n % 3)}" for n in range(14)]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 5)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in TEXTS))
    return str(path)


class Watching(Lm):
    def __init__(self, options=None):
        super().__init__(options)
        self.seen = []

    def prepare_batch(self, run, rows):
        if run.model.training:
            self.seen.append([int(row["place"].rpartition(":")[2].removeprefix(" row ")) for row in rows])
        return super().prepare_batch(run, rows)


class StopAt:
    name = "stop-at"

    def __init__(self, step):
        self.step = step

    @hookimpl
    def step_finished(self, run, step):
        if step.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def make(path, train, folder, stage=Watching, plugins=(), resume=None, data=None, **settings):
    return Run(
        stage,
        model={"name_or_path": folder},
        data={"train": train, "max_length": 64, "streaming": True, "eval": EVAL, **(data or {})},
        train={"bf16": False, "per_device_train_batch_size": 3, "max_steps": 11, "logging_steps": 1} | settings,
        output_dir=str(path),
        plugins=plugins,
        resume=resume,
    )


def test_each_row_comes_once_an_epoch_shuffled_within_its_block(tmp_path, rows, folder):
    run = make(tmp_path / "run", rows, folder)
    run.train()
    batches = run.stage.seen
    assert [len(batch) for batch in batches] == [3, 3, 3, 3, 2] * 2 + [3]
    first, second = ([row for batch in batches[start : start + 5] for row in batch] for start in (0, 5))
    for epoch in (first, second):
        assert [sorted(epoch[start : start + 5]) for start in (0, 5, 10)] == [
            [1, 2, 3, 4, 5],
            [6, 7, 8, 9, 10],
            [11, 12, 13, 14],
        ]
    assert first != second
    assert run.state.step == 11


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def any_rows(request, rows, tmp_path):
    """The same rows in a file of each kind."""
    path = tmp_path / f"rows.{request.param}"
    if request.param == "csv":
        path.write_text("\n".join(["text", *(f'"{text}"' for text in TEXTS)]))
    if request.param == "parquet":
        pq.write_table(pa.table({"text": TEXTS}), path, row_group_size=4)
    return str(path)


@pytest.mark.parametrize("step", [2, 5, 8])
def test_a_stream_goes_on_at_the_row_where_it_stopped(tmp_path, any_rows, folder, step):
    rows = any_rows
    whole = make(tmp_path / "whole", rows, folder)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / "parts", rows, folder, plugins=[StopAt(step)]).train()
    parts = make(tmp_path / "parts", rows, folder, resume="auto")
    parts.train()
    assert_same_run(whole, parts)


class Answers(Watching):
    row_types = ("prompt_completion",)


def test_a_block_of_which_nothing_is_left_is_passed_over_but_for_the_first(tmp_path, folder, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a" * (70 if 5 <= n < 10 else 1), "completion": "b"} for n in range(12)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = make(tmp_path / "run", str(path), folder, stage=Answers, data={"eval": rows[:1]}, max_steps=3)
    run.train()
    assert [len(batch) for batch in run.stage.seen] == [3, 3, 1]
    assert "left out" not in capsys.readouterr().out
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[5:]))
    with pytest.raises(NothingLeft, match=r"^data\.train: No row is left, of 5"):
        make(tmp_path / "none", str(path), folder, stage=Answers, data={"eval": rows[:1]}).train()


def test_an_epoch_whose_last_block_is_left_out_ends_with_the_block_before(tmp_path, folder):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a" * (70 if n >= 5 else 1), "completion": "b"} for n in range(7)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    run = make(
        tmp_path / "run",
        str(path),
        folder,
        stage=Answers,
        data={"eval": rows[:1]},
        max_steps=2,
        per_device_train_batch_size=5,
    )
    run.train()
    assert [len(batch) for batch in run.stage.seen] == [5, 5]
    assert (run.state.skipped, run.order.epochs) == (0, 2)


def test_data_that_have_another_size_are_refused(tmp_path, rows, folder):
    with pytest.raises(Interrupted):
        make(tmp_path / "run", rows, folder, plugins=[StopAt(2)]).train()
    with open(rows, "a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(LlmtkError, match="the data has changed"):
        make(tmp_path / "run", rows, folder, resume="auto").train()


class Own(Lm):
    name = "own"

    def build_data(self, run):
        data = super().build_data(run)
        return Data(data.train, data.eval)


class Curriculum:
    name = "curriculum"

    @hookimpl
    def order_examples(self, run, epoch):
        return None


def test_what_needs_all_rows_is_refused(tmp_path, rows, folder):
    with pytest.raises(ConfigurationError, match=r"needs train\.max_steps"):
        make(tmp_path / "a", rows, folder, max_steps=-1).train()
    with pytest.raises(ConfigurationError, match="stage own needs all rows before the first step"):
        make(tmp_path / "b", rows, folder, stage=Own).train()
    with pytest.raises(ConfigurationError, match=r"data\.streaming: a plugin orders the rows"):
        make(tmp_path / "c", rows, folder, plugins=[Curriculum()]).train()
    with pytest.raises(ConfigurationError, match="trained on the data, needs all rows"):
        Run(
            Lm,
            model={"from_config": LLAMA, "tokenizer": {"kind": "byte"}},
            data={"train": rows, "streaming": True},
            train={"max_steps": 2},
            output_dir=str(tmp_path / "d"),
        ).train()
