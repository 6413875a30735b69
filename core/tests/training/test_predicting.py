"""What a run predicts with its finished model: the same as llmtk predict, killed and resumed, and what is refused."""

from __future__ import annotations

import json
import os
import signal

import pytest

from llmtk import ConfigurationError, DatasetError, PluginError, Run
from llmtk.inference import LanguageModel
from llmtk.inference.predictions import Output, open_output, predict
from llmtk.inference.prompts import read_prompts
from llmtk.training.loop import Interrupted

from .kit import LLAMA, ROWS, Lm

QUESTIONS = [{"prompt": f"{number} + 1 =", "answer": "to be"} for number in range(11)]
SETTINGS = {"max_new_tokens": 5, "seed": 3}


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a run which predicts, four rows at a time; keywords are under `predict`."""
    asked = write(tmp_path / "asked.jsonl", QUESTIONS)

    def made(name="run", *, stage=Lm, rows=ROWS, test=None, train=None, resume=None, **predict):
        return Run(
            stage,
            model={"from_config": LLAMA, "tokenizer": {"kind": "byte"}},
            data={"train": rows, "test": test, "max_length": 64},
            train={"bf16": False, "max_steps": 2, "learning_rate": 1e-2, "do_predict": True} | (train or {}),
            predict={"data": None if test else asked, **SETTINGS} | predict,
            generation={"batch_size": 1},
            output_dir=str(tmp_path / name),
            resume=resume,
        )

    return made


def predictions(run):
    return (run.output_dir / "predictions.jsonl").read_bytes()


def results(run):
    return json.loads((run.output_dir / "results.json").read_text())["metrics"]


def test_the_finished_model_answers_as_it_does_when_it_is_asked_later(make, tmp_path):
    pytest.importorskip("llmtk_text_metrics")
    run = make("run", temperature=0.0, metrics=["exact_match"])
    result = run.train()
    assert list(result.metrics) == ["predict_exact_match"]
    model = LanguageModel(run.output_dir)
    model._half = False
    with open_output(str(tmp_path / "later.jsonl")) as output:
        rows, _ = read_prompts(str(tmp_path / "asked.jsonl"))
        predict(model, rows, model.sampling(temperature=0.0, **SETTINGS), output)
    assert predictions(run) == (tmp_path / "later.jsonl").read_bytes()
    assert [json.loads(line)["answer"] for line in predictions(run).splitlines()] == ["to be"] * 11


class Completions(Lm):
    """Learns completions behind prompts."""

    row_types = ("prompt_completion",)

    def prepare_batch(self, run, rows):
        return super().prepare_batch(run, [{"input_ids": row["input_ids"], "place": row["place"]} for row in rows])


def test_the_test_split_is_answered_where_no_file_is_named(make):
    pairs = [{"prompt": f"{number} + 1 =", "completion": str(number + 1)} for number in range(8)]
    run = make(stage=Completions, rows=pairs[:4], test=pairs[4:])
    metrics = run.train().metrics
    assert "test_loss" in metrics
    lines = [json.loads(line) for line in predictions(run).splitlines()]
    assert [(line["prompt"], line["reference"]) for line in lines] == [tuple(pair.values()) for pair in pairs[4:]]
    assert all(len(line["completion"]) <= 5 for line in lines)


@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_that_ends_while_it_predicts_goes_on_to_the_same(make, monkeypatch, how):
    whole = make("whole")
    whole.train()
    written, real = [], Output.write

    def ending(self, lines):
        real(self, lines)
        written.append(len(lines))
        if how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif len(written) == 1:
            self.stream.write('{"prompt": "half a')
            raise KeyboardInterrupt

    run = make("run")
    with monkeypatch.context() as patched:
        patched.setattr(Output, "write", ending)
        with pytest.raises(Interrupted if how == "SIGTERM" else KeyboardInterrupt) as error:
            run.train()
    assert written == [4]
    if how == "SIGTERM":
        assert "SIGTERM stopped the predictions after 4 of 11 rows. Go on with: llmtk run lm" in str(error.value)
    assert not (run.output_dir / "results.json").exists()

    answered = []
    resumed = make("run", resume="auto")
    monkeypatch.setattr(Output, "write", lambda self, lines: (answered.append(len(lines)), real(self, lines)))
    resumed.train()
    assert answered == [4, 3]
    assert predictions(resumed) == predictions(whole)
    assert results(resumed) == results(whole)


def test_another_model_answers_anew(make):
    before = make()
    before.train()
    first = predictions(before)
    after = make(train={"max_steps": 4}, resume="auto")
    after.train()
    assert predictions(after) != first
    assert len(predictions(after).splitlines()) == len(QUESTIONS)


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({}, False),
        ({"metrics": []}, False),
        ({"train": {"greater_is_better": True}}, True),
        ({"seed": 1}, True),
    ],
    ids=["the same", "other metrics", "another model", "another draw"],
)
def test_a_resumed_run_answers_anew_where_answers_would_be_others(make, monkeypatch, changes, anew):
    run = make()
    run.train()
    (run.output_dir / "results.json").unlink()  # as if it had been killed just before
    answered, real = [], Output.write
    monkeypatch.setattr(Output, "write", lambda self, lines: (answered.append(len(lines)), real(self, lines)))
    make(resume="auto", **changes).train()
    assert answered == ([4, 4, 3] if anew else [])


class Judge(Lm):
    head = "value"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"do_predict": False}}, "predict is for train.do_predict: true; set it, or take the section out"),
        ({"stage": Judge}, "train.do_predict: a model of stage lm has a head of one value, and writes no text"),
        ({"data": None}, "train.do_predict needs rows to answer: give data.test"),
        ({"metrics": ["no-such-metric"]}, "no-such-metric"),
    ],
)
def test_what_cannot_be_predicted_is_refused_before_anything_is_loaded(make, monkeypatch, changes, said):
    monkeypatch.setattr("llmtk.data.read_splits", lambda *_, **__: pytest.fail("read"))
    run = make(**changes)
    with pytest.raises((ConfigurationError, PluginError), match=said):
        run.train()
    assert not run.output_dir.exists()


def test_settings_that_cannot_be_are_refused_at_once(make):
    with pytest.raises(ConfigurationError, match=r"predict\.top_p: .*2"):
        make(top_p=2)
    with pytest.raises(ConfigurationError, match="stop_strings has an empty text"):
        make(stop_strings=[""])
    with pytest.raises(ConfigurationError, match="do_train: false leaves no trained model to predict with"):
        make(train={"do_train": False})


def test_questions_that_cannot_be_asked_are_named_before_training(make, monkeypatch, tmp_path):
    monkeypatch.setattr("llmtk.training.loop.train", lambda run: pytest.fail("trained"))
    for changes, said in [
        ({"test": ROWS[:2]}, "row 1: a row of type text cannot become one of prompt"),
        ({"data": write(tmp_path / "bad.jsonl", [{"prompt": ""}])}, r"bad\.jsonl:1: prompt is empty"),
        ({"data": write(tmp_path / "long.jsonl", [{"prompt": "x" * 64}])}, "1 of 1 prompts leave no room to answer"),
        ({"reference": "right"}, "predict.reference right: no row has such a column; there are prompt, answer"),
        ({"data": str(tmp_path / "none.jsonl")}, "none.jsonl"),
    ]:
        with pytest.raises((ConfigurationError, DatasetError), match=said):
            make(**changes).train()


def test_lines_of_other_questions_are_not_gone_on_with(make, tmp_path):
    make().train()
    (tmp_path / "run" / "results.json").unlink()  # as if it had been killed just before
    write(tmp_path / "asked.jsonl", [{"prompt": "0 + 1 =", "answer": "changed"}])
    with pytest.raises(ConfigurationError, match=r"holds 11 rows, and the data has 1: .* Remove it, and go on with"):
        make(resume="auto").train()
