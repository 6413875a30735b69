"""Distributions that `llmtk new-stage` and its like write: they work as they are, and names are checked."""

from __future__ import annotations

import importlib.util
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmtk import ConfigurationError
from llmtk.cli import call
from llmtk.config.run_config import SHARED
from llmtk.host import discovery
from llmtk.host.checks import check_plugin, check_stage
from llmtk.scaffold import KINDS, new, write
from llmtk.testing import Verdict, outcomes

QUICK = ("declared", "options", "loss", "pure", "cut", "metrics", "stop")


def load(folder: Path, name: str) -> ModuleType:
    """Import a module from its file."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def project(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    return found


def test_a_new_stage_keeps_the_contract(tmp_path: Path) -> None:
    write(new("stage", "my-focus"), tmp_path)
    assert project(tmp_path)["entry-points"] == {"llmtk.stages": {"my-focus": "llmtk_stage_my_focus:MyFocus"}}
    assert project(tmp_path)["dependencies"] == ["llmtk-core>=0.1,<0.2"]
    stage = load(tmp_path, "llmtk_stage_my_focus").MyFocus
    check_stage(stage, "stage")
    found = {one.check: (one.verdict, one.message) for one in outcomes(stage, QUICK)}
    assert {verdict for verdict, _ in found.values()} == {Verdict.PASSED}, found


@pytest.mark.parametrize("kind", ["plugin", "reward"])
def test_a_new_plugin_and_a_new_reward_pass_their_own_tests(kind: str, tmp_path: Path) -> None:
    made = new(kind, "mine")
    write(made, tmp_path)
    load(tmp_path, made.module)
    if kind == "plugin":
        check_plugin(sys.modules[made.module].Mine, "plugin 'mine'")
    tests = load(tmp_path, f"test_{made.module}")
    ran = [name for name in vars(tests) if name.startswith("test_") and "tmp_path" not in _parameters(tests, name)]
    for name in ran:
        getattr(tests, name)()
    assert ran


def _parameters(module: ModuleType, name: str) -> tuple[str, ...]:
    return tuple(getattr(module, name).__code__.co_varnames)


STAGES = sorted(offer.name for offer in discovery.offers(discovery.STAGES))


@pytest.mark.parametrize("start", STAGES)
def test_a_stage_may_begin_with_an_installed_one(start: str, tmp_path: Path) -> None:
    made = new("stage", "another", start=start)
    write(made, tmp_path)
    theirs, mine = discovery.get_stage(start), getattr(load(tmp_path, made.module), made.class_name)
    check_stage(mine, "stage")
    assert mine.Options.model_json_schema() == theirs.Options.model_json_schema()
    assert made.class_name == theirs.__name__
    assert any(requirement.startswith("llmtk-core") for requirement in project(tmp_path)["dependencies"])
    assert all(f"{start}.{option}" not in (made.source or "") for option in theirs.Options.model_fields)
    own = set(mine(mine.Options()).demo().config) - set(SHARED)
    assert own <= {"another"}, "its demo sets the section of the stage that it began with"


def test_a_loss_that_is_called_as_its_stage_keeps_its_name() -> None:
    source = new("stage", "another", start="grpo").source or ""
    assert 'Literal["grpo", "bnpo"' in source
    assert 'refuse_unused("another", o' in source
    assert 'f"another.{name} is used with another.sync_ref_model' in (new("stage", "another", start="dpo").source or "")


@pytest.mark.parametrize(
    ("kind", "name"), [("stage", "none"), ("stage", "group"), ("stage", "demo"), ("plugin", "options")]
)
def test_a_class_is_called_as_nothing_that_its_module_has(kind: str, name: str, tmp_path: Path) -> None:
    made = new(kind, name)
    assert made.class_name == f"{name}-{kind}".title().replace("-", "")
    write(made, tmp_path)
    assert hasattr(load(tmp_path, made.module), made.class_name)


def test_one_whose_module_needs_its_neighbours_depends_on_their_distribution() -> None:
    assert any(one.startswith("llmtk-stage-dpo") for one in new("stage", "mine", start="dpo").dependencies)
    assert not any(one.startswith("llmtk-stage-ipo") for one in new("stage", "mine", start="ipo").dependencies)


def test_a_stage_of_a_package_with_requirements_of_all_kinds_can_be_begun_from(tmp_path: Path, monkeypatch) -> None:
    package, metadata = tmp_path / "foo_pkg", tmp_path / "llmtk_stage_foo-1.dist-info"
    for folder in (package, metadata):
        folder.mkdir()
    (package / "parts.py").write_text("SCALE = 2.0\n")
    source = inspect.getsource(sys.modules[discovery.get_stage("sft").__module__])
    (package / "__init__.py").write_text(source + "\nfrom .parts import SCALE\n")
    (metadata / "entry_points.txt").write_text("[llmtk.stages]\nfoo = foo_pkg:SupervisedFineTuning\n")
    (metadata / "RECORD").write_text("foo_pkg/__init__.py,,\n")
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: llmtk-stage-foo\nVersion: 1\nSummary: Foo\nRequires-Dist: llmtk-core>=0.1\n"
        'Requires-Dist: numpy; python_version >= "3.9"\nRequires-Dist: pytest>=8; extra == "test"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = new("stage", "mine", start="foo", description="My own")
    write(made, tmp_path / "mine")
    wanted = ["llmtk-core>=0.1", "numpy; python_version >= '3.9'", "llmtk-stage-foo>=1.0,<2"]
    assert project(tmp_path / "mine")["dependencies"] == wanted
    assert "from foo_pkg.parts import SCALE" in (made.source or "")
    assert 'summary = "My own"' in (made.source or "")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_formatted_and_free_of_faults(kind: str, tmp_path: Path) -> None:
    ruff = Path(sys.executable).with_name("ruff")
    if not ruff.exists():
        pytest.skip("ruff is not installed")
    write(new(kind, "a-name-of-some-length"), tmp_path)
    for asked in (["check"], ["format", "--check"]):
        command = [ruff, *asked, "--isolated", "--line-length", "120", "."]
        assert subprocess.run(command, check=False, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("My_Stage", "small letters, digits and single hyphens"),
        ("1st", "a letter first, as my-stage"),
        ("train", "is a section of the configuration"),
        ("sft", "There is a stage 'sft' (llmtk-stage-sft"),
    ],
)
def test_names_that_cannot_be(name: str, said: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        new("stage", name)
    assert said in str(caught.value)


def test_a_description_stands_where_people_look(tmp_path: Path) -> None:
    write(new("stage", "mine", description="Learns it all."), tmp_path)
    assert project(tmp_path)["description"] == "Learns it all"
    assert "\nLearns it all.\n" in (tmp_path / "README.md").read_text()
    assert 'summary = "Learns it all"' in (tmp_path / "llmtk_stage_mine.py").read_text()
    for wrong in ("", "two\nlines", 'a "quoted" word'):
        with pytest.raises(ConfigurationError, match="is no description: one line of text"):
            new("stage", "mine", description=wrong)


def test_the_command_says_what_to_do_next_and_writes_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(["new-stage", "llmtk-stage-mine"]) == 0
    assert "pip install -e llmtk-stage-mine\n  llmtk run mine\n  llmtk check mine" in capsys.readouterr().out
    assert call(["new-stage", "mine"]) == 2
    assert "llmtk-stage-mine is there already, and not empty" in capsys.readouterr().err
    assert call(["new-stage", "other", "--from", "stf"]) == 2
    assert "Did you mean 'sft'" in capsys.readouterr().err
