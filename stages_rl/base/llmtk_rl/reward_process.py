"""A reward function in a Python of its own, which can be ended whatever the function does.

Both sides are here. They talk in lines of JSON over pipes: first what is to be loaded, answered by what the function
accepts; then a batch at a time, answered by its rewards. Either answer may be an error in words.

The process ends with what asked for it. The parent kills it when time is up. A watchdog of its own, which needs no GIL,
does the same a little before that, and says where the function hangs; so a hang inside C outlives a killed parent by no
more than its time. And where its input ends, the process ends, in the middle of a call too.

The child runs this file as a script: what it imports at its top is the standard library alone.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import math
import os
import reprlib
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import IO, Any

LOAD_SECONDS = 120.0
"""A function's module is imported within this time, or not at all."""
GRACE = 2.0
"""Seconds in which a process may end by itself before it is killed."""
_LONGEST = 300
"""Characters of an exception's own words that are told."""
_GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")
"""What a function can ask for beside the columns of the rows."""


class RewardFailure(Exception):
    """A function gave no rewards; the text says what it did instead ("raised KeyError: 'x' (reward.py, line 3)")."""

    def __init__(self, text: str, *, timed_out: bool = False) -> None:
        super().__init__(text)
        self.timed_out = timed_out


@dataclass(frozen=True)
class Signature:
    """Which columns of the rows a reward function needs, and what it accepts."""

    needs: list[str]
    accepts: list[str] | None
    """None: all that there is."""

    def wants(self, name: str) -> bool:
        """Tell whether an argument is to be handed to the function."""
        return self.accepts is None or name in self.accepts


# The parent


class RewardProcess:
    """A function's process: started by `start` or by the first call, and again by the call after it was ended.

    `target` is either {"path", "source", "function", "options"}, a file of the user's and its text, or {"offer",
    "options"}, the fields of an installed reward's `llmtk.host.discovery.Offer`.
    """

    def __init__(self, target: Mapping[str, Any], timeout: float) -> None:
        self.timeout = timeout
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, and have it load the function. Nobody waits for it here."""
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # Sets have the same order in every process, so that a function gives the same numbers again.
            env={"PYTHONHASHSEED": "0"} | os.environ,
            start_new_session=True,  # so that what the function itself has started ends with it
        )
        with suppress(BrokenPipeError):
            hello = {"path": sys.path, "target": self._target, "timeout": LOAD_SECONDS}
            _send(_given(self._process.stdin), _encoded(hello))

    def load(self) -> Signature:
        """Wait until the function is loaded. Raises RewardFailure where it cannot be."""
        if self._process is None:
            self.start()
        try:
            return Signature(**self._exchange(b"", LOAD_SECONDS)["signature"])
        except RewardFailure:
            self._kill()
            raise

    def __call__(self, arguments: Mapping[str, Any]) -> list[float | str]:
        """Return what the function returned, as numbers; text tells what stood where no finite number stood.

        Raises RewardFailure where it raised, did not return in time, or ended its process.
        """
        if self._process is None:
            self.load()
        message = _encoded({"arguments": arguments, "timeout": self.timeout})
        values: list[float | str] = self._exchange(message, self.timeout)["values"]
        return values

    def close(self) -> None:
        """End the process; a function that is not running may clean up (atexit)."""
        if self._process is not None:
            with suppress(BrokenPipeError, subprocess.TimeoutExpired):
                _given(self._process.stdin).close()
                self._process.wait(GRACE)
            self._kill()

    def _exchange(self, message: bytes, seconds: float) -> dict[str, Any]:
        """Send a message, and return the answer. Where there is none, the process is ended."""
        process = self._process
        assert process is not None
        timer = threading.Timer(seconds + GRACE, _kill_group, [process])
        timer.daemon = True
        began = time.monotonic()
        timer.start()
        try:
            _send(_given(process.stdin), message)
            line = _given(process.stdout).readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # interrupted: its answer would be taken for the next one's
            self._kill()
            raise
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self._kill()
            if time.monotonic() - began >= seconds:
                raise RewardFailure(f"did not return within {seconds:g} s", timed_out=True)
            raise RewardFailure(f"ended its process ({_status(process.returncode)})")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RewardFailure(reply["error"]) from _Traceback(reply["traceback"])
        return reply

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            _kill_group(process)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # what was left unsent
                    _given(pipe).close()


class _Traceback(Exception):
    """The child's traceback, for who asks for one (--debug)."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _status(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def _given(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def _send(pipe: IO[bytes], message: bytes) -> None:
    pipe.write(message)
    pipe.flush()


def _encoded(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message, default=_plain).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Return what JSON has words for in place of arrays, tensors and dates."""
    for convert in ("tolist", "isoformat"):
        if hasattr(value, convert):
            return getattr(value, convert)()
    raise RewardFailure(f"cannot be given a column of type {type(value).__name__}: columns travel as JSON")


# The child


def _serve() -> None:
    requests, replies = _take_pipes()
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=[requests, lines], daemon=True).start()

    if not (line := lines.get()):
        return
    hello = json.loads(line)
    sys.path[:] = hello["path"]
    reply = _answer(hello["timeout"], _loaded, hello["target"])
    function = reply.pop("function", None)
    _send(replies, _encoded(reply))

    while line := lines.get():
        request = json.loads(line)
        _send(replies, _encoded(_answer(request["timeout"], _called, function, request["arguments"])))


def _take_pipes() -> tuple[IO[bytes], IO[bytes]]:
    """Keep the two pipes to ourselves: what the function prints goes to stderr, and its input is empty."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


def _listen(requests: IO[bytes], lines: SimpleQueue[bytes]) -> None:
    """Hand on requests. Where there are no more, the process may end by itself; a call that goes on is ended."""
    for line in requests:
        lines.put(line)
    lines.put(b"")
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def _answer(seconds: float, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return what the work gives, or why it gives nothing; end the process if it takes too long."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # from a thread of C, whoever holds the GIL
    try:
        return work(*arguments)
    except BaseException as error:  # the function may exit, too
        return {"error": _told(error), "traceback": traceback.format_exc()}
    finally:
        faulthandler.cancel_dump_traceback_later()


class _Refusal(Exception):
    """Something that the user can mend, said in words of our own."""


def _told(error: BaseException) -> str:
    words = " ".join(str(error).split())
    words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]} ..."
    if isinstance(error, _Refusal) or type(error).__module__ == "llmtk.errors":
        return str(error)
    return f"raised {type(error).__name__}{f': {words}' if words else ''}{_line(error)}"


def _line(error: BaseException) -> str:
    """Return where in the function's own file an exception came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def _loaded(target: Mapping[str, Any]) -> dict[str, Any]:
    function = _load(**target)
    return {"function": function, "signature": _signature(function)}


def _load(
    options: dict[str, Any],
    path: str = "",
    source: str = "",
    function: str = "",
    offer: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Return the function, or an instance of the class, that is to be called."""
    found = _installed(offer) if offer is not None else _from_file(path, source, function)
    if inspect.isclass(found):
        return _instance(found, options)
    if not callable(found):
        raise _Refusal(f"is no function but {reprlib.repr(found)}")
    _refuse_options(options)
    return found  # type: ignore[no-any-return]


def _installed(offer: Mapping[str, Any]) -> Any:
    from llmtk.host.discovery import Offer, load

    return load(Offer(**offer))


def _from_file(path: str, source: str, name: str) -> Any:
    """Run the text of a file as a module, which finds modules beside it as a script does; return what it calls so."""
    module = ModuleType(f"reward_file_{Path(path).stem}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    sys.path.insert(0, str(Path(path).parent))
    exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        near = get_close_matches(name, own, n=1)
        there = f"its functions are {', '.join(own)}" if own else "it has no function at all"
        raise _Refusal(f"has no function {name!r}.{f' Did you mean {near[0]!r}?' if near else ''} In {path}, {there}")
    return getattr(module, name)


def _instance(found: type, options: dict[str, Any]) -> Callable[..., Any]:
    """Make the reward from its options. LlmtkError where these do not fit."""
    model: Any = getattr(found, "Options", None)
    if model is None:
        _refuse_options(options)
        return found()  # type: ignore[no-any-return]
    from pydantic import ValidationError

    from llmtk.config.problems import explain, fields

    try:
        checked = model.model_validate(options)
    except ValidationError as error:
        raise explain(error, options, model, _options(fields(model))) from error
    return found(checked)  # type: ignore[no-any-return]


def _refuse_options(options: Mapping[str, Any]) -> None:
    if options:
        raise _Refusal(f"{', '.join(options)}: unknown key. {_options([])}")


def _options(names: Collection[str]) -> str:
    own = f"Its options are {', '.join(names)}" if names else "It has no options"
    return f"{own}; every reward has weight, timeout and on_error."


def _signature(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the fields of `Signature`. A class says in `columns` which it needs beside those that it names."""
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    columns = list(getattr(function, "columns", ()))
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters) and not columns
    required = [p.name for p in named if p.default is p.empty and p.name not in _GIVEN]
    accepts = None if anything else [*(p.name for p in named), *columns]
    return {"needs": [*required, *columns], "accepts": accepts}


def _called(function: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    result = function(**arguments)
    if inspect.iscoroutine(result):
        import asyncio

        result = asyncio.run(result)
    if isinstance(result, str | Mapping) or not isinstance(result, Iterable):
        raise _Refusal(f"returned {reprlib.repr(result)} in place of a list of numbers")
    return {"values": [_number(value) for value in result]}


def _number(value: Any) -> float | str:
    """Return a finite number as a float, and anything else in words."""
    with suppress(AttributeError, ValueError, RuntimeError):
        value = value.item()  # of numpy or torch
    with suppress(OverflowError):
        if isinstance(value, Real) and math.isfinite(value):
            return float(value)
    return reprlib.repr(value)


if __name__ == "__main__":
    _serve()
