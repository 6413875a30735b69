"""Chat templates: which one is used, and how it is rendered."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.data.rows import Message, RowError, check_unicode
from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = ("<|im_start|>", "<|im_end|>")

CHATML = """\
{%- if tools %}{{ raise_exception('chatml has no form for tools: give a template file') }}{% endif -%}
{%- for message in messages -%}
{%- if message.tool_calls %}{{ raise_exception('chatml has no form for tool calls: give a template file') }}{% endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + STOP + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""

INTERNALS = re.compile(r"""^["']?__\w+__["']?$|[.\[]__\w+__""")
"""A name or a string such as ``__class__``, or a format string such as ``{0.__class__}``."""


def chat_template(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> str:
    """Return the text of the template to use: a named one (``chatml``), a file's, or the tokenizer's own.

    With a tokenizer that lacks ChatML's markers as special tokens, ``chatml`` ends each turn with the tokenizer's end
    token in place of ``<|im_end|>``: the model stops with one token that it knows, and the header is plain text.

    Raises :class:`ConfigurationError` where there is none, or where it reaches into Python's internals.
    """
    if template == "chatml":
        return _chatml(tokenizer)
    text = _own(tokenizer) if template is None else _file(template)
    _check(text, "The tokenizer's chat template" if template is None else f"The chat template {template}")
    return text


def _chatml(tokenizer: PreTrainedTokenizerBase) -> str:
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if special.issuperset(MARKERS):
        return CHATML.replace("STOP", repr(MARKERS[1]))
    if tokenizer.eos_token is None:
        raise ConfigurationError(
            "data.template: chatml needs a token that ends a turn, and the tokenizer has neither <|im_end|> nor an "
            "end token (eos_token): give it one, or train a tokenizer with model.tokenizer."
        )
    return CHATML.replace("STOP", "eos_token")


def _own(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ConfigurationError(
            "The tokenizer has no chat template, and the data holds dialogues: give data.template=chatml, or the file "
            "of a template."
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigurationError(f"The tokenizer has several chat templates and no default: {error}") from error


def _file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigurationError(f"data.template={name} is neither a file nor the name of a template (chatml).")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"data.template={name} cannot be read: {error}.") from error
    if not text.strip():
        raise ConfigurationError(f"data.template={name} is empty.")
    return text


def _check(text: str, name: str) -> None:
    """Refuse a template that names Python's internals: the sandbox would answer some of that with empty text."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        for line, token, value in Environment().lex(text):
            if token in ("name", "string") and INTERNALS.search(value):
                raise ConfigurationError(f"{name} reaches for {value} in line {line}, which no chat needs: refused.")
    except TemplateSyntaxError as error:
        raise ConfigurationError(f"{name} is broken in line {error.lineno}: {error.message}.") from error


def render(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    messages: list[Message],
    tools: list[dict[str, Any]] | None,
    *,
    prompt: bool = False,
) -> str:
    """Return the messages as text; with ``prompt``, up to where the assistant would go on.

    Raises :class:`~llmtk.data.rows.RowError` where the template refuses or fails.
    """
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # A template is a program of the model's authors: it can fail in any way.
        raise RowError(f"the chat template fails: {error or type(error).__name__}") from error
    check_unicode("the rendered dialogue", text)
    return str(text)
