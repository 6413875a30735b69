"""A conversation with a model: its history, and answers that are told as they are written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import category

from llmtk.data import chat_template
from llmtk.data.rows import Prompt
from llmtk.errors import ConfigurationError

if TYPE_CHECKING:
    from llmtk.data.rows import Message
    from llmtk.generation import Sampling
    from llmtk.inference.model import LanguageModel

Hear = Callable[[str], None]
"""Told of each further piece of an answer's text."""


class Chat:
    """A conversation with a model. ConfigurationError where the model has no chat template.

    Its random numbers follow from `sampling.seed` and the number of the question, so that the same questions in the
    same order are answered alike.
    """

    def __init__(self, model: LanguageModel, sampling: Sampling, system: str | None = None) -> None:
        chat_template(model.tokenizer)
        self.model, self.sampling = model, replace(sampling, n=1)
        self.messages: list[Message] = []
        self._asked = 0
        self.reset(system)

    @property
    def system(self) -> str | None:
        """The system prompt."""
        first = self.messages[:1]
        return str(first[0]["content"]) if first and first[0]["role"] == "system" else None

    def reset(self, system: str | None) -> None:
        """Forget what was said, and begin with a system prompt, if one is given."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def ask(self, text: str, hear: Hear = lambda piece: None) -> str:
        """Return the answer to a question, which both become part of the history; `hear` is told as it is written.

        Ctrl-C ends the answer where it is. DatasetError where the dialogue leaves no room to answer, or the template
        refuses it; the history is then as it was.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        (prompt,) = self.model.tokens([Prompt(messages, {}, place="the dialogue")])
        telling = _Telling(self.model, hear)
        seed = (self.sampling.seed << 32) + self._asked
        with contextlib.suppress(KeyboardInterrupt):
            self.model.generate([prompt], self.sampling, [seed], hear=telling)
        answer = telling.finish()
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._asked += 1
        return answer

    def save(self, path: str, **columns: str) -> None:
        """Append the dialogue to a file, as a row that can be trained on, with these columns beside it.

        ConfigurationError where that cannot be.
        """
        if not any(message["role"] == "assistant" for message in self.messages):
            raise ConfigurationError("there is nothing to save yet")
        try:
            with Path(path).expanduser().open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"messages": self.messages, **columns}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be written: {error.strerror}") from error


class _Telling:
    """Turns tokens into text as they come, and tells what later tokens cannot change."""

    def __init__(self, model: LanguageModel, hear: Hear) -> None:
        self._model, self._hear = model, hear
        self._tokens: list[int] = []
        self._told = ""

    def __call__(self, _number: int, tokens: list[int]) -> None:
        self._tokens = tokens
        # A character may be several tokens: until the last has come, what is there is no character.
        self._tell(self._model.text(tokens).rstrip("\N{REPLACEMENT CHARACTER}"))

    def finish(self) -> str:
        """Tell the rest, and return all."""
        text = self._model.text(self._tokens)
        self._tell(text)
        return text

    def _tell(self, text: str) -> None:
        if len(text) > len(self._told) and text.startswith(self._told):
            self._hear(text[len(self._told) :])
            self._told = text


def readable(text: str) -> str:
    """Return text with what steers a terminal replaced: a model may write anything."""
    return "".join("\N{REPLACEMENT CHARACTER}" if category(c) == "Cc" and c not in "\n\t" else c for c in text)


def names_of(models: Sequence[LanguageModel]) -> list[str]:
    """Return what the models are called, numbered where they are the same."""
    names = [model.name for model in models]
    return [f"{name} ({number})" if names.count(name) > 1 else name for number, name in enumerate(names, start=1)]
