"""Rows that are tokenised once: kept on disk as Arrow, under a hash of all that the tokens follow from."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.cache import cache_folder, write_once
from llmtk.data import dialogue, encoders, encoding, templates
from llmtk.data.encoders import ENCODERS, EncodingReport
from llmtk.data.encoding import encode

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from llmtk.config.sections import DataConfig
    from llmtk.data.rows import Row

LEAST_ROWS = 10_000
"""Rows from which on they are kept, unless data.cache says otherwise: fewer are tokenised in a second or two."""
_SETTINGS = ("max_length", "max_prompt_length", "on_too_long", "truncation_side", "loss_on")
"""The settings that decide what becomes of a row."""
_REPORT = b"llmtk.report"


def encode_once(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, say: Callable[[str], None]
) -> tuple[Dataset, EncodingReport]:
    """Return what :func:`~llmtk.data.encoding.encode` returns, from disk where that has been done before.

    A file that is damaged or cannot be written is told with ``say``, and the rows are encoded as ever.
    """
    if not (len(rows) >= LEAST_ROWS if config.cache is None else config.cache):
        return encode(rows, tokenizer, config)
    file = cache_folder("tokens") / f"{_key(rows, tokenizer, config)}.arrow"
    if found := _read(file, say):
        return found
    data, report = encode(rows, tokenizer, config)
    try:
        write_once(file, lambda aside: _write(aside, data, report), is_good=lambda: _read(file, say) is not None)
    except OSError as error:
        say(f"The tokens are not kept: {file} cannot be written: {error.strerror or error}")
    return data, report


def _key(rows: Sequence[Row], tokenizer: Any, config: DataConfig) -> str:
    """Hash the rows with their places, the tokenizer and its template, the settings, and the code that reads them."""
    digest = hashlib.blake2b(digest_size=20)
    settings = {name: getattr(config, name) for name in _SETTINGS}
    own = {name: str(getattr(tokenizer, name, None)) for name in ("special_tokens_map", "padding_side", "is_fast")}
    template = (
        str(tokenizer.chat_template) if config.template is None else templates.chat_template(tokenizer, config.template)
    )
    for fact in (settings, own, template, _vocabulary(tokenizer), _code(frozenset(row.type for row in rows))):
        digest.update(json.dumps(fact, sort_keys=True).encode("utf-8", "surrogatepass"))
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _vocabulary(tokenizer: Any) -> str:
    """Return all that a fast tokenizer does, as JSON; of a slow one, its tokens."""
    if tokenizer.is_fast:
        return str(tokenizer.backend_tokenizer.to_str())
    return json.dumps(sorted(tokenizer.get_vocab().items()))


@cache
def _code(row_types: frozenset[str]) -> list[str]:
    """Return what reads such rows: versions of packages, and the text of the modules here that a release may change."""
    versions = [f"{name} {metadata.version(name)}" for name in ("transformers", "tokenizers", "jinja2", "pyarrow")]
    modules = [dialogue, encoders, encoding, templates, *(inspect.getmodule(ENCODERS[name]) for name in row_types)]
    return [*versions, *sorted({inspect.getsource(module) for module in modules if module is not None})]


def _write(file: Path, data: Dataset, report: EncodingReport) -> None:
    import pyarrow as pa

    table = data.data.table
    table = table.replace_schema_metadata({_REPORT: json.dumps(asdict(report)).encode()})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _read(file: Path, say: Callable[[str], None]) -> tuple[Dataset, EncodingReport] | None:
    """Return what stands in a file, mapped into memory; None where there is none, or one that cannot be read."""
    import pyarrow as pa
    from datasets import Dataset

    if not file.is_file():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        report = EncodingReport(**json.loads(table.schema.metadata[_REPORT]))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        say(f"{file} cannot be read ({error}); the rows are tokenised anew")
        return None
    return Dataset(table.replace_schema_metadata(None)), report
