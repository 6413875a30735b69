"""The built-in model, loaded once, commands, and distributions that bring metrics."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from llmtk.cli import call
from llmtk.inference import LanguageModel

METRICS = """
    def same(predictions, references):
        return sum(map(str.__eq__, predictions, references)) / len(predictions)

    def lengths(predictions, references, *, unit=1):
        return {"said": sum(map(len, predictions)) / unit, "wanted": sum(map(len, references)) / unit}

    def judged(predictions, references, *, model: str):
        return float(len(model))

    def broken(predictions, references):
        raise ZeroDivisionError("by zero")

    def words(predictions, references):
        return "many"
"""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    """The built-in model, computed in the dtype of its weights on every machine."""
    found = LanguageModel("builtin")
    found._half = False
    return found


@pytest.fixture
def llmtk(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command, and gives its exit code and what it wrote to stdout and stderr."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call(words)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def loaded(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """Have commands ask the model that is loaded already."""
    monkeypatch.setattr("llmtk.inference.model.LanguageModel", lambda name, template=None: model)
    return model


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes an installed distribution with these metrics, and hides all others."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def make(*names: str) -> None:
        folder = site / "llmtk_measures-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: llmtk-measures\nVersion: 1.0\n")
        lines = "".join(f"{name} = measures_for_a_test:{name}\n" for name in names)
        (folder / "entry_points.txt").write_text(f"[llmtk.metrics]\n{lines}")
        (site / "measures_for_a_test.py").write_text(textwrap.dedent(METRICS))
        monkeypatch.delitem(sys.modules, "measures_for_a_test", raising=False)
        only(monkeypatch, {"llmtk-measures"})

    return make


def only(monkeypatch: pytest.MonkeyPatch, distributions: set[str]) -> None:
    """Hide what other distributions offer."""
    from llmtk.host import discovery

    real = discovery._scan

    def scan() -> discovery._Found:
        found = real()
        return discovery._Found(
            {group: [o for o in offers if o.distribution in distributions] for group, offers in found.offers.items()},
            (),
        )

    discovery._scan_as_of.cache_clear()
    monkeypatch.setattr(discovery, "_scan", scan)
