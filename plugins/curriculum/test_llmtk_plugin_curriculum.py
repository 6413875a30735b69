"""Orders against what they promise, for drawn difficulties and for a run; and that a resumed run keeps its order."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llmtk_plugin_curriculum import Curriculum, by_difficulty, losses
from pydantic import ValidationError

from llmtk import ConfigurationError, Round, Run, hookimpl
from llmtk.training.order import shuffled

ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}" + " and more" * (n % 5)} for n in range(20)]


@settings(max_examples=100, deadline=None)
@given(
    difficulty=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    size=st.integers(1, 7),
    limits=st.lists(st.integers(0, 9), min_size=40, max_size=40),
)
def test_an_order_takes_what_is_open_in_the_usual_order(difficulty: list[int], size: int, limits: list[int]) -> None:
    hard, usual, open_to = np.array(difficulty, dtype=float), shuffled(len(difficulty), 3, 1), sorted(limits)
    order = by_difficulty(hard, usual, size, lambda batch: open_to[batch])
    assert sorted(order) == list(range(len(difficulty)))
    # The same by the definition, one row at a time: the first open one, else the easiest, then all as easy are open.
    left, opened = list(usual), -1.0
    for position, row in enumerate(order):
        opened = max(opened, open_to[position // size])
        ready = [other for other in left if hard[other] <= opened]
        if not ready:
            easiest = min(hard[other] for other in left)
            ready = [next(other for other in left if hard[other] == easiest)]
        assert row == ready[0]
        left.remove(row)


def test_with_all_rows_open_the_order_is_the_usual_one() -> None:
    usual = shuffled(50, 1, 2)
    assert by_difficulty(np.arange(50.0), usual, 4, lambda batch: np.inf) == usual.tolist()


class Lengths:
    """Notes the lengths of the rows of each step."""

    name = "lengths"

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []
        self.places: list[str] = []

    @hookimpl
    def around_prepare_batch(self, run: Any, rows: Any, inner: Any) -> Any:
        self.lengths.append([row["length"] for row in rows])
        self.places += [row["place"] for row in rows]
        return inner(rows)


def make(folder: Path, options: dict[str, Any], plugins: Any = (), resume: str | None = None, **train: Any) -> Run:
    from llmtk.host.manager import load_plugins

    loaded = [plugin for _, plugin in load_plugins({"curriculum": options})]
    for plugin in loaded:
        plugin.name = "curriculum"
    keys = {"max_steps": 10, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-2, "save_steps": 1}
    return Run(
        "sft", model="builtin", data=ROWS, train=keys | train, plugins=[*loaded, *plugins], output_dir=str(folder),
        resume=resume,
    )  # fmt: skip


def test_short_rows_come_first(tmp_path: Path) -> None:
    seen = Lengths()
    make(tmp_path, {"steps": 5, "start_length": 1}, [seen]).train()
    longest = [max(lengths) for lengths in seen.lengths]
    assert longest[:5] == sorted(longest[:5])
    assert max(longest[:2]) < max(longest)
    assert longest[5] == longest[6] or len(set(longest[5:])) > 1  # the second epoch is shuffled as usual
    assert len(set(seen.places[:20])) == 20


def test_steps_are_optimizer_steps_where_a_round_makes_several(monkeypatch: pytest.MonkeyPatch) -> None:
    difficulty = np.arange(40.0)
    monkeypatch.setattr(Curriculum, "_difficulty", lambda self, run: difficulty)

    def order(steps: int, windows: int) -> list[int]:
        plugin = Curriculum(Curriculum.Options(steps=steps, start_length=4))
        run: Any = SimpleNamespace(data_seed=3, global_rows=4, windows_per_round=windows)
        return plugin._ordered(run, 0)

    assert order(steps=32, windows=4) == order(steps=8, windows=1)
    assert order(steps=32, windows=4) != order(steps=32, windows=1)


def test_the_loss_of_a_row_is_the_models_own(tmp_path: Path) -> None:
    run = make(tmp_path, {"steps": 5, "start_length": 1})
    run._set_up()
    found = losses(run)
    for index in (0, 7, 19):
        row = run.train_rows[index]
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            logps = run.model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        wanted = -logps[torch.tensor(row["targets"])[1:]].mean()
        assert found[index] == pytest.approx(float(wanted), rel=1e-4)


def test_a_resumed_run_keeps_the_order_that_the_loss_gave(tmp_path: Path) -> None:
    options = {"by": "loss", "steps": 8, "start_share": 0.2}
    seen = Lengths()
    make(tmp_path / "run", options, [seen]).train()
    again = Lengths()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-000002"
    make(tmp_path / "run", options, [again], resume=str(checkpoint)).train()
    # As an epoch begins all 20 rows are measured, then trained on; the first epoch's are not measured again.
    assert len(seen.places) == 2 * (20 + 20)
    assert again.places == seen.places[20 + 2 * 4 :]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 5, "by": "column"}, "by: column needs `column`"),
        ({"steps": 5, "column": "margin"}, "column is not used with by: length"),
        ({"steps": 5, "start_length": 9, "end_length": 3}, "end_length is below start_length"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Curriculum.Options(**options)


@pytest.mark.parametrize(("column", "said"), [("nothing", "no column 'nothing'"), ("place", "does not hold a number")])
def test_a_column_that_is_no_difficulty(tmp_path: Path, column: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        make(tmp_path, {"steps": 5, "by": "column", "column": column}).train()


PROMPTS = [{"prompt": f"{n} + 1 =", "answer": str(n + 1)} for n in range(8)]
PAIRS = [{"prompt": f"{n} + 1 =", "chosen": str(n + 1), "rejected": str(n)} for n in range(8)]


@pytest.mark.parametrize(
    ("stage", "rows", "options", "said"),
    [
        ("sft", ROWS, {"by": "column", "column": "nothing"}, "no column 'nothing'"),
        ("sft", ROWS, {"start_length": 64}, r"would do nothing: the longest row has \d+ tokens"),
        ("pt", [{"text": "a document " * 30}], {}, r"no column 'length'.* Blocks of text have no length; use by: loss"),
        ("rm", PAIRS, {"by": "loss"}, "a model of stage rm has a head of one value"),
        ("grpo", PROMPTS, {"by": "loss"}, "stage grpo writes them itself"),
    ],
)
def test_a_plan_refuses_what_gives_no_order(tmp_path: Path, stage: str, rows: Any, options: Any, said: str) -> None:
    own = {"grpo": {"rewards": ["exact_match"]}} if stage == "grpo" else {}
    plugins = {"curriculum": {"steps": 5} | options}
    run = Run(stage, model="builtin", data=rows, plugins=plugins, output_dir=str(tmp_path), **own)
    with pytest.raises(ConfigurationError, match=said):
        run.prepare()
    assert not hasattr(run, "model"), "it is refused before a model is loaded"


def test_the_losses_of_a_round_are_read_from_all_of_its_windows(tmp_path: Path) -> None:
    run = make(tmp_path, {"steps": 5, "start_length": 1})
    run._set_up()
    whole = losses(run)
    prepare = run.hooks.prepare_batch

    def in_two(rows: list[Any]) -> Round:
        return Round([window for part in (rows[:1], rows[1:]) for window in prepare(part).windows])

    run.hooks.prepare_batch = in_two  # type: ignore[method-assign]
    assert losses(run) == pytest.approx(whole, rel=1e-5)
    run.hooks.prepare_batch = lambda rows: prepare(rows[::-1])  # type: ignore[method-assign]
    with pytest.raises(ConfigurationError, match="one group for each row, in their order"):
        losses(run)
