"""Pages that are made from what they are about, when the site is built: stages, configuration, commands, hooks."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmtk.cli.commands import llmtk
from llmtk.config.described import Key, described_keys
from llmtk.config.run_config import SHARED
from llmtk.contract import Stage
from llmtk.host import discovery, hookspecs

if TYPE_CHECKING:
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROWS = {
    "text": {"text": "Once upon a time"},
    "dialogue": {"messages": [{"role": "user", "content": "37+48="}, {"role": "assistant", "content": "85"}]},
    "prompt_completion": {"prompt": "37+48=", "completion": "85"},
    "pair": {"prompt": "37+48=", "chosen": "85", "rejected": "84"},
    "labelled": {"prompt": "37+48=", "completion": "85", "label": True},
    "prompt": {"prompt": "37+48=", "answer": "85"},
}
"""A row of each type."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages. mkdocs calls this when it has listed those that are written."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the signatures below what is written about hooks. mkdocs calls this for each page."""
    return f"{markdown}\n{signatures()}" if page.file.src_uri == "hooks.md" else markdown


def pages() -> dict[str, str]:
    """Return the text of each page, by its path."""
    stages = {offer.name: discovery.get_stage(offer.name) for offer in discovery.list_stages()}
    made = {f"stages/{name}.md": stage_page(name, stage) for name, stage in stages.items()}
    return made | {
        "stages/index.md": stages_page(stages),
        "configuration.md": configuration_page(next(iter(stages.items()))),
        "commands.md": commands_page(),
    }


def stages_page(stages: dict[str, type[Stage]]) -> str:
    """List the stages, and compare them."""
    lines = [
        "# Stages\n",
        *(f"- [{name}]({name}.md): {stage.summary}" for name, stage in stages.items()),
        "\nWhat each takes and needs, and what of it is in memory beside the trained model and its optimizer. A",
        "reference needs no second model where the policy is an adapter, which is switched off instead, nor with",
        "`train.precompute_reference`, which computes its log-probs once.\n",
        "| stage | rows | reference | rewards | writes | in memory beside the model |",
        "|---|---|---|---|---|---|",
    ]
    for name, stage in stages.items():
        reference = stage().reference
        cells = [
            f"[{name}]({name}.md)",
            ", ".join(stage.row_types),
            {"none": "", "frozen": "frozen", "changing": "moves"}[reference],
            "yes" if "reward" in stage.needs else "",
            "yes" if "generation" in stage.needs else "",
            "; ".join(_memory(stage)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _memory(stage: type[Stage]) -> Iterator[str]:
    """Say what a stage keeps in memory beside the model that it trains."""
    if stage().reference != "none":
        yield "the reference"
    if "reward" in stage.needs:
        yield "reward models that are named"
    if "generation" in stage.needs:
        yield "while it writes, a copy of the weights and a cache"
    if stage.head == "value":
        yield "a head of one value in place of the vocabulary's"


def stage_page(name: str, stage: type[Stage]) -> str:
    """Describe a stage by its distribution's words, its module's equation, an example and its options."""
    module = sys.modules[stage.__module__]
    assert module.__file__ is not None
    readme = Path(module.__file__).with_name("README.md").read_text()
    keys = [key for key in described_keys(name, stage) if key.key.split(".")[0] == name and not key.is_section]
    rows = "".join(f"    {json.dumps(ROWS[row_type])}\n" for row_type in stage.row_types)
    honours = f" Optional keys that it honours: {', '.join(sorted(stage.honours))}." if stage.honours else ""
    return "\n".join(
        [
            f"# {name}\n",
            _on_the_site(readme.split("\n", 1)[1].strip()),
            "\n## The method\n",
            f"Paper: {stage.paper}.\n",
            f"{inspect.getdoc(module)}\n",
            "## An example\n",
            f"```yaml\n{example(name, stage)}```\n",
            f"    llmtk run {name}.yaml\n",
            f"A row of `rows.jsonl` is one of these, or of the [other formats](../data.md) that become it:\n\n{rows}",
            "## Options\n",
            f"What is under `{name}` in the configuration.{honours}\n",
            *table(keys),
            "",
            *([f"## Citation\n\n```bibtex\n{inspect.cleandoc(stage.citation)}\n```\n"] if stage.citation else []),
        ]
    )


def example(name: str, stage: type[Stage]) -> str:
    """Return a configuration, in YAML: what one has to say, and the first of the stage's options at their defaults."""
    defaults = {field: info.default for field, info in stage.Options.model_fields.items()}
    own = [field for field in inspect.get_annotations(stage.Options) if isinstance(defaults[field], str | int | float)]
    options = {"rewards": "numeric"} if "reward" in stage.needs else {}
    options |= {field: defaults[field] for field in own[:3]}
    lines = {
        "stage": name,
        "model": {"name_or_path": "MODEL"},
        "data": {"train": "rows.jsonl", "eval": 0.1},
        "train": {"num_train_epochs": 1, **stage.defaults.get("train", {})},
        name: options,
        "output_dir": f"runs/{name}",
    }
    return "".join(f"{key}: {_flow(value)}\n" for key, value in lines.items() if value)


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)


def _on_the_site(readme: str) -> str:
    """Turn links of a distribution's README into links from its page."""
    readme = readme.replace("(../../README.md)", "(../index.md)")
    return re.sub(r"\(\.\./\.\./docs/([\w-]+\.md)", r"(../\1", readme)


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


def signatures() -> str:
    """List every hook with its signature and what it is for."""
    lines = []
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
