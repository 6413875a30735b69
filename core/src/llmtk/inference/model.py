"""A language model that is asked without a run: a finished run's folder, or any model's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtk.errors import ConfigurationError, DatasetError, ModelLoadError, suggest
from llmtk.generation import Completion, Sampling, generate, positions_of
from llmtk.generation.proof import why_not_packed
from llmtk.scoring import choose

if TYPE_CHECKING:
    from llmtk.data.rows import Message, Prompt
    from llmtk.generation.jobs import Hear


class TextModel:
    """What answers prompts: a tokenizer, and a model's way to write completions."""

    tokenizer: Any

    @property
    def positions(self) -> float:
        """Tokens that a prompt and its answer may have together; infinity where the model sets no end."""
        raise NotImplementedError

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return completions of tokenised prompts, (prompts, n)."""
        raise NotImplementedError

    def row(self, prompt: str | list[Message], place: str) -> Prompt:
        """Return a question or a dialogue as a row. A question is a turn of the user where there is a chat template.

        DatasetError, which names the place, for one that cannot be asked.
        """
        from llmtk.data.rows import Prompt, RowError

        if isinstance(prompt, str) and self.tokenizer.chat_template:
            prompt = [{"role": "user", "content": prompt}]
        row = Prompt(prompt, {}, place=place)
        try:
            row.check()
        except RowError as error:
            raise DatasetError(f"{place}: {error}") from error
        return row

    def tokens(self, rows: Sequence[Prompt], notices: list[str] | None = None) -> list[list[int]]:
        """Return the tokens of each row up to where its answer begins, as they are in training.

        `notices` takes what the user should know. DatasetError names the rows that leave no room to answer, or that the
        template refuses.
        """
        from llmtk.config.sections import DataConfig
        from llmtk.data import encode

        if not rows:
            return []
        encoded, report = encode(rows, self.tokenizer, DataConfig(max_length=2**31 - 1))
        if notices is not None:
            notices += report.notices
        prompts = [list(ids) for ids in encoded["prompt_ids"]]
        full = [(row.place, len(ids)) for row, ids in zip(rows, prompts, strict=True) if len(ids) >= self.positions]
        if full:
            named = ", ".join(f"{place}: {length:,}" for place, length in full[:3]) + (", ..." if len(full) > 3 else "")
            raise DatasetError(
                f"{len(full)} of {len(rows)} prompts leave no room to answer: prompt and answer may have "
                f"{self.positions:,} tokens together ({named}). Shorten them, or take them out"
            )
        return prompts

    def text(self, completion: Completion | list[int]) -> str:
        """Return a completion, or tokens, as text without special tokens."""
        tokens = completion if isinstance(completion, list) else completion.tokens
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


class LanguageModel(TextModel):
    """A model and its tokenizer, in eval mode on the fastest device there is, as what answers prompts.

    `name` is a run's folder, or what `llmtk.load` takes: a model's folder, an adapter's, a hub name, `builtin`.
    `template` is a chat template in place of the tokenizer's own, as `data.template` is.

    Raises:
        ConfigurationError: The run is not finished, the template is broken, or a launcher started several processes.
        ModelLoadError: There is no such model, it is damaged, it writes no text, or an adapter's base is gone.
    """

    def __init__(self, name: str | Path, *, template: str | None = None) -> None:
        from llmtk.config.sections import ModelConfig, TrainConfig
        from llmtk.data import chat_template
        from llmtk.models.saving import load_folder
        from llmtk.training.backend import choose_precision

        run = check(str(name))
        settings = run or {}
        bf16 = settings.get("train", {}).get("bf16")
        self._half = choose_precision(TrainConfig.model_validate({"bf16": bf16}))[0] == "bf16"
        like = ModelConfig.model_validate(settings.get("model", {}))
        self.name = str(name)
        self.model: Any
        self.model, self.tokenizer = load_folder(name, like, torch.bfloat16 if self._half else torch.float32)
        if run is not None and not self._half and like.quantization is None:
            self.model.float()  # as the run computed: an adapter's base may be saved in less
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.model.to(self.device)
        if template is not None:
            self.tokenizer.chat_template = chat_template(self.tokenizer, template)
        self._scorer = choose(self.model, lambda reason: [reason])

    @cached_property
    def why_plain(self) -> str | None:
        """Why completions are written the plain way; None where the packed way is proven right on this model."""
        with self._autocast():
            return self._scorer.why_padded or why_not_packed(self.model)

    @property
    def positions(self) -> float:
        """Tokens that a prompt and its answer may have together; infinity where the model sets no end."""
        return positions_of(self.model)

    def sampling(self, **settings: Any) -> Sampling:
        """Return how to sample from this model: its stop tokens, and these settings.

        ConfigurationError for settings that cannot be.
        """
        from llmtk.models.tokenizers import stop_token_ids

        try:
            return Sampling(**{"stop_tokens": tuple(stop_token_ids(self.tokenizer)), **settings})
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"sampling settings: {error}") from error

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        *,
        hear: Hear | None = None,
    ) -> list[list[Completion]]:
        """Return completions of tokenised prompts, (prompts, n), as `llmtk.generation.generate` does."""
        packed = self.why_plain is None
        with self._autocast():
            return generate(self.model, prompts, sampling, seeds, packed=packed, decode=self._decode, hear=hear)

    def answer(self, prompts: Sequence[str | list[Message]], **settings: Any) -> list[Any]:
        """Answer questions, which are put through the chat template where there is one, or dialogues.

        `settings` are those of `Sampling`. An answer is text; with `n` over 1, a list of n texts. DatasetError for a
        prompt that leaves no room to answer.
        """
        sampling = self.sampling(**settings)
        rows = [self.row(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, start=1)]
        texts = [[self.text(answer) for answer in copies] for copies in self.generate(self.tokens(rows), sampling)]
        return texts if sampling.n > 1 else [copies[0] for copies in texts]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens))

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._half)


def check(name: str) -> dict[str, Any] | None:
    """Check what can be checked without loading anything large; return a run's settings, or None for another model.

    Raises what `LanguageModel` raises.
    """
    from llmtk.config.sections import ModelConfig
    from llmtk.folder import INFO, RunFolder
    from llmtk.models.checks import check_origin, resolve
    from llmtk.models.loading import head_of

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("predictions and chats are written by one process: start it without a launcher")
    folder = Path(resolve(name))
    _check_there(folder)
    settings = RunFolder(folder).finished() if (folder / INFO).is_file() else None
    trusted = (settings or {}).get("model", {}).get("trust_remote_code", False)
    config = ModelConfig(name_or_path=name, trust_remote_code=trusted)
    check_origin(config)
    if head_of(config) == "value":
        raise ModelLoadError(
            f"{name} has a head of one value (it is a reward model, or the like), and writes no text. Give a language "
            "model"
        )
    return settings


def _check_there(folder: Path) -> None:
    """Refuse what is meant for a folder and is none, by where it would stand: the hub would be asked in vain."""
    if not folder.exists() and (folder.parent.name == "runs" or (len(folder.parts) > 1 and folder.parent.is_dir())):
        beside = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise ModelLoadError(
            f"there is no run and no model in {folder}.{suggest(folder.name, beside)} A relative path starts at "
            f"{Path.cwd()}"
        )
