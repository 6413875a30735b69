"""Work on batches in several processes, in the order of the batches."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, TypeVar

from llmtk.errors import DatasetError

Answer = TypeVar("Answer")
_work: Callable[[Any], Any]
"""What a process does with a batch. It is inherited, so that nothing but batches and answers is sent."""


def in_processes(work: Callable[[Any], Answer], batches: Iterable[Any], processes: int) -> Iterator[Answer]:
    """Yield `work(batch)` of each batch; with one process, in this one.

    Raises what `work` raises, and :class:`DatasetError` where a process dies.
    """
    if processes == 1:
        yield from map(work, batches)
        return
    with _forking():
        executor = ProcessPoolExecutor(processes, get_context("fork"), _begin, (work,))
        try:
            yield from executor.map(_do, batches)
        except BrokenProcessPool as error:
            raise DatasetError(
                "A process that encodes rows died, for want of memory perhaps. Lower data.num_proc."
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends these


def _do(batch: Any) -> Any:
    return _work(batch)


@contextmanager
def _forking() -> Iterator[None]:
    """Keep the tokenizer's threads out of processes that are forked, and their warnings off the screen."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*multi-threaded, use of fork", DeprecationWarning)
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
