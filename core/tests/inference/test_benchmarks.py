"""`llmtk evaluate --tasks`: what an installed harness is given, and what is told where it cannot."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from llmtk.cli import call
from llmtk.errors import ConfigurationError
from llmtk.inference import LanguageModel


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The one harness that is installed: `harness_for_a_test:evaluate`."""
    from .conftest import only

    module = types.ModuleType("harness_for_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = tmp_path / "llmtk_harness-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: llmtk-harness\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[llmtk.evaluators]\nharness = harness_for_a_test:evaluate\n")
    monkeypatch.syspath_prepend(tmp_path)
    only(monkeypatch, {"llmtk-harness"})
    return module


def test_a_harness_is_given_model_and_tasks(
    harness: Any, loaded: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def evaluate(model: Any, tokenizer: Any, tasks: Any, **options: Any) -> dict[str, dict[str, float]]:
        given.extend([model, tokenizer, tasks, options])
        print("what it says")
        return {task: {"acc": 0.5} for task in tasks}

    harness.evaluate = evaluate
    assert call(["evaluate", "builtin", "--tasks", "a,b", "--shots", "2", "--limit", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"a/acc": 0.5, "b/acc": 0.5}
    assert given == [loaded.model, loaded.tokenizer, ["a", "b"], {"shots": 2, "limit": 7}]


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (ConfigurationError("no such task"), 2, "no such task"),
        (ConnectionError("no network"), 2, "failed on a: ConnectionError: no network"),
    ],
)
def test_a_harness_that_fails_is_named(
    harness: Any, loaded: LanguageModel, raised: Exception, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def evaluate(*_: Any, **__: Any) -> None:
        raise raised

    harness.evaluate = evaluate
    assert call(["evaluate", "builtin", "--tasks", "a"]) == code
    assert told in capsys.readouterr().err


@pytest.mark.usefixtures("harness")
def test_no_harness_and_words_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from .conftest import only

    assert call(["evaluate", "builtin", "--shots", "2"]) == 2
    assert call(["evaluate", "builtin", "--tasks", "a", "--data", "b.jsonl"]) == 2
    only(monkeypatch, set())
    assert call(["evaluate", "builtin", "--tasks", "a"]) == 2
    told = capsys.readouterr().err
    assert "go with --tasks" in told
    assert "leave --data out" in told
    assert "pip install llmtk-lm-eval" in told
