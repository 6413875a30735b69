"""Perplexity and token accuracy against a plain forward pass, for stages that have them and those that do not."""

from __future__ import annotations

import json

import pytest
import torch

from llmtk import DatasetError, Group, LossOutput, Mean, Round, Sequence, Stage, Term
from llmtk.run import evaluate_run
from llmtk.training.language import evaluate_all

from .kit import EVAL, Lm, make

PAIRS = [
    {"prompt": "2+2=", "chosen": "4", "rejected": "no idea"},
    {"prompt": "one and", "chosen": "two, three", "rejected": "x"},
    {"prompt": "to be", "chosen": "or not", "rejected": "hm"},
]


class Chosen(Stage):
    """A stage of pairs, with a metric of its own."""

    name = "chosen"
    summary = "Learns chosen answers"
    row_types = ("pair",)

    def prepare_batch(self, run, rows):
        return Round.of([Group([self.sequence(row)], {"pairs": 1}, place=row["place"]) for row in rows])

    def sequence(self, row):
        ids = [*row["prompt_ids"], *row["chosen_ids"]]
        return Sequence(ids, [False] * len(row["prompt_ids"]) + list(row["chosen_targets"]))

    def compute_loss(self, run, batch):
        sums = run.score(batch).sum()
        return LossOutput({"loss": Term(-sums.sum(), per="pairs")}, {"logps": Mean(sums.detach().sum(), len(sums))})


def by_hand(run, sequences):
    """Return perplexity and token accuracy of (ids, index of the first target), each by itself."""
    nll, right, count = 0.0, 0, 0
    for ids, first in sequences:
        with torch.no_grad():
            logps = run.model.eval()(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for at in range(first, len(ids)):
            nll -= float(logps[at - 1, ids[at]])
            right += int(logps[at - 1].argmax() == ids[at])
            count += 1
    return {
        "perplexity": pytest.approx(torch.tensor(nll / count).exp().item(), rel=1e-5),
        "token_accuracy": right / count,
    }


def texts(run, rows, length=64):
    """Return documents as they are cut at a length."""
    ids = [run.tokenizer(row["text"])["input_ids"] for row in rows]
    return [(part[start : start + length], 1) for part in ids for start in range(0, len(part), length)]


def test_a_stage_without_them_gets_them_on_what_it_wants_written(tmp_path):
    run = make(tmp_path / "run", Chosen, rows=PAIRS, eval=PAIRS[:2])
    run.train()
    values = evaluate_all(run)
    rows = [run.eval_rows[i] for i in range(2)]
    expected = by_hand(run, [([*row["prompt_ids"], *row["chosen_ids"]], len(row["prompt_ids"])) for row in rows])
    assert {name: values[name] for name in expected} == expected
    assert values.keys() == {*expected, "loss", "logps"}
    assert evaluate_all(run, PAIRS[:2]) == values


def test_what_is_of_no_use_to_the_stage_is_measured_as_text(tmp_path, capsys):
    run = make(tmp_path / "run", Chosen, rows=PAIRS)
    run.train()
    long = [*EVAL, {"text": "a document of more tokens than the model takes at once, " * 3}]
    assert evaluate_all(run, long) == by_hand(run, texts(run, long))
    assert (
        "Stage chosen measures rows of type pair, which these are not: no metric of its own" in capsys.readouterr().out
    )
    with pytest.raises(DatasetError, match=r"Rows of type pair are needed|fit no format"):
        evaluate_all(run, [{"nothing": "known"}])


def test_a_stages_own_figures_stay(tmp_path):
    run = make(tmp_path / "run", Lm, eval=EVAL)
    run.train()
    own = run.evaluate()
    values = evaluate_all(run)
    assert {name: values[name] for name in own} == own
    assert values["token_accuracy"] == by_hand(run, texts(run, EVAL))["token_accuracy"]


def test_a_run_on_disk_is_measured_on_its_own_rows_and_on_a_file(tmp_path):
    file = tmp_path / "eval.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in EVAL))
    run = make(tmp_path / "run", "pt", rows=str(file), eval=str(file))
    run.train()
    values = evaluate_run(str(tmp_path / "run"))
    assert values == evaluate_run(str(tmp_path / "run"), str(file))
    blocks = [(list(row["input_ids"]), 1) for row in (run.eval_rows[i] for i in range(len(run.eval_rows)))]
    expected = by_hand(run, blocks)
    assert {name: values[name] for name in expected} == expected
    assert values["loss"] == pytest.approx(torch.tensor(values["perplexity"]).log().item(), rel=1e-5)
