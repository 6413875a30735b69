"""`llmtk show STAGE`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.tables import as_json
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.config.described import Key
    from llmtk.contract import Stage
    from llmtk.host.discovery import Offer


@click.command("show")
@click.argument("stage")
@click.option("--json", "for_scripts", is_flag=True, help="Print JSON.")
def command(stage: str, for_scripts: bool) -> None:
    """Show what STAGE does, the rows it takes, and every option with its default."""
    from llmtk.config.described import described_keys

    stage_class = discovery.get_stage(stage)
    about = _about(discovery.find(discovery.STAGES, stage), stage_class)
    keys = described_keys(stage, stage_class)
    if for_scripts:
        as_json({**about, "options": [key._asdict() for key in keys]})
        return
    click.echo("\n".join(f"{name.replace('_', ' ')}: {_text(value)}" for name, value in about.items() if value))
    for key in keys:
        click.echo(f"\n{_headline(key)}\n{textwrap.indent(textwrap.fill(key.help, 100), '    ')}")


def _headline(key: Key) -> str:
    if key.is_section:
        return f"{key.key}:"
    return f"{key.key} ({key.type}), required" if key.default is None else f"{key.key} ({key.type}) = {key.default}"


def _about(offer: Offer, stage: type[Stage]) -> dict[str, Any]:
    return {
        "stage": offer.name,
        "distribution": f"{offer.distribution} {offer.version}",
        "summary": stage.summary or offer.summary,
        "paper": stage.paper,
        "row_types": list(stage.row_types),
        "needs": sorted(stage.needs),
        "honours": sorted(stage.honours),
    }


def _text(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)
