"""Figures that a demo shows before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtk.demo import addition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llmtk.contract import RunView


def exact_match(run: RunView, rows: Sequence[addition.Row]) -> float:
    """Return the share of addition problems that the policy answers exactly right, decoding greedily."""
    prompts = [run.prompt_tokens(row["messages"][0]["content"]) for row in rows]
    answers = run.generate(prompts, run.sampling(temperature=0.0, max_new_tokens=48))
    texts = [run.tokenizer.decode(answer.tokens, skip_special_tokens=True) for (answer,) in answers]
    return sum(addition.is_correct(row, text) for row, text in zip(rows, texts, strict=True)) / len(rows)
