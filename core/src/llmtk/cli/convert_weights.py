"""`llmtk convert-weights`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("convert-weights")
@click.argument("folder", type=click.Path(path_type=Path))
def command(folder: Path) -> None:
    """Turn the pickled weights in FOLDER (.bin, .pt, .pth) into safetensors, which llmtk reads.

    Nothing but tensors is read from a pickle: one that would run code is refused. The pickles stay where they are.
    """
    from llmtk.models.pickled import convert

    for file in convert(folder):
        click.echo(f"wrote {file} ({file.stat().st_size:,} bytes)")
