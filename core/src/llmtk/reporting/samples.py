"""Generated samples for a person to read: at each evaluation, and of rounds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unicodedata import category

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmtk.contract import Row
    from llmtk.reporting.console import Console
    from llmtk.run import Run


def write_samples(run: Run) -> None:
    """Continue the first evaluation rows from where their first target stands; one line each to samples.jsonl."""
    config, rows = run.config.samples, run.eval_rows
    assert rows is not None
    prompts = [_prompt(rows[index]) for index in range(min(config.count, len(rows)))]
    settings = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": run.config.train.seed,
    }
    answers = run.generate(prompts, run.sampling(**settings))
    if not run.backend.is_main:
        return
    for prompt, (answer,) in zip(prompts, answers, strict=True):
        line = {"prompt": run.tokenizer.decode(prompt), "completion": run.tokenizer.decode(answer.tokens)}
        run.records.write("samples", {"step": run.step, **line, "stopped": answer.stopped})


def show_samples(console: Console, samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Show completions and their rewards as a table."""
    from rich.table import Table

    table = Table("prompt", "completion", "reward", title=f"completions before step {step + 1}", title_justify="left")
    for sample in samples:
        table.add_row(_short(sample["prompt"]), _short(sample["completion"]), f"{sample['reward']:.3g}")
    console.show(table)


def _short(text: str, most: int = 200) -> str:
    """Return a text's end, where it is long: a question's end says more than its beginning.

    What steers a terminal is replaced: a policy that knows nothing writes anything.
    """
    from rich.markup import escape

    shown = "".join("\ufffd" if category(c) == "Cc" and c not in "\n\t" else c for c in text[-most:])
    return escape(shown if len(text) <= most else f"... {shown}")


def _prompt(row: Row) -> list[int]:
    """Return the tokens before the first target; of a row that is all targets, the first quarter.

    Models take no empty prompt: an answer behind none gives its first token.
    """
    if "prompt_ids" in row:
        answers = (ids for name, ids in row.items() if name.endswith("_ids") and ids)
        return list(row["prompt_ids"] or next(answers)[:1])
    ids, targets = list(row["input_ids"]), row.get("targets")
    if targets is None:
        return ids[: max(1, len(ids) // 4)]
    return ids[: list(targets).index(True)]
