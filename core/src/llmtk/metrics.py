"""Metrics of text: what predictions are worth beside references. Distributions bring them, under `llmtk.metrics`.

A metric is a function: `metric(predictions, references, **options)`. Both are lists of text of equal length; it returns
a number, or several by name. One whose signature has an option without a default is computed only where it is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import Field, ValidationError, create_model

from llmtk.config.problems import explain
from llmtk.config.sections import Section
from llmtk.errors import ConfigurationError, LlmtkError, PluginError
from llmtk.host import discovery

if TYPE_CHECKING:
    from llmtk.host.discovery import Offer

Metric = Callable[..., float | Mapping[str, float]]
Wanted = str | Sequence[str] | Mapping[str, Mapping[str, Any]]
"""A name, several, or names with the options of each."""


def compute_metrics(
    predictions: Sequence[str], references: Sequence[str], metrics: Wanted | None = None
) -> dict[str, float]:
    """Return metrics of predictions beside their references, by name.

        llmtk.compute_metrics(["the cat sat"], ["the cat sat down"], ["bleu", "rouge"])
        llmtk.compute_metrics(predictions, references, {"bleu": {"tokenize": "zh"}})

    `metrics` are names of installed ones, perhaps with options; by default all that need none. A metric that gives a
    number has its own name here, and one that gives several has theirs.

    Raises:
        ConfigurationError: There are no predictions, not as many references, something that is no text, or an option
            that a metric has not, or of another type.
        PluginError: A metric is not installed, broken, or gives something else than numbers.
    """
    _check(predictions, references)
    values: dict[str, float] = {}
    for name, (metric, options) in resolve(metrics).items():
        found = _values(name, metric, predictions, references, options)
        if twice := values.keys() & found.keys():
            raise PluginError(f"two metrics give {', '.join(sorted(twice))}, one of them {name}; name those you want")
        values |= found
    return values


def resolve(metrics: Wanted | None = None) -> dict[str, tuple[Metric, Mapping[str, Any]]]:
    """Return the metrics that are wanted, and their options, by name. Raises as `compute_metrics` does."""
    if metrics is None:
        usable = [offer for offer in discovery.offers(discovery.METRICS) if not offer.problem]
        loaded = {offer.name: _load(offer) for offer in usable}
        return {name: (metric, {}) for name, metric in loaded.items() if not _required(metric)}
    names = [metrics] if isinstance(metrics, str) else metrics
    named = names if isinstance(names, Mapping) else {name: {} for name in names}
    found = {name: (_load(discovery.find(discovery.METRICS, name)), options) for name, options in named.items()}
    return {name: (metric, _checked(name, metric, options)) for name, (metric, options) in found.items()}


def _check(predictions: Sequence[str], references: Sequence[str]) -> None:
    if isinstance(predictions, str) or isinstance(references, str):
        raise ConfigurationError("predictions and references are lists of text; put a single one into a list")
    if not predictions or len(predictions) != len(references):
        raise ConfigurationError(
            f"there are {len(predictions)} predictions and {len(references)} references: one is needed for each, and "
            "one at least"
        )
    for what, texts in (("prediction", predictions), ("reference", references)):
        for number, text in enumerate(texts, start=1):
            if not isinstance(text, str):
                raise ConfigurationError(f"{what} {number} is a {type(text).__name__}; text is expected")


def _load(offer: Offer) -> Metric:
    metric: Any = discovery.load(offer)
    if not callable(metric):
        raise PluginError(f"The {offer} is a {type(metric).__name__}, which is not called as a function is")
    return metric  # type: ignore[no-any-return]


def _options(metric: Metric) -> list[inspect.Parameter]:
    """Return a metric's parameters behind predictions and references."""
    return list(inspect.signature(metric).parameters.values())[2:]


def _required(metric: Metric) -> list[str]:
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [each.name for each in _options(metric) if each.default is each.empty and each.kind not in kinds]


def _known(metric: Metric) -> str:
    return ", ".join(each.name for each in _options(metric)) or "none"


def _checked(name: str, metric: Metric, options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a metric's options as their types want them. ConfigurationError for what it does not take."""
    if missing := [each for each in _required(metric) if each not in options]:
        raise ConfigurationError(f"the metric {name} needs the option {' and '.join(missing)}")
    try:
        inspect.signature(metric).bind([], [], **options)
    except TypeError as error:
        raise ConfigurationError(f"the metric {name}: {error}; its options are: {_known(metric)}") from error
    return {**options, **_typed(name, metric, options)}


def _typed(name: str, metric: Metric, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options whose types the metric states, converted: 6 of `6`. Others are left to the metric."""
    try:
        hints = {key: hint for key, hint in get_type_hints(metric).items() if key in options}
        fields: dict[str, Any] = {
            f"option_{n}": (hint, Field(alias=key)) for n, (key, hint) in enumerate(hints.items())
        }
        model = create_model("Metrics", metric=(create_model("Metric", __base__=Section, **fields), Field(alias=name)))
    except Exception:  # types that only its author's checker knows can fail in any way
        return {}
    settings = {name: {key: options[key] for key in hints}}
    try:
        valid: Any = model.model_validate(settings)
    except ValidationError as error:
        raise explain(error, settings, model, f"The options of the metric {name} are: {_known(metric)}") from None
    return {key: getattr(valid.metric, f"option_{n}") for n, key in enumerate(hints)}


def _values(
    name: str, metric: Metric, predictions: Sequence[str], references: Sequence[str], options: Mapping[str, Any]
) -> dict[str, float]:
    try:
        found = metric(list(predictions), list(references), **options)
        named = found if isinstance(found, Mapping) else {name: found}
        return {str(key): float(value) for key, value in named.items()}
    except LlmtkError:
        raise
    except Exception as error:  # a metric is a program of its authors: it can fail in any way
        raise PluginError(f"the metric {name} failed: {type(error).__name__}: {error}") from error
