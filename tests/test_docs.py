"""The documentation says what is so: generated pages, the order of the hooks, and the loop that is written by hand."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import llmtk
from llmtk.config.reading import read_file
from llmtk.demo import addition
from llmtk.host import discovery, hookspecs

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
STAGES = sorted(offer.name for offer in discovery.list_stages())


def load(path: Path) -> ModuleType:
    """Import a file that belongs to no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return load(DOCS / "generated.py").pages()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_a_page_with_an_example_that_is_accepted(name: str, pages: dict[str, str], tmp_path: Path) -> None:
    page = pages[f"stages/{name}.md"]
    parts = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert [part for part in parts if part in ("When to use it", "The method", "An example", "Options")] == [
        "When to use it", "The method", "An example", "Options",
    ]  # fmt: skip
    assert "../../" not in page
    rows = re.findall(r'^    (\{".*\})$', page, re.MULTILINE)
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[0].replace("37", str(first)) for first in range(20, 40)))
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "example.yaml").write_text(example.replace("MODEL", "builtin"))
    settings = read_file(tmp_path / "example.yaml")
    assert isinstance(settings["train"]["learning_rate"], float)
    settings["data"]["train"] = str(tmp_path / "rows.jsonl")
    settings |= {"output_dir": str(tmp_path / "run")}
    assert llmtk.Run(**settings).prepare().stage == name


def test_every_command_has_its_help_on_a_page(pages: dict[str, str]) -> None:
    from llmtk.cli.commands import llmtk as commands

    for name in commands.list_commands(None):  # type: ignore[arg-type]
        assert f"## llmtk {name}\n" in pages["commands.md"]


def test_every_name_of_the_package_is_on_a_page() -> None:
    told = re.findall(r"^::: llmtk\.(\w+)$", (DOCS / "api.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(set(llmtk.__all__) - {"__version__"})


def imported(package: Path) -> dict[str, set[str]]:
    """Return what each part of the core imports as it is loaded, by the first word of its path."""
    found: dict[str, set[str]] = {}
    for file in package.rglob("*.py"):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        modules = {module for statement in ast.parse(file.read_text()).body for module in _modules(statement)}
        found.setdefault(part, set()).update(module.split(".")[1] for module in modules if module.startswith("llmtk."))
    return {part: names - {part, "errors", "_version"} for part, names in found.items()}


def _modules(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ImportFrom) and statement.module == "llmtk":
        return [f"llmtk.{name.name}" for name in statement.names]
    return [statement.module or ""] if isinstance(statement, ast.ImportFrom) else []


def test_the_architecture_says_what_imports_what() -> None:
    rows = re.findall(r"^\| `(\w+)(?:\.py|/)` \|.*\| (.*?) ?\|$", (DOCS / "architecture.md").read_text(), re.MULTILINE)
    told = {part: set(names.split(", ")) - {""} for part, names in rows}
    package = Path(llmtk.__file__).parent
    left_out = {"__init__", "__main__", "_version", "errors", "pytest_plugin"}
    assert told == {part: names for part, names in imported(package).items() if part not in left_out}


def test_the_loop_by_hand_is_the_one_that_is_measured() -> None:
    measured = inspect.getsource(load(ROOT / "tests/benchmarks/loop.py").by_hand)
    assert f"```python\n{measured}```" in (DOCS / "loop.md").read_text()


def everything(calls: list[tuple[int, str]]) -> Any:
    """Return a plugin that answers every hook, and notes each as it is called, with how deep it is inside others."""
    depth = 0

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        nonlocal depth
        calls.append((depth, name))
        depth += 1
        yield
        depth -= 1

    def around_prepare_batch(self: Any, rows: Any, inner: Any) -> Any:
        with noted("around_prepare_batch"):
            return inner(rows)

    def around_compute_loss(self: Any, batch: Any, inner: Any) -> Any:
        with noted("around_compute_loss"):
            return inner(batch)

    def wrapper(name: str) -> Any:
        def wrapped(self: Any) -> Any:
            with noted(name):
                return (yield)

        return llmtk.hookimpl(wrapper=True)(wrapped)

    def plain(name: str, answer: Any) -> Any:
        def plainly(self: Any) -> Any:
            with noted(name):
                return answer

        return llmtk.hookimpl(plainly)

    answers = {"extra_metrics": {}, "extra_checkpoint_state": {}, "extra_run_info": {}, "should_stop": False}
    answers |= {"order_examples": range(8)}
    hooks = {name: plain(name, answers.get(name)) for name in hookspecs.HOOKS}
    hooks |= {name: wrapper(name) for name in hookspecs.STAGE_HOOKS}
    hooks |= {around.__name__: llmtk.hookimpl(around) for around in (around_prepare_batch, around_compute_loss)}
    return type("Everything", (), {"name": "everything"} | hooks)()


def test_hooks_are_called_in_the_order_of_their_page(tmp_path: Path) -> None:
    for name, count in (("train", 8), ("eval", 4)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, addition.rows("train", count))))
    settings: dict[str, Any] = {
        "stage": "sft",
        "model": "builtin",
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")},
        "train": {"max_steps": 2, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2},
        "output_dir": str(tmp_path / "run"),
    }
    settings["train"] |= {"save_strategy": "steps", "save_steps": 2}
    calls: list[tuple[int, str]] = []
    llmtk.Run(**settings, plugins=[everything(calls)]).train()
    (block,) = re.findall(r"```text\n(.*?)```", (DOCS / "hooks.md").read_text(), re.DOTALL)
    told = [re.match(r"( *)(\w+)", line).groups() for line in block.splitlines()]  # type: ignore[union-attr]
    assert calls == [(len(spaces) // 2, name) for spaces, name in told]

    settings["train"]["max_steps"] = 3
    calls.clear()
    llmtk.Run(**settings, plugins=[everything(calls)], resume="auto").train()
    names = [name for _, name in calls]
    assert names.index("run_started") == names.index("restore_checkpoint_state") + 1
    assert set(names) | {name for _, name in told} == set(hookspecs.HOOKS)


def test_pages_of_the_site_are_in_its_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in DOCS.glob("*.md") if page.name not in text] == []
