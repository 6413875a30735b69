"""What a person reads: numbers, and lines that are too long."""

from __future__ import annotations

import pytest

from llmtk.reporting.console import Console, counted, decimal, wrapped


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.5, "0.5000"), (-12.34567, "-12.3457"), (15879926448128.0, "1.59e+13"), (float("inf"), "inf")],
)
def test_a_huge_number_is_told_by_its_first_digits(value, told):
    assert decimal(value) == told


def test_a_line_of_the_log_stays_short(capsys):
    line = {"step": 1, "epoch": 0.5, "loss": 3.2e38, "grad_norm": 15879926448128.0, "learning_rate": 1000.0}
    Console().log(line, 2, 1234.5)
    assert capsys.readouterr().out == (
        "step 1/2  loss 3.2e+38  grad_norm 1.59e+13  lr 1.00e+03  epoch 0.50  1,234 tokens/s\n"
    )


def test_one_is_not_several():
    assert (counted(1, "row"), counted(0, "row"), counted(1000, "row")) == ("1 row", "0 rows", "1,000 rows")


def test_a_line_of_a_plan_goes_on_below_what_it_says_on_a_terminal(monkeypatch, capsys):
    line = "plugins    ema (llmtk-plugin-ema 0.1.0), early-stopping (llmtk-plugin-early-stopping 0.1.0)"
    assert wrapped(line) == line, "in a pipe a line stays one"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    assert wrapped(line).splitlines() == [
        "plugins    ema (llmtk-plugin-ema 0.1.0), early-stopping",
        "           (llmtk-plugin-early-stopping 0.1.0)",
    ]
    assert wrapped("No plan begins with such a sentence, which goes on at the margin").splitlines()[1] == "margin"
    path = f"output     /{'a' * 80}"
    assert path.split()[1] in wrapped(path).splitlines()[-1], "a path is never broken"
