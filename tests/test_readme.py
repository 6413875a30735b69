"""The README's Python blocks run as they stand, on a small model and data of the names that they use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from llmtk.demo import addition
from llmtk.models.checks import resolve

ROOT = Path(__file__).parents[1]


def test_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(resolve("builtin"))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, addition.rows("train", 16))))
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    uses = re.findall(r"^    (llmtk\.Run\(.*\)\.train\(\))$", readme, re.MULTILINE)
    assert len(blocks) == 2
    assert len(uses) == 1
    short = blocks[0].replace('"max_steps": 100', '"max_steps": 2')
    assert short != blocks[0]
    exec(short, {})
    assert (tmp_path / "runs/first/model.safetensors").exists()
    own = uses[0].replace(").train()", ', train={"max_steps": 2}, output_dir="own").train()')
    names: dict[str, object] = {}
    exec(f"import llmtk\n{blocks[1]}\nresult = {own}", names)
    assert names["result"].steps == 2  # type: ignore[attr-defined]
