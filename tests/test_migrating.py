"""The page for those who come from other programs: its commands run as they stand, and write the files it shows."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml

from llmtk.cli import call
from llmtk.demo import addition
from llmtk.models.checks import resolve

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "migrating.md").read_text()
FILES = dict(re.findall(r'```(?:yaml|json) title="(.*?)"\n(.*?)```', PAGE, re.DOTALL))
COMMANDS = re.findall(r"^    (llmtk .*)$", PAGE, re.MULTILINE)


@pytest.fixture
def _installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command be found by its entry point, whether or not its distribution is installed."""
    about = tomllib.loads((ROOT / "plugins" / "convert" / "pyproject.toml").read_text())["project"]
    info = tmp_path / "site" / f"{about['name'].replace('-', '_')}-{about['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {about['name']}\nVersion: {about['version']}\n")
    entries = [f"{name} = {value}" for name, value in about["entry-points"]["llmtk.commands"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[llmtk.commands]", *entries]))
    monkeypatch.syspath_prepend(tmp_path / "site")


@pytest.fixture
def _at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bring the model, the data and the files of the other programs, by the names that the page has for them."""
    work = tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "MODEL").symlink_to(resolve("builtin"))
    sums = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in addition.rows("train", 8)]
    (work / "data" / "sums.json").write_text(json.dumps([{"question": q, "answer": a} for q, a in sums]))
    pairs = [{"prompt": q, "chosen": a, "rejected": f"{a}0"} for q, a in sums]
    talks = [{"turns": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in sums]
    for name, rows in (("pairs", pairs), ("talks", talks)):
        (work / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name in ("trl.yaml", "factory.yaml", "axolotl.yaml", "data/dataset_info.json"):
        (work / name).write_text(FILES[name])
    monkeypatch.chdir(work)


@pytest.mark.usefixtures("_installed", "_at_work")
def test_the_commands_run_and_write_what_the_page_shows(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 8
    for line in COMMANDS:
        assert call(shlex.split(line)[1:]) == 0, f"{line}\n{capfd.readouterr().err}"
    for name in ("sft.yaml", "dpo.yaml", "sets.yaml", "talks.yaml"):
        assert yaml.safe_load(Path(name).read_text()) == yaml.safe_load(FILES[name]), name
        assert Path(name).read_text().partition("\n")[2] == FILES[name], name
    said = capfd.readouterr()
    assert "Nothing was trained" in said.out
    assert "stage: ipo" in said.out
