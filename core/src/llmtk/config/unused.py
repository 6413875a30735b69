"""No silent options: what is given and would not be used is refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from llmtk.config.sections import Section
from llmtk.errors import ConfigurationError


def refuse_unused(section: str, options: Section, chosen: Collection[str], used: Mapping[str, Collection[str]]) -> None:
    """Refuse options that are given and that none of the chosen losses uses. ConfigurationError names those that do.

    `used` says by option which losses use it.
    """
    for option, losses in used.items():
        if is_given(options, option) and not set(losses) & set(chosen):
            raise ConfigurationError(
                f"{section}.{option}: {section}.loss: {', '.join(chosen)} does not use it; used by {', '.join(losses)}"
            )


def is_given(options: Section, name: str) -> bool:
    """Whether an option has another value than its default: a run's own config.yaml spells the defaults out."""
    return bool(getattr(options, name) != type(options).model_fields[name].default)
