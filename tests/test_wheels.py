"""The story that llmtk exists for, told with real wheels in empty environments: a stage works once it is installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECTS = sorted(file.parent for file in [ROOT / "core/pyproject.toml", *ROOT.glob("*/*/pyproject.toml")])
NOT_SHARED = re.compile(r"_*(llmtk|editable|pip|setuptools|pkg_resources|__pycache__)|.*\.pth$", re.IGNORECASE)


class Environment:
    """A virtual environment of its own."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        self.bin = folder / "bin"
        self.site = next(folder.glob("lib/python*/site-packages"))

    def borrow(self, folder: Path) -> None:
        """Let it see what is installed beside this test, save for llmtk's own distributions."""
        folder.mkdir(parents=True)
        for site in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
            for item in Path(site).iterdir():
                if not NOT_SHARED.match(item.name):
                    (folder / item.name).symlink_to(item)
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


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel of every distribution."""
    folder = tmp_path_factory.mktemp("dist")
    for project in PROJECTS:
        build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(project)]
        done = subprocess.run(build, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def runs_sft(environment: Environment, folder: Path) -> None:
    environment.llmtk("run", "sft", "train.max_steps=2", f"output_dir={folder}")
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
    assert (folder / "model.safetensors").is_file()


def test_every_distribution_builds_and_none_asks_for_somebody_elses_llmtk(wheels: Path) -> None:
    built = sorted(wheels.glob("*.whl"))
    assert len(built) == len(PROJECTS)
    for wheel in built:
        with zipfile.ZipFile(wheel) as archive:
            about = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA")))
        requires = re.findall(r"^Requires-Dist: *([\w.-]+)", about.decode(), re.MULTILINE)
        assert "llmtk" not in requires
        assert wheel.name.startswith("llmtk_core-") or "llmtk-core" in requires


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
