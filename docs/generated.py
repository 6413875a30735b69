"""Pages that are made from what they are about, when the site is built: stages, configuration, commands, hooks."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import click
from mkdocs.structure.files import File, Files

from llmtk.cli.commands import llmtk
from llmtk.config.described import Key, described_keys
from llmtk.config.run_config import SHARED
from llmtk.contract import Stage
from llmtk.host import discovery, hookspecs


def on_files(files: Files, config: Any) -> Files:
    """Add the pages. mkdocs calls this when it has listed those that are written."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Return the text of each page, by its path."""
    stages = {offer.name: discovery.get_stage(offer.name) for offer in discovery.list_stages()}
    made = {f"stages/{name}.md": stage_page(name, stage) for name, stage in stages.items()}
    return made | {
        "stages/index.md": stages_page(stages),
        "configuration.md": configuration_page(next(iter(stages.items()))),
        "commands.md": commands_page(),
        "hooks.md": hooks_page(),
    }


def stages_page(stages: dict[str, type[Stage]]) -> str:
    """Compare the stages."""
    lines = [
        "# Stages\n",
        "What each method takes and needs. Those that need a reference keep it without a second model where they can:",
        "an adapter that is switched off, or log-probs that are computed once (`train.precompute_reference`).\n",
        "| stage | what it does | rows | reference | reward | writes as it trains | trains |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, stage in stages.items():
        reference = stage().reference
        cells = [
            f"[{name}]({name}.md)",
            stage.summary,
            ", ".join(stage.row_types),
            {"none": "", "frozen": "frozen", "changing": "moves"}[reference],
            "yes" if "reward" in stage.needs else "",
            "yes" if "generation" in stage.needs else "",
            "a head of one value" if stage.head == "value" else "the language model",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def stage_page(name: str, stage: type[Stage]) -> str:
    """Describe a stage by its module's own words, and its options."""
    offer = discovery.find(discovery.STAGES, name)
    keys = [key for key in described_keys(name, stage) if key.key.split(".")[0] == name and not key.is_section]
    rows = ", ".join(f"`{row_type}`" for row_type in stage.row_types)
    return "\n".join(
        [
            f"# {name}\n",
            f"{inspect.getdoc(sys.modules[stage.__module__])}\n",
            f"    pip install {offer.distribution}\n    llmtk run {name}\n",
            f"Paper: {stage.paper}. Rows: {rows}."
            + (f" Optional keys that it honours: {', '.join(sorted(stage.honours))}." if stage.honours else ""),
            "\n## Options\n",
            *table(keys),
            "",
            *([f"## Citation\n\n```bibtex\n{inspect.cleandoc(stage.citation)}\n```\n"] if stage.citation else []),
        ]
    )


def configuration_page(example: tuple[str, type[Stage]]) -> str:
    """List the keys that all stages share."""
    name, stage = example
    keys = described_keys(name, stage)
    lines = ["# Configuration\n", "The keys that all stages share. A stage adds a section of its own name.\n"]
    for section in SHARED:
        of_section = [key for key in keys if key.key.split(".")[0] == section]
        head = next((key for key in of_section if key.key == section), None)
        lines += [f"## {section}\n", *([f"{head.help}\n"] if head else [])]
        lines += [*table([key for key in of_section if not key.is_section]), ""]
    return "\n".join(lines)


def table(keys: list[Key]) -> list[str]:
    """Return keys as a table."""
    if not keys:
        return ["None."]
    rows = [
        f"| `{key.key}` | {_cell(key.type)} | {'required' if key.default is None else f'`{_cell(key.default)}`'} "
        f"| {_cell(key.help)} |"
        for key in keys
    ]
    return ["| key | type | default | |", "|---|---|---|---|", *rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def commands_page() -> str:
    """Give the help of every command."""
    lines = ["# Commands\n"]
    with click.Context(llmtk, info_name="llmtk") as context:
        for name in llmtk.list_commands(context):
            command = llmtk.get_command(context, name)
            assert command is not None
            lines += _helps(command, name, context)
    return "\n".join(lines)


def _helps(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    """Give the help of a command, and of each of those below it."""
    with click.Context(command, info_name=name, parent=parent) as context:
        yield from (f"## {context.command_path}\n", "```text", command.get_help(context), "```\n")
        for below, inner in getattr(command, "commands", {}).items():
            yield from _helps(inner, below, context)


def hooks_page() -> str:
    """List every hook with its signature and what it is for."""
    lines = [
        "# Hooks\n",
        "Every hook takes the run and at most one object more. A stage answers by a method of that name, a plugin by",
        "one with `@llmtk.hookimpl`. [Writing a stage](writing-a-stage.md) says which of them a stage needs.\n",
    ]
    for spec in hookspecs.SPECS:
        lines += [f"## {_title(spec.__name__)}\n", f"{inspect.getdoc(spec)}\n"]
        lines += list(_hooks(spec))
    return "\n".join(lines)


def _hooks(spec: type) -> Iterator[str]:
    for name in hookspecs.names(spec):
        function = vars(spec)[name]
        parameters = list(inspect.signature(function).parameters.values())[1:]
        told = ", ".join(f"{one.name}: {one.annotation}" for one in parameters)
        yield f"### {name}\n"
        yield f"```python\n{name}({told}) -> {inspect.signature(function).return_annotation}\n```\n"
        yield f"{inspect.getdoc(function)}\n"


def _title(name: str) -> str:
    words = {"StageHooks": "Of the stage", "AroundHooks": "Around the stage", "CollectedHooks": "Asked of everybody"}
    return words.get(name, {"EventHooks": "Events", "SingleHooks": "Of one plugin at most"}.get(name, name))
