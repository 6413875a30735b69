"""New distributions: a stage, a plugin or a reward, ready to be installed, tested and published.

The templates stand beside this file, one folder for each kind and one for what they share.
"""

from __future__ import annotations

import inspect
import keyword
import re
import sys
from dataclasses import dataclass, field, replace
from importlib import metadata
from importlib.resources import files
from importlib.util import resolve_name
from pathlib import Path
from typing import TYPE_CHECKING

from llmtk.errors import ConfigurationError
from llmtk.host import discovery

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llmtk.contract import Stage


@dataclass(frozen=True)
class Kind:
    """What can be made: the folder of its templates, how distributions are called, and where they register."""

    name: str
    prefix: str
    group: str
    description: str
    needs: tuple[str, ...] = ("llmtk-core",)
    """Distributions of llmtk's, of the version of the core, that it is built on."""
    wanted: tuple[str, ...] = ()
    """What its tests need beside."""


def _kinds() -> dict[str, Kind]:
    kinds = (
        Kind("stage", "llmtk-stage-", discovery.STAGES, "Fine-tuning in which tokens that are known count less"),
        Kind("plugin", "llmtk-plugin-", discovery.PLUGINS, "Says when a loss jumps", wanted=("llmtk-stage-sft",)),
        Kind(
            "reward",
            "llmtk-reward-",
            discovery.REWARDS,
            "Rewards completions that end like the row's answer",
            needs=("llmtk-core", "llmtk-rl"),
        ),
    )
    return {kind.name: kind for kind in kinds}


KINDS = _kinds()


@dataclass(frozen=True)
class New:
    """A distribution to be written."""

    kind: Kind
    name: str
    description: str
    class_name: str
    dependencies: Sequence[str] = field(default_factory=tuple)
    source: str | None = None
    """The module's text, in place of the template's."""

    @property
    def distribution(self) -> str:
        """What pip calls it."""
        return f"{self.kind.prefix}{self.name}"

    @property
    def module(self) -> str:
        """What Python calls it."""
        return self.distribution.replace("-", "_")


def new(kind: str, name: str, *, start: str | None = None, description: str | None = None) -> New:
    """Return a distribution of that kind; `start` is an installed stage, whose module it begins with.

    Raises:
        ConfigurationError: A name or a description that cannot be used.
        PluginError: `start` is not installed, or broken.
    """
    one = KINDS[kind]
    name = name.removeprefix(one.prefix)
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ConfigurationError(
            f"{name!r} is no name for a {kind}: small letters, digits and single hyphens, a letter first, as my-{kind}"
        )
    if name in discovery.RESERVED:
        raise ConfigurationError(
            f"{name!r} is a section of the configuration; no {kind} may be called so. Choose another"
        )
    if taken := [offer for offer in discovery.offers(one.group) if offer.name == name]:
        raise ConfigurationError(f"There is a {taken[0]} already. Choose another name, or uninstall that one")
    needed = [_compatible(distribution, discovery.core_version()) for distribution in one.needs]
    made = New(one, name, one.description, _class_name(one, name), needed)
    made = made if start is None else _from_stage(made, start)
    return made if description is None else _described(made, _checked(description))


def _class_name(kind: Kind, name: str) -> str:
    """Return what its class is called: not as a keyword, nor as anything that its module's template names."""
    called = "".join(part.capitalize() for part in name.split("-"))
    taken = keyword.iskeyword(called) or re.search(rf"\b{called}\b", _template(f"{kind.name}/module.py"))
    return f"{called}{kind.name.capitalize()}" if taken else called


def _checked(description: str) -> str:
    """Return a description that may stand between quotes and before a full stop."""
    text = description.strip().removesuffix(".")
    if not text or not text.isprintable() or '"' in text or "\\" in text:
        raise ConfigurationError(
            f"{description!r} is no description: one line of text, without double quotes and backslashes"
        )
    return text


def _described(made: New, text: str) -> New:
    """Return it with this description, which the class of a stage that it began from says too."""
    summary = r"^(\s+summary = ).*$"
    source = made.source and re.sub(summary, lambda found: f'{found[1]}"{text}"', made.source, flags=re.MULTILINE)
    return replace(made, description=text, source=source)


def write(made: New, folder: Path) -> list[Path]:
    """Write the distribution into a folder that is not there or empty; return its files.

    Raises:
        ConfigurationError: There is something in the folder, or it cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is there already, and not empty. Name another folder: --output FOLDER")
    texts = {
        "pyproject.toml": _filled("common/pyproject.toml", made),
        f"{made.module}.py": made.source or _filled(f"{made.kind.name}/module.py", made),
        f"test_{made.module}.py": _filled(f"{made.kind.name}/test.py", made),
        "README.md": _filled(f"{made.kind.name}/README.md", made),
        ".github/workflows/test.yml": _filled("common/ci.yml", made),
    }
    try:
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{folder} cannot be written: {error.strerror}. Name another: --output FOLDER"
        ) from error
    return [folder / name for name in texts]


def _filled(template: str, made: New) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(_template(template)).render(
        name=made.name,
        description=made.description,
        class_name=made.class_name,
        distribution=made.distribution,
        module=made.module,
        dependencies=made.dependencies,
        group=made.kind.group,
        wanted=made.kind.wanted,
    )


def _template(name: str) -> str:
    return files(__name__).joinpath("templates", f"{name}.jinja").read_text(encoding="utf-8")


def _from_stage(made: New, start: str) -> New:
    """Begin with an installed stage's module: its text, under the new name."""
    cls, offer = discovery.get_stage(start), discovery.find(discovery.STAGES, start)
    module = sys.modules[cls.__module__]
    source = _renamed(inspect.getsource(module), start, made.name, cls.Options.model_fields)
    source = _absolute(source, module.__package__ or "")
    required = [one for one in (metadata.requires(offer.distribution) or ()) if not re.search(r"\bextra\s*==", one)]
    dependencies = {_project(one): one.replace('"', "'") for one in required}
    if _imports_neighbours(cls, source, offer.distribution):
        dependencies[offer.distribution] = _compatible(offer.distribution, offer.version)
    description = f"{offer.summary}, begun from {start}"
    return New(made.kind, made.name, description, cls.__name__, tuple(dependencies.values()), source)


def _renamed(source: str, start: str, name: str, options: Iterable[str]) -> str:
    """Return a module's text in which the section of a stage is called `name`.

    By the places where sections are named: of what else is called alike, such as a loss, most stays as it is.
    """
    quoted = f'"{re.escape(start)}"'
    for place in (
        rf"(^\s+(?:name|section|name = section) = ){quoted}",
        rf"(\w\(){quoted}(?=[,)])",  # refuse_unused("dpo", ...)
        rf"([{{ ]){quoted}(?=: \{{)",  # the demo's {"dpo": {...}}
    ):
        source = re.sub(place, rf'\1"{name}"', source, flags=re.MULTILINE)
    named = "|".join((r"\{", *(rf"{option}\b" for option in options)))  # as its messages name them
    return re.sub(rf"\b{re.escape(start)}\.(?={named})", f"{name}.", source)


def _absolute(source: str, package: str) -> str:
    """Return a module's text whose relative imports name the package that it was in."""
    relative = r"^(\s*from )(\.+[\w.]*)(?= import\b)"
    return re.sub(relative, lambda found: found[1] + resolve_name(found[2], package), source, flags=re.MULTILINE)


def _imports_neighbours(cls: type[Stage], source: str, distribution: str) -> bool:
    """Say whether a module needs others of its distribution."""
    own = {module for module, names in metadata.packages_distributions().items() if distribution in names}
    home = Path(inspect.getsourcefile(cls) or "").parent
    if home.name not in ("site-packages", "dist-packages"):  # an editable installation lists no modules
        own |= {file.stem for file in home.glob("*.py")}
    imported = set(re.findall(r"^\s*(?:from|import) (\w+)", source, flags=re.MULTILINE))
    alone = {cls.__module__} if not sys.modules[cls.__module__].__package__ else set()
    return bool((own - alone) & imported)


def _project(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def _compatible(distribution: str, version: str) -> str:
    """Return the range of versions that a distribution made today works with: 0.3.1 gives >=0.3,<0.4."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", version)), 0, 0]
    above = f"{major}.{minor + 1}" if major == 0 else f"{major + 1}"
    return f"{distribution}>={major}.{minor},<{above}"
