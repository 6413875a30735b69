"""From rows to the data set that a stage trains on."""

from __future__ import annotations

from functools import partial
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtk.config.unused import is_given
from llmtk.data.encoders import ENCODERS, AnyEncoded, Context, EncodedPrompt, EncodingReport
from llmtk.data.processes import in_processes
from llmtk.data.rows import Labelled, Pair, Prompt, Text
from llmtk.errors import ConfigurationError, DatasetError, NothingLeft

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pyarrow
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llmtk.config.sections import DataConfig
    from llmtk.data.rows import Row

BATCH = 512
"""Rows that go to the tokenizer at a time."""

_UNAFFECTED = {
    "loss_on": (
        {row_type.type for row_type in (Text, Pair, Labelled, Prompt)},
        "documents are learnt whole, and preferences are about answers, which are what is learnt or judged",
    ),
    "truncation_side": (
        {Text.type, Prompt.type},
        "documents are never cut, and prompts are by max_prompt_length alone",
    ),
    "max_prompt_length": ({Text.type}, "a document has no prompt"),
}
"""Option -> the row types on which it has no effect, and why."""


def encode(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    config: DataConfig,
    *,
    vocab_size: int | None = None,
) -> tuple[Dataset, EncodingReport]:
    """Return the rows as tokens, in their order, and a report of what was cut, left out or moved.

    The data set is in memory. Its columns: ``input_ids`` (int32 list), ``length`` (int32, the tokens of the row),
    ``place`` (text) and, but for documents, ``targets`` (boolean list, as long as ``input_ids``; a sequence's first
    token is never a target). Pairs and labelled rows have, in place of the two lists, ``prompt_ids``, and ``NAME_ids``
    and ``NAME_targets`` for each answer behind it (``chosen``, ``rejected``, ``completion``), with ``margin`` or
    ``label``. Prompts have ``prompt_ids``, and as JSON ``prompt`` and ``columns``. A sequence is cut at, or left out
    over, ``config.max_length`` tokens; a prompt that leaves no room behind it is left out, documents are neither.

    ``vocab_size`` is the number of the model's embeddings, if it is known.

    Raises :class:`DatasetError` where a row cannot be rendered or holds a token beyond the vocabulary,
    :class:`NothingLeft` where no row is left, and :class:`ConfigurationError` for want of a chat template or an end
    token.
    """
    _refuse_unused(config, {row.type for row in rows})
    report = EncodingReport()
    work = partial(_encode_part, Context(tokenizer, config, report), vocab_size)
    tables = []
    for table, part in in_processes(work, _batches(rows), config.num_proc):
        report.add(part)
        if table is not None:
            tables.append(table)
    _say(report, config)
    if not tables:
        raise NothingLeft("\n".join([f"No row is left, of {len(rows)}.", *report.notices]))
    return _dataset(tables), report


def _refuse_unused(config: DataConfig, row_types: set[str]) -> None:
    """Refuse options that no row here has a use for."""
    for option, (unaffected, why) in _UNAFFECTED.items():
        if row_types and row_types <= unaffected and is_given(config, option):
            raise ConfigurationError(f"data.{option}: {why}. Leave it out")


def _batches(rows: Sequence[Row]) -> Iterator[list[Row]]:
    pending = iter(rows)
    while batch := list(islice(pending, BATCH)):
        yield batch


def _encode_part(
    context: Context, vocab_size: int | None, rows: list[Row]
) -> tuple[pyarrow.Table | None, EncodingReport]:
    """Return a batch of rows as a table (None: no row is left), and a report of this batch alone."""
    report = context.report = EncodingReport()
    encoded = list(_encode_batch(context, rows))
    _check_vocabulary(encoded, context.tokenizer, vocab_size)
    kept = [fitted for item in encoded if (fitted := _fit(item, context.config, report))]
    _count(kept, context.tokenizer, report)
    return (_table(kept) if kept else None), report


def _encode_batch(context: Context, rows: list[Row]) -> Iterator[AnyEncoded]:
    for row_type, group in groupby(rows, key=lambda row: row.type):
        yield from ENCODERS[row_type](context, list(group))


def _fit(item: AnyEncoded, config: DataConfig, report: EncodingReport) -> AnyEncoded | None:
    """Return the row within max_prompt_length and max_length, or None if nothing is left to learn."""
    if config.max_prompt_length is not None:
        item, long = item.cut_prompt(config.max_prompt_length)
        if long and config.on_too_long == "drop":
            report.long_prompts.append(item.place)
            return None
        report.cut_prompts += long
    kept, over = item.cut(config.max_length, config.truncation_side)
    if over and (config.on_too_long == "drop" or isinstance(item, EncodedPrompt)):
        report.too_long.append(item.place)
        return None
    if kept is None:
        report.without_target.append(item.place)
        return None
    report.truncated += over
    return kept


def _check_vocabulary(batch: list[AnyEncoded], tokenizer: PreTrainedTokenizerBase, vocab_size: int | None) -> None:
    size = len(tokenizer) if vocab_size is None else min(vocab_size, len(tokenizer))
    for item in batch:
        token = max((int(ids.max()) for ids in _ids(item) if len(ids)), default=0)
        if token >= size:
            owner = "the tokenizer's vocabulary" if vocab_size is None else "the model's embeddings"
            raise DatasetError(
                f"{item.place}: token {token} ({tokenizer.convert_ids_to_tokens(token)!r}) is beyond {owner}, which "
                f"ends at {size - 1}: the tokenizer belongs to another model, or the embeddings want resizing."
            )


def _count(batch: list[AnyEncoded], tokenizer: PreTrainedTokenizerBase, report: EncodingReport) -> None:
    # GPT-2's like give their end token as the unknown one, and never use it as such.
    unknown = None if tokenizer.unk_token_id == tokenizer.eos_token_id else tokenizer.unk_token_id
    for item in batch:
        report.rows += 1
        targets = [part for part in item.parts.values() if part.dtype == np.bool_]
        for ids in _ids(item):
            report.tokens += len(ids)
            report.targets += 0 if targets else len(ids)
            report.unknown += 0 if unknown is None else int((ids == unknown).sum())
        report.targets += sum(int(part.sum()) for part in targets)


def _ids(item: AnyEncoded) -> list[NDArray[Any]]:
    return [part for part in item.parts.values() if part.dtype != np.bool_]


def _say(report: EncodingReport, config: DataConfig) -> None:
    """Put the counts into words, behind what the encoders had to say."""
    report.notices += report.first.values()
    say = report.notices.append
    if report.moved > 1:
        say(f"Rows in which a token joins the prompt's end with the answer's beginning: {report.moved}.")
    if report.cut_prompts:
        say(f"Prompts cut to max_prompt_length, their last {config.max_prompt_length} tokens: {report.cut_prompts}.")
    if report.long_prompts:
        long = _places(report.long_prompts)
        say(f"Rows left out, prompt over max_prompt_length, {config.max_prompt_length} tokens: {long}.")
    if report.truncated:
        say(f"Rows cut at max_length, {config.max_length} tokens: {report.truncated}.")
    if report.too_long:
        say(f"Rows left out, over max_length, {config.max_length} tokens: {_places(report.too_long)}.")
    if report.without_target:
        say(f"Rows left out, no target within max_length, {config.max_length}: {_places(report.without_target)}.")
    if report.unknown:
        say(f"Tokens for text that the tokenizer doesn't know: {report.unknown} of {report.tokens}.")


def _places(places: list[str]) -> str:
    more = ", ..." if len(places) > 3 else ""
    return f"{len(places)} ({', '.join(places[:3])}{more})"


def _table(batch: list[AnyEncoded]) -> pyarrow.Table:
    import pyarrow as pa

    names = batch[0].parts.keys()
    assert all(item.parts.keys() == names for item in batch), "documents and rows with targets don't mix"
    columns: dict[str, Any] = {}
    for name in names:
        parts = [item.parts[name] for item in batch]
        columns[name] = _lists(parts, np.bool_ if parts[0].dtype == np.bool_ else np.int32)
    for name in {name: None for item in batch for name in item.values}:
        columns[name] = pa.array([item.values.get(name) for item in batch])
    columns["length"] = pa.array([sum(map(len, _ids(item))) for item in batch], pa.int32())
    columns["place"] = pa.array([item.place for item in batch], pa.string())
    return pa.table(columns)


def _lists(values: Sequence[NDArray[Any]], dtype: type[np.generic]) -> pyarrow.ListArray:
    import pyarrow as pa

    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])])
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(np.concatenate(values).astype(dtype, copy=False))
    )


def _dataset(tables: list[pyarrow.Table]) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    # A value that some rows have and others lack is null for these.
    return Dataset(pa.concat_tables(tables, promote_options="default"))
