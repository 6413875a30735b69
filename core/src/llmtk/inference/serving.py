"""An endpoint that OpenAI's clients ask: a model laid out for an installed server, and that server's process.

A model of this machine is laid out as the one model of a hub cache, by links. So the server knows it by its name, lists
it, and asks the hub for nothing.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, LlmtkError
from llmtk.models.checks import BUILTIN, adapter_folder, is_hub_name, resolve

if TYPE_CHECKING:
    from types import FrameType

    from llmtk.config.sections import ModelConfig

NEEDED = {
    "vllm": (("vllm",), "pip install vllm"),
    "transformers": (("fastapi", "openai", "uvicorn"), "pip install 'llmtk-core[serve]'"),
}
"""The servers, the preferred one first: the modules that they need, and how to get them."""
PATIENCE = 10.0
"""Seconds that a server has to end in: it finishes the answers that it is writing."""
_GUARD = 'read -r _; kill -TERM "$0"; sleep "$1"; kill -KILL -- "-$0"'
"""Waits for the end of a pipe, and then ends a server."""


@dataclass(frozen=True)
class Served:
    """A model as a server is to take it."""

    name: str
    """Its name in the API, and on the hub or in the cache."""
    folder: Path | None
    """Where it lies; None for a hub name."""
    chats: bool
    """Whether it has a chat template."""
    trusted: bool = False
    """Whether Python code that comes with it may run."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that the server needs."""


def choose_engine(wanted: str = "auto") -> str:
    """Return the server to start: `vllm` where it is installed, else `transformers`, unless one is asked for.

    ConfigurationError names the packages that it lacks.
    """
    if wanted == "auto":
        wanted = next((name for name, (modules, _) in NEEDED.items() if not _missing(modules)), "transformers")
    modules, mend = NEEDED[wanted]
    if missing := _missing(modules):
        raise ConfigurationError(f"the server of {wanted} needs what is not installed: {', '.join(missing)}. {mend}")
    return wanted


def lay_out(model: str, cache: Path) -> Served:
    """Lay a run's model, or any, out in an empty folder; one on the hub is left to the server.

    An adapter is merged into its base, and written there; all else is links. Its generation config says that tokens are
    sampled, without which transformers' server would not hear of a client's temperature, and where answers end.

    Raises:
        ConfigurationError: The run is not finished.
        ModelLoadError: There is no such model, it is damaged, it writes no text, or an adapter's base is gone.
        LlmtkError: The folder cannot be written.
    """
    from llmtk.config.sections import ModelConfig
    from llmtk.inference.model import check

    settings = check(model) or {}
    like = ModelConfig.model_validate(settings.get("model", {}))
    if is_hub_name(model):
        return Served(model, None, chats=True)
    name = _name_of(model)
    folder = cache / f"models--{name}"
    snapshot = folder / "snapshots" / "served"
    try:
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(snapshot.name)
        chats = _write(Path(resolve(model)), snapshot, like)
    except OSError as error:
        raise LlmtkError(f"{snapshot} cannot be written: {error.strerror}. TMPDIR names another place") from error
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)}
    return Served(name, snapshot, chats, like.trust_remote_code, environment)


def command_of(engine: str, served: Served, host: str, port: int, more: Sequence[str] = ()) -> list[str]:
    """Return the words that start a server; `more` are options of its own."""
    where = ["--host", host, "--port", str(port), *(["--trust-remote-code"] if served.trusted else []), *more]
    if engine == "vllm":
        model = str(served.folder or served.name)
        return [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            model,
            "--served-model-name",
            served.name,
            *where,
        ]
    return [sys.executable, "-m", "transformers.cli.transformers", "serve", served.name, *where]


def as_shell(command: Sequence[str], served: Served, cwd: Path) -> str:
    """Return a command as it is typed."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in served.environment.items()]
    return " ".join(["cd", shlex.quote(str(cwd)), "&&", *variables, shlex.join(command)])


@contextmanager
def running(command: Sequence[str], served: Served, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, and end it when the block is left, as by SIGINT, SIGTERM and SIGHUP, or this process is killed.

    It starts in a folder that holds no other model of the same name, and in a session of its own: Ctrl-C reaches it
    once, through here.
    """
    with _left_by(signal.SIGTERM, signal.SIGHUP):
        environment = {**os.environ, **served.environment}
        # Its log is no output of ours: all of it goes to stderr.
        server = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, stdout=2)
        try:
            with _guarded(server):
                yield server
        finally:
            _end(server)


def wait_for(server: subprocess.Popen[bytes], host: str, port: int) -> None:
    """Wait until a server answers. LlmtkError where it ends instead."""
    while not _answers(host, port):
        if server.poll() is not None:
            raise LlmtkError(f"the server ended with status {server.returncode} before it answered; it says why above")
        time.sleep(0.1)


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if find_spec(name) is None]


def _name_of(model: str) -> str:
    """Return what a folder is called, in characters that the hub allows in names."""
    folder = model if model == BUILTIN else Path(resolve(model)).resolve().name
    return "-".join(re.findall(r"\w+(?:[.-]\w+)*", folder, re.ASCII)) or "model"


def _write(source: Path, target: Path, like: ModelConfig) -> bool:
    """Put a model into an empty folder, and return whether it has a chat template."""
    from llmtk.config.sections import ModelConfig
    from llmtk.models.saving import save_merged
    from llmtk.models.tokenizers import load_tokenizer, stop_token_ids

    if adapter_folder(str(source)):
        save_merged(source, target, like)
    else:
        for file in source.resolve().iterdir():
            if file.is_file():
                (target / file.name).symlink_to(file)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(target), trust_remote_code=like.trust_remote_code))
    _let_clients_sample(target / "generation_config.json", stop_token_ids(tokenizer))
    return bool(tokenizer.chat_template)


def _let_clients_sample(file: Path, stop_tokens: list[int]) -> None:
    """Have tokens sampled as OpenAI's clients expect, unless the model's makers say how themselves."""
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not settings.get("do_sample"):
        settings |= {"do_sample": True, "top_k": 0}
    ends = settings.get("eos_token_id") or []
    settings["eos_token_id"] = (
        list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), *stop_tokens])) or None
    )
    file.unlink(missing_ok=True)  # a link: the model's own stays as it is
    file.write_text(json.dumps(settings, indent=2), encoding="utf-8")


def _answers(host: str, port: int) -> bool:
    connection = HTTPConnection(host, port, timeout=5)  # not urllib, which would ask a proxy
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server: its answers first, and if that takes too long or a signal comes once more, at once."""
    try:
        server.terminate()
        server.wait(PATIENCE)
    except (subprocess.TimeoutExpired, KeyboardInterrupt, SystemExit):  # in a session of its own, it would stay behind
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@contextmanager
def _guarded(server: subprocess.Popen[bytes]) -> Iterator[None]:
    """Have a shell end the server where this process is killed: that closes the pipe which the shell reads from."""
    words = ["sh", "-c", _GUARD, str(server.pid), str(int(PATIENCE))]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as guard:
        try:
            yield
        finally:
            guard.kill()


@contextmanager
def _left_by(*numbers: signal.Signals) -> Iterator[None]:
    """Leave the block on these signals, as the shell tells it: with status 128 and the signal's number."""

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, leave) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
