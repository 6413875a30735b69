import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmtk.cli import call
from llmtk.host import discovery

Install = Callable[..., None]
Answer = tuple[int, str, str]
Cli = Callable[..., Answer]

STAGE = """
    from typing import Literal

    from llmtk.config.sections import Section
    from llmtk.contract import Stage

    class Toy(Stage):
        summary = "A toy"
        paper = "arXiv 1234.56789"
        row_types = ("pair", "dialogue")
        needs = frozenset({"reference"})
        defaults = {"train": {"learning_rate": 3e-4}}

        class Options(Section):
            loss: Literal["a", "b"] = "a"
            "Which loss."

        def prepare_batch(self, run, rows): ...
        def compute_loss(self, run, batch): ...
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder at the front of the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that makes an installed distribution which offers one thing."""
    installed: list[str] = []
    real = discovery._scan

    def only_made_here() -> Any:
        found = real()
        mine = {group: [o for o in offers if o.distribution in installed] for group, offers in found.offers.items()}
        return discovery._Found(mine, ())

    monkeypatch.setattr(discovery, "_scan", only_made_here)

    def make(distribution: str, name: str, group: str = discovery.STAGES, module: str | None = STAGE) -> None:
        installed.append(distribution)
        module_name = distribution.replace("-", "_")
        attribute = {discovery.STAGES: "Toy", discovery.COMMANDS: "command"}.get(group, "Thing")
        folder = site / f"{module_name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\nSummary: A {name}\n"
        )
        (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {module_name}:{attribute}\n")
        if module is not None:
            (site / f"{module_name}.py").write_text(textwrap.dedent(module))
        monkeypatch.delitem(sys.modules, module_name, raising=False)
        discovery._scan_as_of.cache_clear()

    return make


@pytest.fixture
def llmtk(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs a command, and gives its exit code and what it wrote to stdout and stderr."""

    def run(*words: str) -> Answer:
        capsys.readouterr()
        code = call(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put a `llmtk.run` in place that trains nothing, and return the list of what it is asked."""
    asked: list[Any] = []

    class Run:
        @classmethod
        def from_layers(cls, stage: str | None, *layers: Any, resume: str | None = None) -> "Run":
            asked.append((stage, *layers, resume))
            return cls()

        def train(self) -> None:
            asked.append("trained")

    module = ModuleType("llmtk.run")
    module.Run = Run  # type: ignore[attr-defined]
    module.evaluate_run = lambda path, data=None: asked.append((path, data)) or {"eval_loss": 1.25, "rows": 3.0}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llmtk.run", module)
    return asked
