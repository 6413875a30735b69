"""What installed distributions offer: stages, plugins, rewards, metrics, generators, evaluators and commands.

Entry points say what there is. Listing reads their metadata and imports nothing of what it finds; `load` imports the
one thing that was asked for, so a broken neighbour hurts nobody. Two distributions that claim one name are an error,
never a silent pick.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module, metadata
from typing import TYPE_CHECKING

from llmtk._version import SOURCE_VERSION
from llmtk.errors import PluginError, located, suggest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from llmtk.contract import Stage

STAGES = "llmtk.stages"
PLUGINS = "llmtk.plugins"
REWARDS = "llmtk.rewards"
METRICS = "llmtk.metrics"
GENERATORS = "llmtk.generators"
EVALUATORS = "llmtk.evaluators"
COMMANDS = "llmtk.commands"
GROUPS = (STAGES, PLUGINS, REWARDS, METRICS, GENERATORS, EVALUATORS, COMMANDS)

RESERVED = frozenset(
    (
        "stage",
        "model",
        "data",
        "peft",
        "train",
        "samples",
        "plugins",
        "output_dir",
        "fsdp",
        "deepspeed",
        "predict",
        "generation",
        "rewards",
    )
)
"""Sections and keys of the configuration: no stage or plugin may be called so."""

_CORE = "llmtk-core"
_DISTRIBUTIONS = {STAGES: "llmtk-stage-", PLUGINS: "llmtk-plugin-"}
"""How distributions are named that offer one thing of a group."""


@dataclass(frozen=True)
class Offer:
    """Something that an installed distribution offers under a name."""

    group: str
    name: str
    distribution: str
    version: str
    summary: str
    value: str
    """Where it stands: `module:attribute`."""
    requires: str = ""
    """The requirement on llmtk-core, as the distribution states it; empty where it states none."""
    problem: str | None = None
    """Why it cannot be used, if so: its name is claimed twice or reserved, or it is for another core."""

    def __str__(self) -> str:
        """Return `stage 'kto' (llmtk-stage-kto 0.3.0)`."""
        return f"{_kind(self.group)} {self.name!r} ({self.distribution} {self.version})"


def offers(group: str) -> list[Offer]:
    """Return what is installed of a group, by name; unusable ones too, with their problem."""
    return sorted(_scan().offers.get(group, ()), key=lambda offer: (offer.name, offer.distribution))


def list_stages() -> list[Offer]:
    """Return the installed stages, by name, without importing them."""
    return offers(STAGES)


def find(group: str, name: str) -> Offer:
    """Return the one usable offer of that name.

    Raises PluginError where nothing or more than one distribution offers it, the name is reserved, or it is for
    another version of the core.
    """
    found = [offer for offer in offers(group) if offer.name == name]
    if not found:
        raise PluginError(_unknown(group, name))
    return _usable(found[0])


def load(offer: Offer) -> object:
    """Import an offer, and it alone. Raises PluginError where it cannot be used, imported or found in its module."""
    module_name, attributes = _place(_usable(offer))
    try:
        found: object = import_module(module_name)
    except (Exception, SystemExit) as error:  # a stage may fail in any way, and a module that exits is broken too
        if isinstance(error, ModuleNotFoundError) and error.name == module_name:
            raise PluginError(_misnamed(offer, f"there is no module {module_name!r}")) from error
        raise PluginError(
            f"The {offer} cannot be imported: {module_name} raised {located(error)}. {_mend(offer)}"
        ) from error
    for attribute in attributes:
        if not hasattr(found, attribute):
            raise PluginError(_misnamed(offer, f"{module_name} has no {attribute!r}"))
        found = getattr(found, attribute)
    return found


def get_stage(name: str) -> type[Stage]:
    """Return an installed stage's class, checked against the contract.

    Raises:
        PluginError: None has that name, two distributions offer it, it cannot be imported, or breaks the contract.
    """
    from llmtk.host.checks import check_stage

    offer = find(STAGES, name)
    return check_stage(load(offer), str(offer), offer.distribution)


def get_plugin(name: str) -> type:
    """Return an installed plugin's class, checked against the contract. Raises PluginError as `find` and `load` do."""
    from llmtk.host.checks import check_plugin

    offer = find(PLUGINS, name)
    return check_plugin(load(offer), str(offer))


def check(offer: Offer) -> str | None:
    """Import an offer and check it against the contract; return what is wrong with it, or None."""
    try:
        if offer.group == STAGES:
            get_stage(offer.name)
        elif offer.group == PLUGINS:
            get_plugin(offer.name)
        else:
            load(offer)
    except PluginError as error:
        return str(error)
    return None


@lru_cache(maxsize=1)
def core_version() -> str:
    """Return the running core's version."""
    try:
        # A damaged installation gives None, against what its type says.
        return metadata.version(_CORE) or SOURCE_VERSION
    except Exception:
        return SOURCE_VERSION


# Scanning


@dataclass(frozen=True)
class _Found:
    offers: dict[str, list[Offer]]
    unreadable: tuple[str, ...]
    """Distributions that seem to offer something, and whose metadata cannot be read."""


def _scan() -> _Found:
    return _scan_as_of(tuple((entry, _changed(entry)) for entry in sys.path))


def _changed(entry: str) -> int:
    try:
        return os.stat(entry or ".").st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=1)
def _scan_as_of(_path: tuple[tuple[str, int], ...]) -> _Found:
    """Scan once for each state of the path: an installation changes its folder's time."""
    by_name: dict[tuple[str, str], list[Offer]] = defaultdict(list)
    seen: set[str] = set()
    unreadable: list[str] = []
    for distribution in metadata.distributions():
        try:
            # Of one distribution that stands on the path twice, Python imports the first.
            if not _offers_something(distribution) or (name := _normalized(distribution)) in seen:
                continue
            seen.add(name)
            for offer in list(_read(distribution)):
                by_name[offer.group, offer.name].append(offer)
        except Exception:  # whatever is wrong with one distribution's metadata must not hurt the others
            unreadable.append(str(getattr(distribution, "_path", distribution)))
    found: dict[str, list[Offer]] = defaultdict(list)
    for (group, _), claims in by_name.items():
        found[group] += [replace(offer, problem=_problem(offer, claims)) for offer in claims]
    return _Found(dict(found), tuple(unreadable))


def _offers_something(distribution: metadata.Distribution) -> bool:
    """Tell by the text alone, since parsing every distribution's metadata would take most of a listing's time."""
    try:
        return "[llmtk." in (distribution.read_text("entry_points.txt") or "").replace(" ", "")
    except UnicodeDecodeError:
        return False


def _normalized(distribution: metadata.Distribution) -> str:
    return _plain(distribution.metadata["Name"])


def _plain(name: str) -> str:
    """Return a name as pip compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _read(distribution: metadata.Distribution) -> Iterator[Offer]:
    about = distribution.metadata
    requires = _core_requirement(distribution.requires or ())
    for entry in distribution.entry_points:
        if entry.group in GROUPS:
            yield Offer(
                group=entry.group,
                name=entry.name,
                distribution=about["Name"],
                version=about["Version"],
                summary=(about.get_all("Summary") or [""])[0],
                value=entry.value,
                requires=requires,
            )


def _core_requirement(requirements: Iterable[str]) -> str:
    for requirement in requirements:
        if re.match(r"llmtk[-_.]+core(?![\w.-])", requirement, re.IGNORECASE) and not re.search(
            r";.*\bextra\b", requirement
        ):
            return requirement
    return ""


# Problems


def _problem(offer: Offer, claims: list[Offer]) -> str | None:
    if len(claims) > 1:
        return _claimed_twice(claims)
    if offer.group in (STAGES, PLUGINS) and offer.name in RESERVED:
        return (
            f"The {offer} has a reserved name: {offer.name!r} is a part of every configuration. "
            f"Its author must rename it; until then: pip uninstall {offer.distribution}."
        )
    return _incompatible(offer) if offer.requires else None


def _claimed_twice(claims: list[Offer]) -> str:
    first = claims[0]
    distributions = sorted({f"{claim.distribution} {claim.version}" for claim in claims})
    if len(distributions) == 1:
        return f"The {first} is named {len(claims)} times in its distribution's entry points. Its author must mend it."
    return (
        f"The {_kind(first.group)} name {first.name!r} is claimed by {' and '.join(distributions)}. Remove all but "
        f"one: {' or '.join(f'pip uninstall {text.split()[0]}' for text in distributions)}."
    )


def _incompatible(offer: Offer) -> str | None:
    try:
        if _accepts(offer.requires, core_version()):
            return None
    except ValueError as error:  # packaging's errors are ValueErrors
        return f"The {offer} states a requirement that cannot be read: {offer.requires!r} ({error})."
    return (
        f"The {offer} is for another core: it requires {offer.requires}, and this is {_CORE} {core_version()}. "
        f"Install the two together, so that pip finds versions that agree: "
        f"pip install --upgrade {_CORE} {offer.distribution}."
    )


_CLAUSE = re.compile(r"(>=|<=|<|>|==|!=)\s*(\d+(?:\.\d+)*)")


def _accepts(requirement: str, version: str) -> bool:
    """Tell whether a requirement accepts a version. Plain numbers are compared here: packaging imports in 20 ms."""
    clauses = [_CLAUSE.fullmatch(clause.strip()) for clause in re.sub(r"^[\w.-]+", "", requirement).split(",")]
    if not all(clauses) or not re.fullmatch(r"\d+(\.\d+)*", version):
        return _packaging_accepts(requirement, version)
    return all(_holds(_release(version), clause[1], _release(clause[2])) for clause in clauses if clause)


def _release(version: str) -> list[int]:
    numbers = [int(part) for part in version.split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return numbers


def _holds(version: list[int], operator: str, bound: list[int]) -> bool:
    match operator:
        case ">=":
            return version >= bound
        case "<=":
            return version <= bound
        case "<":
            return version < bound
        case ">":
            return version > bound
        case _:
            return (version == bound) == (operator == "==")


def _packaging_accepts(requirement: str, version: str) -> bool:
    from packaging.requirements import Requirement

    parsed = Requirement(requirement)
    if parsed.marker and not parsed.marker.evaluate():
        return True
    return parsed.specifier.contains(version, prereleases=True)


def _usable(offer: Offer) -> Offer:
    if offer.problem:
        raise PluginError(offer.problem)
    return offer


def _place(offer: Offer) -> tuple[str, list[str]]:
    match = re.fullmatch(r"\s*([\w.]+)\s*:\s*([\w.]+)\s*(\[.*\])?\s*", offer.value)
    if not match:
        raise PluginError(f"The {offer} stands at {offer.value!r}; an entry point's value is module:attribute.")
    return match[1], match[2].split(".")


def _unknown(group: str, name: str) -> str:
    known = sorted({offer.name for offer in offers(group)})
    kind = _kind(group)
    brought = _brought(group, name)
    parts = [f"Unknown {kind} {name!r}.{'' if brought else suggest(name, known)}"]
    parts.append(f"Installed {kind}s: {', '.join(known)}." if known else f"No {kind} is installed.")
    if brought:
        parts.append(brought)
    elif group in _DISTRIBUTIONS and _plain(name) not in map(_plain, known):
        package = f"{_DISTRIBUTIONS[group]}{name}"
        parts.append(f"One that is published under the usual name is installed by: pip install {package}")
        parts.append("One of your own by: pip install -e FOLDER, anew when its entry points have changed")
    if unreadable := _scan().unreadable:
        parts.append(f"The metadata of these cannot be read; install them anew: {', '.join(unreadable)}")
    return "\n".join(parts)


def _brought(group: str, name: str) -> str:
    """Say what an installed distribution brings in place of the stage or plugin of its name; empty where none does."""
    package = _plain(f"{_DISTRIBUTIONS.get(group, '')}{name}")
    offers = [offer for found in _scan().offers.values() for offer in found if _plain(offer.distribution) == package]
    if group not in _DISTRIBUTIONS or not offers or any(offer.group == group for offer in offers):
        return ""
    kinds = sorted({offer.group for offer in offers})
    things = [f"{_kind(each)}s ({', '.join(offer.name for offer in offers if offer.group == each)})" for each in kinds]
    return f"{offers[0].distribution} is installed: it brings {' and '.join(things)}, and no {_kind(group)}"


def _misnamed(offer: Offer, why: str) -> str:
    """Say that an entry point names what is not there, and what to do."""
    if source := _source(offer):
        mend = f"Mend the entry points in {source}/pyproject.toml, and install it again: pip install -e {source}."
    else:
        mend = f"The mend is in the entry points of {offer.distribution}: pip install --upgrade {offer.distribution}."
    return f"The {offer} names {offer.value!r}, but {why}. {mend}"


def _mend(offer: Offer) -> str:
    """Say what to do about a distribution that cannot be imported: to its author, or to anybody else."""
    if source := _source(offer):
        return f"It is installed from its source, {source}: mend it there."
    return (
        f"Mend it: pip install --upgrade --force-reinstall {offer.distribution}, or remove it: "
        f"pip uninstall {offer.distribution}."
    )


def _source(offer: Offer) -> str:
    """Return the folder from which a distribution is installed as an editable one; empty for others."""
    import json
    from urllib.parse import unquote, urlparse

    try:
        about = json.loads(metadata.distribution(offer.distribution).read_text("direct_url.json") or "{}")
        return unquote(urlparse(about["url"]).path) if about["dir_info"]["editable"] else ""
    except (metadata.PackageNotFoundError, ValueError, KeyError, TypeError):
        return ""


def _kind(group: str) -> str:
    return group.removeprefix("llmtk.").removesuffix("s")
