"""Rows that bring completions instead of being answered, and perhaps their rewards, and log-probs of who wrote them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmtk import Completion, DatasetError, RunView
from llmtk.data import Prompt
from llmtk.generation import Segment


def is_offline(columns: Mapping[str, Any]) -> bool:
    """Whether a row brings its own completions."""
    return "completions" in columns or "completion_ids" in columns


def brings_rewards(columns: Mapping[str, Any]) -> bool:
    """Whether a row brings the rewards of its own completions."""
    return is_offline(columns) and "rewards" in columns


def brought_completions(
    run: RunView, prompt: str | list[dict[str, Any]], columns: Mapping[str, Any]
) -> list[Completion]:
    """Return the completions that a row brings: as token ids, or as texts, which get a stop token behind them.

    That is the one that ends a turn where the prompt is messages, and else the end token.
    """
    stops = run.sampling().stop_tokens
    end = stops[:1] if isinstance(prompt, str) else stops[-1:]
    ids = columns.get("completion_ids") or [
        [*run.tokenizer(text, add_special_tokens=False)["input_ids"], *end] for text in columns["completions"]
    ]
    logps = columns.get("old_logps") or [[] for _ in ids]
    return [
        Completion((Segment(list(tokens), list(known)),), "stop" if tokens[-1] in stops else "length")
        for tokens, known in zip(ids, logps, strict=True)
    ]


def check_offline(run: RunView, row: Prompt, longest: int) -> None:
    """Check what a row brings: `completions` or `completion_ids`, `rewards`, `old_logps`.

    `longest` is how many tokens a completion may have. DatasetError names the row.
    """
    brought = {name: row.columns[name] for name in ("completions", "completion_ids") if name in row.columns}
    lists = brought | {name: row.columns[name] for name in ("rewards", "old_logps") if name in row.columns}
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise DatasetError(f"{row.place}: {name} must be a list with one entry for each completion")
    if len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise DatasetError(f"{row.place}: each completion needs one of each, and there are {counts}")
    if not all(_is_number(value) for value in lists.get("rewards", [])):
        raise DatasetError(f"{row.place}: rewards must be finite numbers")
    _check_completions(run, row)
    for number, completion in enumerate(brought_completions(run, row.prompt, row.columns), start=1):
        _check_lengths(completion, f"{row.place}: completion {number}", longest)


def _check_completions(run: RunView, row: Prompt) -> None:
    known = len(run.tokenizer)
    for tokens in row.columns.get("completion_ids", []):
        if not isinstance(tokens, list) or not tokens or not all(_is_token(token, known) for token in tokens):
            raise DatasetError(
                f"{row.place}: completion_ids must be lists of token ids from 0 to {known - 1}, none of them empty"
            )
    if not all(isinstance(text, str) for text in row.columns.get("completions", [])):
        raise DatasetError(f"{row.place}: completions must be text")
    for logps in row.columns.get("old_logps", []):
        if not isinstance(logps, list) or not all(_is_number(logp) and logp <= 0 for logp in logps):
            raise DatasetError(f"{row.place}: old_logps must be lists of log-probs, which are finite and not over 0")


def _check_lengths(completion: Completion, which: str, longest: int) -> None:
    tokens, logps = len(completion.tokens), len(completion.logps)
    if tokens > longest:
        raise DatasetError(f"{which} has {tokens} tokens, and max_completion_length allows {longest}")
    if logps not in (0, tokens):
        raise DatasetError(
            f"{which} has {tokens} tokens and {logps} old_logps; one is needed for each token, the stop token that is "
            "put behind a text included. With completion_ids there is no doubt which tokens these are"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_token(value: Any, known: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < known
