"""`llmtk serve RUN|MODEL`."""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from llmtk.errors import LlmtkError
from llmtk.ports import LOCAL, check_port

if TYPE_CHECKING:
    from llmtk.inference.serving import Served


@click.command("serve")
@click.argument("model", metavar="RUN|MODEL")
@click.option(
    "--engine",
    type=click.Choice(["auto", "transformers", "vllm"]),
    default="auto",
    show_default=True,
    help="The server. auto: vLLM's where it is installed, else transformers'.",
)
@click.option(
    "--host",
    default=LOCAL,
    show_default=True,
    help="Address to listen on. Nobody is asked for a key: mind who can reach it.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port to listen on.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="[-- SERVER OPTION...]")
def command(model: str, engine: str, host: str, port: int, options: tuple[str, ...]) -> None:
    """Serve the model in a folder, a finished run's or any that transformers loads, to clients of OpenAI's API.

    The server is transformers' own or vLLM's, started by the command that is printed; what follows -- is for it. The
    model's name in the API is that of its folder. An adapter is merged into its base, in a temporary folder. Ctrl-C
    ends it.
    """
    from llmtk.inference import serving

    engine = serving.choose_engine(engine)
    check_port(host, port, f"--host {host} --port")
    with TemporaryDirectory(prefix="llmtk-serve-", ignore_cleanup_errors=True) as folder:
        served = serving.lay_out(model, Path(folder))
        words = serving.command_of(engine, served, host, port, options)
        click.echo(serving.as_shell(words, served, Path(folder)))
        sys.stdout.flush()
        with serving.running(words, served, Path(folder)) as server:
            serving.wait_for(server, host, port)
            click.echo(_how_to_ask(served, host, port))
            sys.stdout.flush()
            status = server.wait()
    raise LlmtkError(f"the server ended by itself, with status {status}; it says why above")


def _how_to_ask(served: Served, host: str, port: int) -> str:
    """Return the address, and what is typed in Python to ask there."""
    asked = "chat.completions.create" if served.chats else "completions.create"
    what = 'messages=[{"role": "user", "content": "Hello"}]' if served.chats else 'prompt="Once"'
    url = f"http://{host}:{port}/v1"
    return (
        f"Serving {served.name} on {url}; Ctrl-C ends it. From Python, with `import openai`:\n"
        f'    client = openai.OpenAI(base_url="{url}", api_key="none")\n'
        f'    client.{asked}(model="{served.name}", {what})'
    )
