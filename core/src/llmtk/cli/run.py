"""`llmtk run`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmtk.run import Run

_SUFFIXES = (".yaml", ".yml", ".json")
_DATA = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".txt")
_EXAMPLES = """\b
Examples:
  llmtk run sft                                            a demo
  llmtk run sft model.name_or_path=MODEL data.train=FILE
  llmtk run sft config.yaml train.learning_rate=1e-5
  llmtk run config.yaml                                    `stage:` stands in the file
  llmtk run sft output_dir=runs/a --resume                 go on with that run
"""


class Asked(NamedTuple):
    """What a command line names."""

    stage: str | None
    config: str | None
    overrides: list[str]


resume_option = click.option(
    "--resume",
    is_flag=False,
    flag_value="auto",
    metavar="[auto|PATH]",
    help="Go on with a run: from a checkpoint's folder, or (auto) the newest sound one in output_dir.",
)


@click.command("run", epilog=_EXAMPLES)
@click.argument("words", nargs=-1, metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...")
@resume_option
def command(words: tuple[str, ...], resume: str | None) -> None:
    """Train with the method STAGE. Without a configuration this is a demo.

    The file's settings go over the stage's defaults, and KEY=VALUE over the file's. `llmtk show STAGE` lists the keys.
    """
    made(words, resume).train()


def made(words: Sequence[str], resume: str | None) -> Run:
    """Return the run that the words of `llmtk run` ask for. Errors are those of bad input."""
    if resume is not None and _belongs_to_words(resume):
        words, resume = (*words, resume), "auto"
    stage, layers = asked_for(words)
    from llmtk.run import Run

    return Run.from_layers(stage, *layers, resume=resume)


def asked_for(words: Sequence[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """Return the stage that the words of a command name, if one, and the configuration's layers, the later over the
    earlier. UsageError for words that are neither stage, file nor setting; ConfigurationError for a broken file.
    """
    asked = sort_words(words)
    return asked.stage, layers_of(asked)


def _belongs_to_words(resume: str) -> bool:
    """Tell `--resume KEY=VALUE`, where click takes the next word for the option's value: a checkpoint is a folder."""
    return resume.endswith(_SUFFIXES) or ("=" in resume and not os.path.isdir(resume))


def sort_words(words: Sequence[str]) -> Asked:
    """Tell apart the stage, the configuration file and the settings of a command line."""
    files = [word for word in words if "=" not in word and _is_file_name(word)]
    stages = [word for word in words if "=" not in word and word not in files]
    for kind, found in (("stage", stages), ("configuration file", files)):
        if len(found) > 1:
            raise click.UsageError(f"One {kind} at most, got {' and '.join(found)}. A setting is written KEY=VALUE.")
    if not stages and not files:
        raise click.UsageError("Name a stage: llmtk run STAGE. `llmtk list-stages` lists those installed.")
    if files and files[0].endswith(_DATA):
        raise click.UsageError(f"{files[0]} is no configuration. To train on it: data.train={files[0]}")
    overrides = [word for word in words if "=" in word]
    return Asked(stages[0] if stages else None, files[0] if files else None, overrides)


def _is_file_name(word: str) -> bool:
    return word.endswith(_SUFFIXES) or os.sep in word or os.path.isfile(word)


def layers_of(asked: Asked) -> list[dict[str, Any]]:
    """Read the settings before anything heavy is imported, so that a mistake in them is told at once."""
    from llmtk.config.reading import parse_overrides, read_file

    return [*([read_file(asked.config)] if asked.config else []), parse_overrides(asked.overrides)]
