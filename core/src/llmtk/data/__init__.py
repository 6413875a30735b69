"""Data: from files to rows, and from rows to tokens.

Reading needs no tokenizer, so that every bad row is known before a model is loaded.
"""

from llmtk.data.encoders import EncodingReport
from llmtk.data.encoding import encode
from llmtk.data.reading import Splits, read_rows, read_splits, refuse_rows
from llmtk.data.rows import Dialogue, Labelled, Pair, Prompt, PromptCompletion, Row, Text, source_of
from llmtk.data.templates import chat_template

__all__ = [
    "Dialogue",
    "EncodingReport",
    "Labelled",
    "Pair",
    "Prompt",
    "PromptCompletion",
    "Row",
    "Splits",
    "Text",
    "chat_template",
    "encode",
    "read_rows",
    "read_splits",
    "refuse_rows",
    "source_of",
]
