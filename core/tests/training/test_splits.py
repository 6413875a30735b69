"""A run on sources with weights, and its test split."""

from __future__ import annotations

import json

import pytest

from llmtk import ConfigurationError, NothingLeft, Run, hookimpl

from .kit import EVAL, LLAMA, ROWS, Lm, make

TESTED = [{"text": "a text that nobody has seen"}, {"text": "and another"}]


class Answers(Lm):
    row_types = ("prompt_completion",)


def run_on(path, stage=Lm, **data):
    return Run(
        stage,
        model={"from_config": LLAMA, "tokenizer": {"kind": "byte"}},
        data={"max_length": 64, **data},
        train={"bf16": False, "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2},
        output_dir=str(path),
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_finished_model_is_tested_once_on_rows_of_their_own(tmp_path):
    run = run_on(tmp_path / "run", train=ROWS, eval=EVAL, test=TESTED)
    result = run.train()
    assert result.metrics["test_loss"] == run.evaluate(TESTED)["loss"]
    assert result.metrics["test_perplexity"] > 1
    assert "eval_loss" in result.metrics
    written = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert written["test_loss"] == result.metrics["test_loss"]
    assert "test_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_testing_changes_nothing_of_the_training(tmp_path):
    plain = run_on(tmp_path / "a", train=ROWS, eval=EVAL)
    tested = run_on(tmp_path / "b", train=ROWS, eval=EVAL, test=TESTED)
    assert plain.train().metrics["eval_loss"] == tested.train().metrics["eval_loss"]


def test_an_epoch_of_a_mixture_has_each_row_as_often_as_its_source_weighs(tmp_path):
    seen = []

    class Watching(Lm):
        def prepare_batch(self, run, rows):
            if run.model.training:
                seen.extend(row["place"] for row in rows)
            return super().prepare_batch(run, rows)

    twice, once = write(tmp_path / "a.jsonl", ROWS[:4]), write(tmp_path / "b.jsonl", ROWS[4:])
    sources = [{"path": twice, "weight": 2}, once]
    run = Run(
        Watching,
        model={"from_config": LLAMA, "tokenizer": {"kind": "byte"}},
        data={"train": sources, "max_length": 64},
        train={"bf16": False, "per_device_train_batch_size": 4, "num_train_epochs": 1},
        output_dir=str(tmp_path / "run"),
    )
    assert run.train().steps == 4
    assert {place: seen.count(place) for place in seen} == {
        **{f"{twice}:{n}": 2 for n in range(1, 5)},
        **{f"{once}:{n}": 1 for n in range(1, 9)},
    }


def test_data_can_be_looked_at_without_a_model_and_nothing_is_written(tmp_path):
    run = make(tmp_path / "run", rows=ROWS, eval=EVAL)
    data = run.load_data()
    assert (len(data.train), len(data.eval), data.test) == (12, 3, None)
    assert not hasattr(run, "model")
    assert not (tmp_path / "run").exists()


def test_what_becomes_of_rows_is_said_of_each_split_and_of_each_source_with_a_weight(tmp_path, capsys):
    rows = [{"prompt": "a" * 30, "completion": "b" * 70}, {"prompt": "a", "completion": "b"}]
    heavy, light = write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", rows)
    run_on(tmp_path / "run", stage=Answers, train=rows, eval=rows, test=rows[1:]).load_data()
    cut = "Rows cut at max_length, 64 tokens: 1."
    assert capsys.readouterr().out.splitlines() == [f"data.train: {cut}", f"data.eval: {cut}"]
    run_on(tmp_path / "run", stage=Answers, train=[{"path": heavy, "weight": 2}, light]).load_data()
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"data.train, {heavy}: {cut}", f"data.train, {light}: {cut}"]


def test_a_split_of_which_nothing_is_left_is_named(tmp_path):
    long = [{"prompt": "a" * 70, "completion": "b"}]
    with pytest.raises(NothingLeft) as caught:
        run_on(tmp_path / "run", stage=Answers, train=[{"prompt": "a", "completion": "b"}], eval=long).load_data()
    assert str(caught.value) == (
        "data.eval: No row is left, of 1.\nRows left out, no target within max_length, 64: 1 (row 1)."
    )


class Curriculum:
    name = "curriculum"

    @hookimpl
    def order_examples(self, run, epoch):
        return None


def test_a_plugin_orders_no_mixture(tmp_path):
    source = {"path": write(tmp_path / "a.jsonl", ROWS), "weight": 2}
    run = make(tmp_path / "run", rows=[source], plugins=[Curriculum()])
    with pytest.raises(ConfigurationError, match=r"sources with weights .*: a plugin orders the rows"):
        run.train()


def test_other_data_are_evaluated_under_the_runs_names_of_columns_or_llmtks(tmp_path):
    run = run_on(tmp_path / "run", train=[{"content": row["text"]} for row in ROWS], columns={"content": "text"})
    run.train()
    assert run.evaluate([{"content": "held out"}]) == run.evaluate([{"text": "held out"}])
