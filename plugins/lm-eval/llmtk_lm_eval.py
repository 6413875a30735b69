"""Tasks of EleutherAI's lm-evaluation-harness, and files in its format, on a model of llmtk."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from llmtk.errors import ConfigurationError, suggest

BATCH = 8
_NAME = re.compile(r"^task:\s*[\"']?([^\s\"'#]+)", re.MULTILINE)


def evaluate(
    model: Any, tokenizer: Any, tasks: Sequence[str], *, shots: int | None = None, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Return each task's metrics, by the task's name, or a group's.

    `tasks` are names that the harness knows, or files of tasks (`sums.yaml`). `shots` are examples in front of each
    question, by default as many as the task says; `limit` is how many questions of each task are asked.

    Raises ConfigurationError for a task that is unknown, and a file that defines none.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    files = {task: Path(task) for task in tasks if task.endswith((".yaml", ".yml"))}
    names = [_task_of(files[task]) if task in files else task for task in tasks]
    manager = TaskManager(
        include_path=[str(file.absolute().parent) for file in files.values()] or None,
        include_defaults=len(files) < len(tasks),  # thousands of files, which take seconds to read
    )
    for name in names:
        if not manager.match_tasks([name]):
            raise ConfigurationError(
                f"--tasks {name}: lm-evaluation-harness has no such task.{suggest(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists them; a file of your own ends in .yaml"
            )
    # Where there is no repository around, git would say so on the terminal.
    with patch("lm_eval.evaluator.get_git_commit_hash", return_value=None):
        found: Mapping[str, Any] = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
            tasks=names,
            task_manager=manager,
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
        )
    return {task: _numbers(values) for task, values in found["results"].items()}


def _task_of(file: Path) -> str:
    try:
        name = _NAME.search(file.read_text())
    except OSError as error:
        raise ConfigurationError(f"--tasks {file}: cannot be read: {error.strerror}") from None
    if name is None:
        raise ConfigurationError(f"--tasks {file}: defines no task: there is no line `task: NAME` in it")
    return name[1]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics alone: `acc,none` is `acc`, and a filter other than none stays in the name."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, int | float)
    }
