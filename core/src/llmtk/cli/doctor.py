"""`llmtk doctor [MODEL]`."""

from __future__ import annotations

import platform
from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.tables import aligned, as_json, described, offers_table
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.host.discovery import Offer

CORE = "llmtk-core"


@click.command("doctor")
@click.argument("model", required=False)
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
@click.pass_context
def command(ctx: click.Context, model: str | None, for_scripts: bool) -> None:
    """Check this installation: packages, devices, stages and plugins. Exits with 1 if something is wrong.

    With MODEL (a folder, a hub name, or builtin), check that model instead: that it loads, and whether it is scored
    packed, which is fast, or padded, and why.
    """
    if model:
        about = _model(model)
        lines, problems = _model_lines(about), 0
    else:
        offers = _offers()
        about = _installation(offers)
        problems = sum(bool(part["problem"]) for kind in ("packages", "stages", "plugins") for part in about[kind])
        lines = _installation_lines(about, offers, problems)
    if for_scripts:
        as_json(about)
    else:
        click.echo("\n".join(lines))
    if problems:
        ctx.exit(1)


def _offers() -> list[Offer]:
    """Return all that is installed, imported to see whether it works."""
    offers = [offer for group in discovery.GROUPS for offer in discovery.offers(group)]
    return [replace(offer, problem=offer.problem or discovery.check(offer)) for offer in offers]


def _installation(offers: list[Offer]) -> dict[str, Any]:
    import torch

    from llmtk.config.sections import TrainConfig
    from llmtk.training import zero
    from llmtk.training.backend import choose_precision

    precision, why = choose_precision(TrainConfig.model_validate({}))
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "packages": _packages(),
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu_threads": torch.get_num_threads(),
        "deepspeed": zero.missing() or metadata.version("deepspeed"),
        "precision": {"no": "float32"}.get(precision, precision),
        "why_precision": why,
        "stages": [described(offer) for offer in offers if offer.group == discovery.STAGES],
        "plugins": [described(offer) for offer in offers if offer.group != discovery.STAGES],
    }


def _packages() -> list[dict[str, str]]:
    """Return what llmtk-core stands on: name, version, range, and what is wrong with it."""
    from packaging.requirements import Requirement

    packages = []
    for requirement in map(Requirement, metadata.requires(CORE) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = metadata.version(requirement.name)
            problem = (
                "" if requirement.specifier.contains(version, prereleases=True) else "not a version that was tested"
            )
        except metadata.PackageNotFoundError:
            version, problem = "", "not installed"
        packages.append(
            {"name": requirement.name, "version": version, "range": str(requirement.specifier), "problem": problem}
        )
    return packages


def _installation_lines(found: dict[str, Any], offers: list[Offer], problems: int) -> list[str]:
    devices = ", ".join(found["devices"]) or f"CPU, {found['cpu_threads']} threads"
    versions = [[package["name"], package["version"] or "none"] for package in found["packages"]]
    lines = aligned(
        [
            ["llmtk-core", discovery.core_version()],
            ["Python", found["python"]],
            *versions,
            ["deepspeed", f"{found['deepspeed']} (for the section deepspeed alone)"],
            ["devices", devices],
            ["precision", f"{found['precision']} ({found['why_precision']})"],
        ]
    )
    for package in found["packages"]:
        if package["problem"]:
            lines.append(f"    problem: {package['name']} is {package['problem']}: {package['range']}")
    lines += ["", *(offers_table(offers, with_kind=True) if offers else ["No stage and no plugin is installed."])]
    said = f"{problems} problem{'s' * (problems > 1)} found, see above." if problems else "No problem found."
    return [*lines, "", said]


def _model(name: str) -> dict[str, Any]:
    """Load a model, and prove packed scoring on it, as a run does when it starts."""
    from llmtk.models.loading import disable_dropout
    from llmtk.models.saving import load_folder
    from llmtk.scoring import prepare
    from llmtk.scoring.proof import LOGPS, VALUES, why_not_packed

    model, tokenizer = load_folder(name)
    if not getattr(model, "is_quantized", False):
        model.float().requires_grad_(True)
    model.train()  # as it is trained
    disable_dropout(model)
    measured: dict[str, float] = {}
    _, has_values = prepare(model)
    why = why_not_packed(model, measured, VALUES if has_values else LOGPS)
    config: Any = model.config
    return {
        "model": name,
        "architecture": config.model_type,
        "head": "one value a token (a reward model)" if has_values else "language model",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": config.get_text_config().vocab_size,
        "tokens": len(tokenizer),
        "chat_template": bool(tokenizer.chat_template),
        "scoring": "packed" if why is None else "padded",
        "why_padded": why or "",
        "distances": measured,
    }


def _model_lines(found: dict[str, Any]) -> list[str]:
    packed = found["scoring"] == "packed"
    rows = [
        ["model", found["model"]],
        ["architecture", found["architecture"]],
        ["head", found["head"]],
        ["parameters", f"{found['parameters']:,}"],
        ["tokenizer", f"{found['tokens']:,} tokens, {'a' if found['chat_template'] else 'no'} chat template"],
        ["scoring", "packed, proven on this model" if packed else f"padded: {found['why_padded']}"],
    ]
    rows += [["", f"distance from padded, {what}: {value:.1e}"] for what, value in found["distances"].items()]
    return aligned(rows)
