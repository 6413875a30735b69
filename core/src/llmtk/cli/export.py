"""`llmtk export RUN`."""

from __future__ import annotations

from typing import Literal

import click


@click.command("export")
@click.argument("run", metavar="RUN")
@click.option("--output", required=True, metavar="FOLDER", help="A folder that is not there yet, or is empty.")
@click.option("--merge", is_flag=True, help="Merge the adapter into its base.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type of the weights. By default the one that they are saved in.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Size of a file of weights, at most: 500MB, 2GB.")
@click.option("--quantize", type=click.Choice(["4bit", "8bit"]), help="Quantise the weights, by bitsandbytes.")
def command(
    run: str,
    output: str,
    merge: bool,
    dtype: str | None,
    max_shard_size: str | None,
    quantize: Literal["4bit", "8bit"] | None,
) -> None:
    """Write the model of the finished run in the folder RUN to a folder that loads with transformers alone.

    Tokenizer, chat template, generation config and card go along.
    """
    from llmtk.models.exporting import export

    folder = export(run, output, merge=merge, dtype=dtype, max_shard_size=max_shard_size, quantize=quantize)
    click.echo(f"The model of {run} is in {folder}")
