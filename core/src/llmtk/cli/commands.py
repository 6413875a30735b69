"""The commands there are: llmtk's own and those of installed distributions, listed without importing any."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import click

from llmtk.errors import PluginError
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.host.discovery import Offer

BUILT_IN = {
    "chat": "Talk with a run's model, or any.",
    "check": "Check that a stage keeps the contract.",
    "convert-weights": "Turn pickled weights into safetensors.",
    "data": "Show, check or count a run's data, without a model.",
    "doctor": "Check the installation, and how a model is scored.",
    "evaluate": "Evaluate a finished run's model.",
    "export": "Write a finished run's model for others: merged, cast, sharded.",
    "launch": "Train in several processes.",
    "list-plugins": "List installed plugins, rewards, metrics, generators, evaluators and commands.",
    "list-stages": "List installed training methods.",
    "new-plugin": "Write a distribution with a plugin of your own.",
    "new-reward": "Write a distribution with a reward of your own.",
    "new-stage": "Write a distribution with a stage of your own.",
    "pipeline": "Run several stages in a row, each on what the former made.",
    "predict": "Answer the rows of a file with a run's model, or any.",
    "report": "Write a page about a run: results, curves, samples.",
    "plan": "Show what a run would do, and train nothing.",
    "run": "Train.",
    "runs": "List runs, show one, or compare several.",
    "schema": "Print the JSON Schema of a stage's configuration.",
    "serve": "Serve a run's model, or any, to clients of OpenAI's API.",
    "show": "Show what a stage does, and every option with its default.",
}


class Commands(click.Group):
    """Imports a command when it is called, and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names, without importing anything."""
        return sorted({*BUILT_IN, *(offer.name for offer in discovery.offers(discovery.COMMANDS))})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command. Raises PluginError where its name is claimed twice, or it is broken."""
        offer = next((offer for offer in discovery.offers(discovery.COMMANDS) if offer.name == cmd_name), None)
        if cmd_name not in BUILT_IN:
            return _loaded(offer) if offer else None
        if offer:
            raise PluginError(_clash(offer))
        command: click.Command = import_module(f"llmtk.cli.{cmd_name.replace('-', '_')}").command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest the near command, or `llmtk run`, for one that there is not."""
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand:
            name = args[0]
            if any(stage.name == name for stage in discovery.list_stages()):
                raise click.UsageError(f"{name!r} is a stage; train with it: llmtk run {name}", ctx) from None
            raise click.exceptions.NoSuchCommand(name, possibilities=self.list_commands(ctx), ctx=ctx) from None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands; of one that a distribution adds, its summary is that distribution's name."""
        added = discovery.offers(discovery.COMMANDS)
        rows = dict(BUILT_IN)
        for offer in added:
            clash = _clash(offer) if offer.name in BUILT_IN else offer.problem
            rows[offer.name] = f"unusable: {clash}" if clash else f"from {offer.distribution}: {offer.summary}"
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows.items()))


def _loaded(offer: Offer) -> click.Command:
    command = discovery.load(offer)
    if not isinstance(command, click.Command):
        raise PluginError(
            f"The {offer} names {offer.value!r}, which is a {type(command).__name__}, not a click command. "
            f"The mend is its author's; until then: pip uninstall {offer.distribution}."
        )
    return command


def _clash(offer: Offer) -> str:
    return (
        f"The {offer} has the name of a command of llmtk-core's own. Its author must rename it; "
        f"until then: pip uninstall {offer.distribution}."
    )


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"llmtk {discovery.core_version()}")
        ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print it.")
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error. Stands anywhere.")
def llmtk() -> None:
    """Post-training for language models, in which every training method is a plugin.

    \b
    llmtk list-stages            which methods are installed
    llmtk run STAGE              a demo, on a built-in model and data
    llmtk show STAGE             what can be set
    """
