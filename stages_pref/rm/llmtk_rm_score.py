"""Rewards of answers by a trained reward model: `llmtk score`, and `RewardModel` for Python.

rewards = RewardModel("runs/rm")
rewards(["37+48="], ["85"])                        # texts, lists of messages, or lists of token ids
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from llmtk import ConfigurationError, ModelLoadError

if TYPE_CHECKING:
    from llmtk import Group
    from llmtk.data import Row

ROW_TYPES = ("pair", "labelled", "prompt_completion", "dialogue")
BATCH_TOKENS = 16_384

Reward = dict[str, Any]
"""A row's `place` and its `reward`, or those of its answers, `chosen` and `rejected`; None where it was left out."""


class RewardModel:
    """A run's folder, or that of any sequence classification with one label, as a function of prompts and completions.

    Answers are judged at their last token, packed where that is proven on the model, without gradient. ModelLoadError
    for a folder that holds no reward model.
    """

    def __init__(self, folder: str | Path, *, device: str | None = None, batch_tokens: int = BATCH_TOKENS) -> None:
        import torch

        from llmtk import load, scoring
        from llmtk.config.sections import ModelConfig
        from llmtk.models.checks import check_origin
        from llmtk.models.loading import head_of

        config = ModelConfig(name_or_path=str(folder))
        check_origin(config)
        if head_of(config) != "value":
            raise ModelLoadError(
                f"{folder} is no reward model: it has a language model's head, which gives no rewards. Train one from "
                f"it: llmtk run rm model.name_or_path={folder} data.train=PAIRS.jsonl"
            )
        model, self.tokenizer = load(folder)
        self.model: Any = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).requires_grad_(False)
        self.batch_tokens = batch_tokens
        self.scorer = scoring.choose(self.model, lambda reason: [reason])
        positions = getattr(self.model.config, "max_position_embeddings", None) or 2**20
        self.max_length = min(positions, _trained_length(Path(folder)) or positions)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any]) -> list[float]:
        """Return the reward of each completion behind its prompt: both texts, lists of messages, or of token ids.

        Token ids are taken as they are, stop token included; equal prompts that stand together are computed once. Texts
        and messages are encoded as in training. ConfigurationError for one that is over the model's length.
        """
        from llmtk.data.rows import PromptCompletion

        pairs = list(zip(prompts, completions, strict=True))
        if all(isinstance(token, int) for prompt, answer in pairs for token in (*prompt, *answer)):
            over = (n for n, (prompt, answer) in enumerate(pairs) if len(prompt) + len(answer) > self.max_length)
            self._refuse(next(over, None))
            return self._of_groups(list(_grouped(pairs)))
        rows = [PromptCompletion(p, a, place=f"row {n}") for n, (p, a) in enumerate(pairs, start=1)]
        for row in rows:
            row.check()
        rewards = [found["reward"] for found in self.of_rows(rows, on_too_long="drop")]
        self._refuse(rewards.index(None) if None in rewards else None)
        return rewards

    def _refuse(self, index: int | None) -> None:
        if index is not None:
            raise ConfigurationError(f"row {index + 1} is over the model's {self.max_length} tokens")

    def of_rows(
        self,
        rows: Sequence[Row],
        max_length: int | None = None,
        notices: list[str] | None = None,
        on_too_long: Literal["truncate", "drop"] = "truncate",
    ) -> list[Reward]:
        """Return the rewards of rows of one type, in their order. `notices` takes what was cut or left out."""
        from llmtk.config.sections import DataConfig
        from llmtk.data import encode

        if not rows:
            return []
        config = DataConfig(max_length=max_length or self.max_length, on_too_long=on_too_long)
        # Found again by their number, since rows made in Python may all have the same place, or none.
        numbered = [replace(row, place=f"{number}. {row.place}") for number, row in enumerate(rows, start=1)]
        encoded, report = encode(numbered, self.tokenizer, config)
        if notices is not None:
            notices += report.notices
        groups = [_group(row) for row in encoded]
        values = iter(self._of_groups(groups))
        names = ("chosen", "rejected") if rows[0].type == "pair" else ("reward",)
        found = {group.place: {name: next(values) for name in names} for group in groups}
        return [
            {"place": row.place, **found.get(number.place, dict.fromkeys(names))}
            for row, number in zip(rows, numbered, strict=True)
        ]

    def _of_groups(self, groups: Sequence[Group]) -> list[float]:
        import torch

        from llmtk import Batch

        rewards: list[float] = []
        device = next(self.model.parameters()).device
        with torch.no_grad():
            for part in _cut(groups, self.batch_tokens):
                rewards += self.scorer.values(self.model, Batch.collate(part).to(device)).tolist()
        return rewards


def _grouped(pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Group]:
    """Put completions behind their prompt; one that several in a row share is their prefix."""
    from llmtk import Group
    from llmtk import Sequence as Tokens

    for prompt, same in groupby(pairs, key=lambda pair: list(pair[0])):
        answers = [list(answer) for _, answer in same]
        if prompt:
            yield Group([Tokens.ended(answer, 0) for answer in answers], {}, [prompt])
        else:
            yield Group([Tokens.ended(answer) for answer in answers], {})


def _group(row: Any) -> Group:
    """Return an encoded row as its answers behind their prompt."""
    from llmtk import Group
    from llmtk import Sequence as Tokens

    if "input_ids" in row:
        return Group([Tokens.ended(row["input_ids"])], {}, place=row["place"])
    answers = [row[f"{name}_ids"] for name in ("chosen", "rejected", "completion") if f"{name}_ids" in row]
    return Group([Tokens.ended(answer, 0) for answer in answers], {}, [row["prompt_ids"]], place=row["place"])


def _cut(groups: Sequence[Group], budget: int) -> Iterator[list[Group]]:
    """Cut into parts of at most `budget` tokens, padding counted; a group over it stands alone."""
    part: list[Group] = []
    longest = sequences = 0
    for group in groups:
        length = max(len(s.tokens) for s in group.sequences) + max((len(p) for p in group.prefixes), default=0)
        if part and max(longest, length) * (sequences + len(group.sequences)) > budget:
            yield part
            part, longest, sequences = [], 0, 0
        part.append(group)
        longest, sequences = max(longest, length), sequences + len(group.sequences)
    if part:
        yield part


def _trained_length(folder: Path) -> int | None:
    """Return the length that a run's rows were cut at, where the folder is a run's."""
    from llmtk.config.reading import read_file

    config = folder / "config.yaml"
    return (read_file(str(config)).get("data") or {}).get("max_length") if config.is_file() else None


@click.command("score")
@click.argument("run", metavar="RUN")
@click.option("--data", required=True, metavar="FILE", help="Rows: pairs, prompt and completion, or dialogues.")
@click.option("--output", metavar="FILE", help="Where the rewards go, one JSON line a row. By default to stdout.")
@click.option("--max-length", type=click.IntRange(2), help="Tokens of a row, at most. By default as in training.")
@click.option("--batch-tokens", type=click.IntRange(1), default=BATCH_TOKENS, help="Tokens computed at a time.")
def command(run: str, data: str, output: str | None, max_length: int | None, batch_tokens: int) -> None:
    """Write the rewards that a reward model gives to rows.

    RUN is the folder of a finished run of rm, or of any sequence classification model with one label. The answer, or
    the dialogue, is judged as a whole, at its last token. One JSON line a row: its place, and `reward`, or `chosen` and
    `rejected`; null where no room was left for the answer.
    """
    if output is not None and os.path.exists(output):
        raise ConfigurationError(f"--output {output} exists already. Give another file, or remove it")
    from llmtk.data import read_rows

    rows = read_rows(data, ROW_TYPES)
    notices: list[str] = []
    found = RewardModel(run, batch_tokens=batch_tokens).of_rows(rows, max_length, notices)
    for notice in notices:
        click.echo(notice, err=True)
    lines = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in found)
    if output is None:
        click.echo(lines, nl=False)
        return
    aside = Path(f"{output}.new")
    try:
        aside.write_text(lines, encoding="utf-8")
        aside.replace(output)
    except OSError as error:
        raise ConfigurationError(f"--output {output} cannot be written: {error.strerror}") from error
    without = sum(None in line.values() for line in found)
    room = f", {without} with null in place of a score that had no room" if without else ""
    click.echo(f"{len(found)} rows{room}: {output}", err=True)
