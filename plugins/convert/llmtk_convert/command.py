"""`llmtk convert`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llmtk_convert.conversion import Conversion

_EXAMPLES = """\b
Examples:
  llmtk convert llama3_lora_sft.yaml --output sft.yaml             LLaMA-Factory, axolotl: told by the keys
  llmtk convert dpo.yaml --from trl --method dpo                   TRL's files do not say the method
  llmtk convert trl sft --config sft.yaml --learning_rate 1e-5     TRL's command line, as it stands
  llmtk convert data/dataset_info.json --output sets.yaml          LLaMA-Factory's data sets, for data.catalog
"""


@click.command("convert", epilog=_EXAMPLES, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, required=True, metavar="FILE | trl METHOD [--KEY VALUE]...")
@click.option("--from", "peer", type=click.Choice(["trl", "llama-factory", "axolotl"]), help="Whose file it is.")
@click.option("--method", help="The method, as its program calls it: sft, dpo, reward, ...")
@click.option(
    "--output", metavar="FILE", type=click.Path(path_type=Path), help="Where the YAML goes, if not to stdout."
)
def command(words: tuple[str, ...], peer: str | None, method: str | None, output: Path | None) -> None:
    """Turn a configuration of TRL, LLaMA-Factory or axolotl into one of llmtk's.

    The YAML goes to stdout or a file, and is checked against llmtk's own configuration. What was carried over by
    another meaning, and what was not, is listed on stderr, by name and with the reason.
    """
    from llmtk import ConfigurationError
    from llmtk_convert.reading import is_command

    if output is not None and output.exists():
        raise ConfigurationError(f"--output {output} exists already. Give another file, or remove it")
    text, notes = (
        _from_command(words, peer, method) if is_command(words) else _from_file(Path(words[0]), peer, method, output)
    )
    if output is None:
        click.echo(text, nl=False)
    else:
        _write(output, text)
    click.echo("\n".join(notes), err=True)


def _from_file(file: Path, peer: str | None, method: str | None, output: Path | None) -> tuple[str, list[str]]:
    from llmtk import ConfigurationError
    from llmtk_convert.conversion import PEERS, convert, recognise
    from llmtk_convert.llama_factory import is_catalog
    from llmtk_convert.reading import read_settings

    settings = read_settings(file)
    try:
        if is_catalog(settings):
            return _catalog(file, settings, output)
        chosen = PEERS[peer] if peer else recognise(settings)
        return _told(convert(chosen, settings, method), str(file))
    except ConfigurationError as error:
        raise ConfigurationError(f"{file}: {error}") from None


def _from_command(words: tuple[str, ...], peer: str | None, method: str | None) -> tuple[str, list[str]]:
    from llmtk import ConfigurationError
    from llmtk_convert.conversion import PEERS, convert
    from llmtk_convert.reading import read_command

    if peer not in (None, "trl"):
        raise ConfigurationError(f"--from {peer}: a command line is read as TRL's alone; give the file of its settings")
    trl = PEERS["trl"]
    asked = read_command(words, trl.keys, method)
    made = convert(trl, asked.settings, asked.method)
    if asked.launcher:
        made.left.pop("num_processes", None)  # one of its words
        made.left[asked.launcher] = "llmtk launch starts several processes; batches are those of each"
    return _told(made, "a command line")


def _catalog(file: Path, settings: dict[str, Any], output: Path | None) -> tuple[str, list[str]]:
    from llmtk.config.reading import to_yaml
    from llmtk_convert.llama_factory import catalog

    made, lost = catalog(settings, Path(os.path.relpath(file.parent, output.parent if output else ".")))
    head = f"# {len(made)} data sets of {file} (LLaMA-Factory), for data.catalog\n"
    notes = [f"{file}: {len(made)} data sets, for data.catalog"]
    return f"{head}{to_yaml(made).rstrip()}\n", [*notes, *_listed("Not carried over:", lost)]


def _told(made: Conversion, place: str) -> tuple[str, list[str]]:
    """Return the YAML, and what is said of it."""
    from llmtk.config.reading import to_yaml

    head = f"# From {place} ({made.peer.title}, {made.method}) by llmtk convert\n"
    notes = [f"{place}: {made.peer.title}, {made.method} -> stage {made.stage}; {len(made.carried)} keys carried over"]
    notes += _listed("Carried over by another meaning:", made.changed)
    notes += _listed("Not carried over:", made.left)
    notes += _listed(f"Written, since {made.peer.title} takes something else where nothing is said:", made.defaults)
    notes += [f"- {remark}" for remark in made.remarks]
    return f"{head}{to_yaml(made.config).rstrip()}\n", notes


def _listed(title: str, items: dict[str, str]) -> Iterable[str]:
    """Return a title and the keys below it; keys of which the same is to be said stand in one line."""
    together: dict[str, list[str]] = {}
    for key, text in items.items():
        together.setdefault(text, []).append(key)
    return [title, *(f"  {', '.join(keys)}: {text}" for text, keys in together.items())] if items else []


def _write(output: Path, text: str) -> None:
    from llmtk import ConfigurationError

    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written: {error.strerror}") from error
