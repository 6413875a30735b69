"""Generated samples at each evaluation, for a person to read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtk.contract import Row
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
