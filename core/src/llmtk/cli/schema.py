"""`llmtk schema STAGE`."""

from __future__ import annotations

import click

from llmtk.cli.tables import as_json


@click.command("schema")
@click.argument("stage")
def command(stage: str) -> None:
    """Print the JSON Schema of a stage's configuration, for editors and forms."""
    from llmtk.config.run_config import json_schema
    from llmtk.host.discovery import get_stage

    as_json(json_schema(stage, get_stage(stage)))
