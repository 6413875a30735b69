"""Discovery against distributions that are made here: folders with METADATA and entry_points.txt on the path."""

import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from llmtk._version import SOURCE_VERSION
from llmtk.errors import PluginError
from llmtk.host import discovery

GOOD_STAGE = """
    import llmtk

    class Toy(llmtk.Stage):
        def prepare_batch(self, run, rows): ...
        def compute_loss(self, run, batch): ...
"""
Install = Callable[..., Path]


@pytest.fixture(autouse=True)
def core(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "core_version", lambda: "0.1.0")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that makes a distribution with one entry point, and perhaps its module."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def make(
        distribution: str,
        name: str,
        *,
        value: str = "nowhere:Toy",
        group: str = discovery.STAGES,
        version: str = "1.0",
        requires: str = "llmtk-core>=0.1,<0.2",
        module: str | None = None,
    ) -> Path:
        folder = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        about = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\nSummary: About {name}\n"
        (folder / "METADATA").write_text(about + (f"Requires-Dist: {requires}\n" if requires else ""))
        (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
        if module is not None:
            (tmp_path / f"{value.partition(':')[0]}.py").write_text(textwrap.dedent(module))
            monkeypatch.delitem(sys.modules, value.partition(":")[0], raising=False)
        return folder

    return make


def offered(group: str = discovery.STAGES) -> list[discovery.Offer]:
    """Leave out what is really installed."""
    return [offer for offer in discovery.offers(group) if offer.name.startswith("toy")]


def refused(call: Callable[[], object], *parts: str) -> str:
    with pytest.raises(PluginError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "pip install llmtk\n" not in f"{caught.value}\n"
    return str(caught.value)


def test_an_offer_says_all_that_the_metadata_says(install: Install) -> None:
    install("llmtk-stage-toy", "toy")
    assert offered() == [
        discovery.Offer(
            group="llmtk.stages",
            name="toy",
            distribution="llmtk-stage-toy",
            version="1.0",
            summary="About toy",
            value="nowhere:Toy",
            requires="llmtk-core>=0.1,<0.2",
        )
    ]


def test_offers_are_sorted_and_kept_apart_by_group(install: Install) -> None:
    install("b", "toy-b")
    install("a", "toy-a")
    install("c", "toy-c", group=discovery.PLUGINS)
    assert [offer.name for offer in offered()] == ["toy-a", "toy-b"]
    assert [offer.name for offer in offered(discovery.PLUGINS)] == ["toy-c"]


def test_what_is_installed_and_removed_later_is_seen(install: Install) -> None:
    assert offered() == []
    folder = install("a", "toy")
    assert len(offered()) == 1
    (folder / "entry_points.txt").unlink()
    (folder / "METADATA").unlink()
    folder.rmdir()
    assert offered() == []


def test_list_stages_is_the_offers_of_stages(install: Install) -> None:
    install("a", "toy")
    assert discovery.list_stages() == discovery.offers("llmtk.stages")


def test_an_unknown_stage_is_told_with_the_known_the_near_and_what_to_install(install: Install) -> None:
    install("a", "toyota")
    refused(
        lambda: discovery.find(discovery.STAGES, "toyotta"),
        "Unknown stage 'toyotta'. Did you mean 'toyota'?",
        "Installed stages: ",
        "toyota",
        "pip install llmtk-stage-toyotta",
    )


def test_an_unknown_plugin_is_told_with_what_to_install() -> None:
    refused(lambda: discovery.find(discovery.PLUGINS, "zzz"), "Unknown plugin 'zzz'", "pip install llmtk-plugin-zzz")


def test_of_a_distribution_that_brings_something_else_it_is_said_what(install: Install) -> None:
    install("llmtk-plugin-some-metrics", "bleu", group=discovery.METRICS)
    told = refused(
        lambda: discovery.find(discovery.PLUGINS, "some_metrics"),
        "llmtk-plugin-some-metrics is installed: it brings metrics (bleu), and no plugin",
    )
    assert "pip install" not in told


def test_a_name_that_differs_by_its_dashes_alone_is_not_to_be_installed(install: Install) -> None:
    install("llmtk-plugin-early-end", "early-end", group=discovery.PLUGINS)
    told = refused(lambda: discovery.find(discovery.PLUGINS, "early_end"), "Did you mean 'early-end'?")
    assert "pip install" not in told
    assert "is installed" not in told


def test_an_unknown_reward_names_no_distribution() -> None:
    assert "pip" not in refused(lambda: discovery.find(discovery.REWARDS, "zzz"), "Unknown reward 'zzz'")


def test_two_distributions_with_one_name_are_named_with_the_mend(install: Install) -> None:
    install("llmtk-stage-toy", "toy")
    install("other-toy", "toy", version="2.0")
    refused(
        lambda: discovery.find(discovery.STAGES, "toy"),
        "'toy'",
        "llmtk-stage-toy 1.0 and other-toy 2.0",
        "pip uninstall llmtk-stage-toy or pip uninstall other-toy",
    )
    assert all(offer.problem for offer in offered())


def test_one_distribution_twice_on_the_path_is_one(install: Install) -> None:
    install("llmtk-stage-toy", "toy")
    install("LLMTK_Stage.Toy", "toy", version="2.0")
    assert len(offered()) == 1


@pytest.mark.parametrize("name", ["model", "train", "stage", "output_dir", "generation"])
def test_names_of_sections_are_reserved(install: Install, name: str) -> None:
    install("a", name)
    refused(lambda: discovery.find(discovery.STAGES, name), repr(name), "reserved", "a 1.0", "pip uninstall a")


def test_a_reward_may_have_a_section_as_its_name(install: Install) -> None:
    install("a", "model", group=discovery.REWARDS)
    assert discovery.find(discovery.REWARDS, "model").problem is None


def test_a_stage_for_another_core_is_refused_with_both_versions(install: Install) -> None:
    install("llmtk-stage-toy", "toy", requires="llmtk-core<0.9,>=0.5")
    refused(
        lambda: discovery.find(discovery.STAGES, "toy"),
        "llmtk-stage-toy 1.0",
        "requires llmtk-core<0.9,>=0.5",
        "this is llmtk-core 0.1.0",
        "pip install --upgrade llmtk-core llmtk-stage-toy",
    )


@pytest.mark.parametrize(
    ("requirement", "version", "accepted"),
    [
        ("llmtk-core", "0.1.0", True),
        ("llmtk-core>=0.1,<0.2", "0.1.0", True),
        ("llmtk-core >=0.1.1", "0.1.0", False),
        ("llmtk_core==0.1", "0.1.0", True),
        ("llmtk-core (<0.2)", "0.1.0", True),
        ("llmtk-core (<0.1)", "0.1.0", False),
        ("llmtk-core!=0.1", "0.1.0", False),
        ("llmtk-core>0.1,<=0.10", "0.9", True),
        ("llmtk-core<=0.1", "0.1.1", False),
        ("llmtk-core~=0.1", "0.9", True),
        ("llmtk-core~=0.1.0", "0.2.0", False),
        ("llmtk-core[web]>=0.1", "0.1.0", True),
        ("llmtk-core>=0.2.dev0", "0.2.0.dev1", True),
        ("llmtk-core>=0.1", "0.2.0rc1", True),
        ("llmtk-core>=0.1,<0.2", "0.2.0rc1", False),
        ('llmtk-core>=9; python_version < "3"', "0.1.0", True),
        ('llmtk-core>=9; python_version >= "3"', "0.1.0", False),
    ],
)
def test_which_cores_a_requirement_accepts(
    install: Install, monkeypatch: pytest.MonkeyPatch, requirement: str, version: str, accepted: bool
) -> None:
    monkeypatch.setattr(discovery, "core_version", lambda: version)
    install("a", "toy", requires=requirement)
    assert (offered()[0].problem is None) == accepted


@pytest.mark.parametrize("requirement", ["", 'llmtk-core>=9; extra == "dev"', "llmtk-core-extras>=9"])
def test_what_is_no_requirement_on_this_core(install: Install, requirement: str) -> None:
    install("a", "toy", requires=requirement)
    assert (offered()[0].requires, offered()[0].problem) == ("", None)


def test_a_requirement_that_cannot_be_read_is_a_problem(install: Install) -> None:
    install("a", "toy", requires="llmtk-core>=!!")
    refused(lambda: discovery.find(discovery.STAGES, "toy"), "cannot be read", "llmtk-core>=!!")


def test_broken_metadata_hurts_no_neighbour(install: Install, tmp_path: Path) -> None:
    install("a", "toy")
    (tmp_path / "empty-1.0.dist-info").mkdir()
    (install("b", "toy-b") / "METADATA").unlink()
    (install("c", "toy-c") / "entry_points.txt").write_bytes(b"\xff\xfe[llmtk.stages]")
    (install("d", "toy-d") / "entry_points.txt").write_text("[llmtk.stages]\nno equals sign\n")
    (tmp_path / "folder-1.0.dist-info" / "entry_points.txt").mkdir(parents=True)
    assert [offer.name for offer in offered()] == ["toy"]
    refused(lambda: discovery.find(discovery.STAGES, "toy-b"), "cannot be read", "b-1.0.dist-info", "d-1.0.dist-info")


def test_get_stage_imports_that_stage_alone(install: Install) -> None:
    install("a", "toy", value="toy_good:Toy", module=GOOD_STAGE)
    install("b", "toy-broken", value="toy_broken:Toy", module="raise RuntimeError('not mine')")
    assert discovery.get_stage("toy").__name__ == "Toy"
    assert "toy_broken" not in sys.modules


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError('bad day')", "RuntimeError: bad day"),
        ("def broken(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_an_error_at_import_names_distribution_module_and_error(install: Install, module: str, told: str) -> None:
    install("llmtk-stage-toy", "toy", value="toy_module:Toy", module=module)
    refused(
        lambda: discovery.get_stage("toy"),
        "stage 'toy' (llmtk-stage-toy 1.0)",
        "toy_module raised",
        told,
        "pip install --upgrade --force-reinstall llmtk-stage-toy",
    )


def test_a_missing_attribute_is_named(install: Install) -> None:
    install("a", "toy", value="toy_module:Tory", module=GOOD_STAGE)
    refused(lambda: discovery.get_stage("toy"), "'toy_module:Tory'", "toy_module has no 'Tory'", "a 1.0")


def test_a_missing_module_is_told_from_one_that_needs_what_is_missing(install: Install) -> None:
    install("a", "toy", value="toy_absent:Toy")
    refused(lambda: discovery.get_stage("toy"), "'toy_absent:Toy', but there is no module 'toy_absent'", "entry points")


def test_an_author_is_sent_to_the_source(install: Install) -> None:
    folder = install("a", "toy", value="toy_module:Toy", module="def broken(:")
    (folder / "direct_url.json").write_text('{"url": "file:///home/me/my%20stage", "dir_info": {"editable": true}}')
    refused(lambda: discovery.get_stage("toy"), "installed from its source, /home/me/my stage: mend it there")
    (folder / "entry_points.txt").write_text("[llmtk.stages]\ntoy = toy_other:Toy\n")
    discovery._scan_as_of.cache_clear()
    refused(lambda: discovery.get_stage("toy"), "/home/me/my stage/pyproject.toml", "pip install -e /home/me/my stage")


def test_an_entry_point_without_an_attribute_is_refused(install: Install) -> None:
    install("a", "toy", value="toy_module")
    refused(lambda: discovery.get_stage("toy"), "'toy_module'", "module:attribute")


def test_what_is_no_stage_is_refused(install: Install) -> None:
    install("a", "toy", value="toy_module:Toy", module="class Toy: ...")
    refused(lambda: discovery.get_stage("toy"), "stage 'toy' (a 1.0)", "not a subclass of llmtk.Stage")


@pytest.mark.parametrize(
    ("api", "told"), [(2, "pip install --upgrade llmtk-core"), (0, "pip install --upgrade llmtk-stage-toy")]
)
def test_a_stage_of_another_contract_says_which_side_to_upgrade(install: Install, api: int, told: str) -> None:
    install("llmtk-stage-toy", "toy", value="toy_module:Toy", module=f"{GOOD_STAGE}\n        api = {api}\n")
    refused(lambda: discovery.get_stage("toy"), f"version {api} of the contract", "this core has version 1", told)


def test_check_says_what_is_wrong_or_nothing(install: Install) -> None:
    install("a", "toy", value="toy_good:Toy", module=GOOD_STAGE)
    install("b", "toy-bad", value="toy_bad:Toy", module=GOOD_STAGE.replace("compute_loss", "compute_los"))
    install("c", "toy-reward", value="toy_reward:reward", module="reward = len", group=discovery.REWARDS)
    install("d", "toy-plugin", value="toy_plugin:Toy", module="class Toy: ...", group=discovery.PLUGINS)
    problems = {o.name: discovery.check(o) for group in discovery.GROUPS for o in offered(group)}
    assert problems["toy"] is problems["toy-reward"] is None
    assert "resembles the hook compute_loss" in (problems["toy-bad"] or "")
    assert "answers no hook" in (problems["toy-plugin"] or "")


def test_the_source_version_is_the_distribution_s() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text())["project"]["version"] == SOURCE_VERSION


def test_listing_imports_nothing_heavy_and_nothing_that_is_found(install: Install, tmp_path: Path) -> None:
    install("a", "toy", value="toy_module:Toy", module="raise RuntimeError")
    install("b", "toy-new", requires="llmtk-core>=7,<8")
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from llmtk.host import discovery
        assert "toy" in [offer.name for offer in discovery.list_stages()]
        heavy = "torch transformers rich pydantic pluggy packaging toy_module".split()
        print(*[name for name in heavy if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
