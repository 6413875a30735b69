"""Benchmarks on a language model. Distributions bring them, under `llmtk.evaluators`.

An evaluator is a function: `evaluate(model, tokenizer, tasks, *, shots, limit)`. The model is in eval mode; tasks are
names that the evaluator knows, or files; it returns numbers by metric, by task, and raises ConfigurationError for a
task that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtk.errors import ConfigurationError, LlmtkError, PluginError
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.host.discovery import Offer

Evaluator = Callable[..., Mapping[str, Mapping[str, float]]]


def evaluate_tasks(
    name: str | Path, tasks: Sequence[str], *, shots: int | None = None, limit: int | None = None
) -> dict[str, float]:
    """Return the metrics of benchmarks, named `TASK/METRIC`, on a finished run's model or any other.

    Raises:
        ConfigurationError: There is no such task, or the run is not finished.
        ModelLoadError: There is no such model, or it writes no text.
        PluginError: No evaluator is installed, several are, or it failed.
    """
    offer = _the_one()
    evaluator = _loaded(offer)
    from llmtk.inference.model import LanguageModel

    model = LanguageModel(name)
    try:
        found = evaluator(model.model, model.tokenizer, tasks, shots=shots, limit=limit)
    except LlmtkError:
        raise
    except Exception as error:
        raise PluginError(f"The {offer} failed on {', '.join(tasks)}: {type(error).__name__}: {error}") from error
    return {f"{task}/{metric}": value for task, values in found.items() for metric, value in values.items()}


def _the_one() -> Offer:
    offered = discovery.offers(discovery.EVALUATORS)
    if not offered:
        raise ConfigurationError("--tasks needs a harness of benchmarks: pip install llmtk-lm-eval")
    if len(offered) > 1:
        told = ", ".join(offer.distribution for offer in offered)
        raise PluginError(f"--tasks: several distributions bring a harness ({told}). Uninstall all but one")
    return offered[0]


def _loaded(offer: Offer) -> Evaluator:
    evaluator = discovery.load(offer)
    if not callable(evaluator):
        raise PluginError(f"The {offer} is a {type(evaluator).__name__}, which is not called as a function is")
    found: Evaluator = evaluator
    return found
