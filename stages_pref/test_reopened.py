"""A finished run is gone on with, and evaluated, from the configuration that it wrote itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtk import Run

from .conftest import PAIRS, TINY

STAGES: dict[str, list[dict[str, Any]]] = {
    "dpo": [
        {},
        {"loss": "hinge"},
        {"loss": "sft"},
        {"f_divergence": "alpha", "f_alpha": 0.3},
        {"reference_free": True},
    ],
    "ipo": [{}],
    "kto": [{}, {"loss": "apo_zero_unpaired"}],
    "cpo": [{}, {"loss": "ipo"}],
    "simpo": [{}, {"loss": "hinge"}],
    "orpo": [{}, {"nll_on": "all"}],
    "rm": [{}],
}


@pytest.mark.parametrize(
    ("stage", "options"), [(stage, options) for stage, all in STAGES.items() for options in all], ids=str
)
def test_a_run_is_opened_by_its_own_configuration(tmp_path: Path, stage: str, options: dict[str, Any]) -> None:
    settings = {
        "model": {"from_config": TINY, "tokenizer": {"kind": "byte"}},
        "data": {"train": PAIRS, "eval": PAIRS, "max_length": 128},
        "output_dir": str(tmp_path / "run"),
    }
    train = {"bf16": False, "learning_rate": 0.01, "max_steps": 1}
    metrics = Run(stage, **settings, train=train, **{stage: options}).train().metrics
    again = Run(stage, output_dir=settings["output_dir"], data=settings["data"], resume="auto")
    assert again.train().steps == 1
    found = Run.open(tmp_path / "run").evaluate(PAIRS)
    assert found["loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
