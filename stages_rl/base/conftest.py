"""What the tests of rewards share: functions in files, and samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from llmtk_rl.rewards import Rewards, Sample


@pytest.fixture(scope="session")
def samples() -> Callable[..., list[Sample]]:
    """Return what makes samples of completions, of rows.jsonl:1 and on; keywords are columns."""

    def make(*completions: str, prompt: Any = "1+1=", **columns: Any) -> list[Sample]:
        return [
            Sample(prompt, completion, [5, 6], [7] * len(completion), columns, f"rows.jsonl:{line}")
            for line, completion in enumerate(completions, start=1)
        ]

    return make


@pytest.fixture
def of_file(tmp_path: Path) -> Iterator[Callable[..., Rewards]]:
    """Return what makes rewards of the function `score` in a file with a text; keywords stand beside it."""
    made: list[Rewards] = []

    def make(source: str, on_error: Any = "stop", **more: Any) -> Rewards:
        (tmp_path / "reward.py").write_text(dedent(source))
        spec = {"file": str(tmp_path / "reward.py"), "function": "score", **more}
        made.append(Rewards([spec], section="grpo", on_error=on_error))
        return made[-1]

    yield make
    for rewards in made:
        rewards.close()
