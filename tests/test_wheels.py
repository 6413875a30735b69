"""The story that llmtk exists for, told with real wheels in empty environments: a stage works once it is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from llmtk.scaffold import new, write

ROOT = Path(__file__).parent.parent
PROJECTS = sorted(file.parent for file in [ROOT / "core/pyproject.toml", *ROOT.glob("*/*/pyproject.toml")])
DOCS = ROOT / "docs"
PAGES = ("writing-a-stage", "writing-a-plugin")
BLOCK = re.compile(r'^```(\w+)(?: title="([^"\n]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NOT_SHARED = re.compile(r"_*(llmtk|editable|pip|__pycache__)|.*\.pth$", re.IGNORECASE)


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.bin = folder / "bin"
        self.site = next(folder.glob("lib/python*/site-packages"))

    def borrow(self, folder: Path) -> None:
        """Let it see what is installed beside this test, save for llmtk's own distributions."""
        share(folder)
        (self.site / "borrowed.pth").write_text(f"{folder}\n")

    def pip(self, *words: str) -> None:
        done = self._run("python", "-m", "pip", "--quiet", "--disable-pip-version-check", *words)
        assert done.returncode == 0, done.stderr

    def llmtk(self, *words: str, code: int = 0) -> str:
        """Run a command, which must end with the exit code; return what it wrote."""
        done = self._run("llmtk", *words)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def stages(self) -> list[str]:
        return [stage["name"] for stage in json.loads(self.llmtk("list-stages", "--json"))]

    def _run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return subprocess.run(
            [str(self.bin / program), *words], env=environment, cwd=self.bin.parent, capture_output=True, text=True
        )


def share(folder: Path) -> None:
    """Make a folder of what is installed beside this test, save for llmtk's own distributions."""
    folder.mkdir(parents=True)
    for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for item in Path(site).iterdir():
            if not NOT_SHARED.match(item.name):
                (folder / item.name).symlink_to(item)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel of every distribution."""
    return build(PROJECTS, tmp_path_factory.mktemp("dist"))


def build(projects: Iterable[Path], folder: Path) -> Path:
    """Build wheels into the folder, and return it."""
    for project in projects:
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(project)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def runs_sft(environment: Environment, folder: Path) -> None:
    environment.llmtk("run", "sft", "train.max_steps=2", f"output_dir={folder}")
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    assert (folder / "model.safetensors").is_file()


@pytest.mark.slow
def test_every_distribution_builds_and_none_asks_for_somebody_elses_llmtk(wheels: Path) -> None:
    built = sorted(wheels.glob("*.whl"))
    assert len(built) == len(PROJECTS)
    for wheel in built:
        with zipfile.ZipFile(wheel) as archive:
            about = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))
        requires = re.findall(r"^Requires-Dist: *([\w.-]+)", about.decode(), re.MULTILINE)
        assert "llmtk" not in requires
        assert wheel.name.startswith("llmtk_core-") or "llmtk-core" in requires


@pytest.mark.slow
def test_a_stage_is_there_once_it_is_installed_and_gone_once_it_is_removed(wheels: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    # dill, with which datasets fingerprints, takes a module for an installed one by this name in its path.
    environment.borrow(tmp_path / "borrowed" / "site-packages")
    from_wheels = ["install", "--no-index", "--find-links", str(wheels), "--no-deps"]

    environment.pip(*from_wheels, "llmtk-core")
    assert environment.stages() == []
    assert "pip install llmtk-stage-sft" in environment.llmtk("list-stages")

    environment.pip(*from_wheels, "llmtk-stage-sft")
    assert environment.stages() == ["sft"]
    assert "pip install llmtk-stage-pt" in environment.llmtk("run", "pt", code=2)

    environment.pip(*from_wheels, "llmtk-stage-pt")
    assert environment.stages() == ["pt", "sft"]

    environment.pip("uninstall", "--yes", "llmtk-stage-pt")
    assert environment.stages() == ["sft"]
    runs_sft(environment, tmp_path / "run")


@pytest.mark.slow
def test_kto_alone_trains_and_improves(wheels: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.borrow(tmp_path / "borrowed" / "site-packages")
    from_wheels = ["install", "--no-index", "--find-links", str(wheels), "--no-deps"]
    environment.pip(*from_wheels, "llmtk-core", "llmtk-pref", "llmtk-stage-kto")
    assert environment.stages() == ["kto"]
    environment.llmtk("run", "kto", f"output_dir={tmp_path / 'run'}")
    metrics = json.loads((tmp_path / "run" / "results.json").read_text())["metrics"]
    assert metrics["figure_after"] > metrics["figure_before"]
    assert metrics["exact match_after"] >= metrics["exact match_before"]


@pytest.mark.slow
def test_a_user_installs_a_stage_with_one_command(wheels: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    pinned = ["-c", str(ROOT / "constraints.txt")]
    environment.pip("install", *pinned, "--find-links", str(wheels), "llmtk-stage-sft")
    assert environment.stages() == ["sft"]
    runs_sft(environment, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_followed_from_an_idea_to_what_is_installed(page: str, tmp_path: Path) -> None:
    share(tmp_path / "borrowed" / "site-packages")
    wheels = build([ROOT / "core", ROOT / "stages_sft" / "sft"], tmp_path / "wheels")
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(tmp_path / "borrowed" / "site-packages"),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_NO_BUILD_ISOLATION": "false",  # that is: do without
        "PIP_NO_INDEX": "1",
    }
    home = tmp_path / "home"
    home.mkdir()
    shell = ["bash", "-ex", "-c", script(page)]
    done = subprocess.run(shell, env=environment, cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    if page == "writing-a-stage":
        assert "unlikelihood conforms" in done.stdout
        metrics = json.loads((home / "runs" / "installed" / "results.json").read_text())["metrics"]
        assert metrics["figure_after"] > metrics["figure_before"]
    else:
        plugins = json.loads((home / "runs" / "flooded" / "run.json").read_text())["plugins"]
        assert ["flooding", "llmtk-plugin-flooding 0.1.0"] in plugins


def script(page: str) -> str:
    """Return a page's blocks as a shell script: commands as they stand, and files written where their titles say."""
    parts = []
    for kind, title, text in BLOCK.findall((DOCS / f"{page}.md").read_text()):
        if title:
            parts.append(f"cat > {title} <<'END OF FILE'\n{text}END OF FILE\n")
        elif kind == "sh":
            parts.append(text)
    return "\n".join(parts)


def test_the_stage_that_a_page_writes_is_the_one_that_is_kept(tmp_path: Path) -> None:
    kept = DOCS / "examples" / "llmtk-stage-unlikelihood"
    description = tomllib.loads((kept / "pyproject.toml").read_text())["project"]["description"]
    write(new("stage", "unlikelihood", description=description), tmp_path)
    page = (DOCS / "writing-a-stage.md").read_text()
    assert f'llmtk new-stage unlikelihood --description "{description}"' in page
    for _, title, text in BLOCK.findall(page):
        if title:
            (tmp_path / Path(title).name).write_text(text)
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert (kept / file.relative_to(tmp_path)).read_text() == file.read_text(), file.name
