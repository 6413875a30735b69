"""Rewards by a trained reward model: a run of rm, or any sequence classification with one label."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmtk import ConfigurationError, DatasetError, ModelLoadError
from llmtk_rl.reward_process import RewardFailure

if TYPE_CHECKING:
    from llmtk_rl.rewards import Sample


class ModelReward:
    """A reward model, which reads prompt and completion as it was trained to: by its own template, in its own tokens.

    So its tokenizer need not be the policy's, and what its template puts behind an answer (a line break, say) is there
    too, which the policy never writes. A completion that was cut off is judged as if it had ended there. The model is
    loaded when it is first asked, in this process. ConfigurationError or ModelLoadError for a folder, or an
    installation, that cannot do it.
    """

    def __init__(self, folder: str) -> None:
        if find_spec("llmtk_rm_score") is None:
            raise ConfigurationError("reward models need llmtk-stage-rm. Install it: pip install 'llmtk-rl[model]'")
        _check(folder)
        self.folder = folder
        self._model: Any = None

    def needs(self) -> list[str]:
        """Return the columns that it needs: none."""
        return []

    def __call__(self, samples: Sequence[Sample]) -> list[float | RewardFailure]:
        """Return the reward of each sample; or why it has none, being over the length that the model can judge."""
        if self._model is None:
            self._model = import_module("llmtk_rm_score").RewardModel(self.folder)
        tokens = _encoded(samples, self._model)
        fitting = [pair for pair in tokens if pair is not None]
        rewards = iter(self._model([prompt for prompt, _ in fitting], [answer for _, answer in fitting]))
        too_long = RewardFailure(f"judges {self._model.max_length:,} tokens at most, and here are more")
        return [too_long if pair is None else next(rewards) for pair in tokens]

    def close(self) -> None:
        """Let go of the model."""
        self._model = None


def _check(folder: str) -> None:
    """Check, from its configuration alone, that a folder holds a reward model. LlmtkError where it does not."""
    from llmtk.config.sections import ModelConfig
    from llmtk.models.checks import check_origin
    from llmtk.models.loading import head_of

    config = ModelConfig(name_or_path=folder)
    try:
        check_origin(config)
    except ModelLoadError as error:  # here it has another key
        raise ModelLoadError(str(error).removeprefix("model.name_or_path: ")) from error
    if head_of(config) != "value":
        raise ModelLoadError(
            f"{folder} is no reward model: it has a language model's head, which gives no rewards. Train one from it: "
            f"llmtk run rm model.name_or_path={folder} data.train=PAIRS.jsonl"
        )


def _encoded(samples: Sequence[Sample], model: Any) -> list[tuple[list[int], list[int]] | None]:
    """Return the token ids of each prompt and of its completion, as in the model's training; None where too many."""
    from llmtk.config.sections import DataConfig
    from llmtk.data import Labelled, encode

    rows = [
        Labelled(sample.prompt, sample.answer, label=True, place=str(index)) for index, sample in enumerate(samples)
    ]
    config = DataConfig(max_length=model.max_length, on_too_long="drop")
    try:
        encoded, _ = encode(rows, model.tokenizer, config)
    except DatasetError:  # none is left
        return [None] * len(samples)
    found = {int(row["place"]): (row["prompt_ids"], row["completion_ids"]) for row in encoded}
    return [found.get(index) for index in range(len(samples))]
