"""Secrets: what the environment holds under a name such as HF_TOKEN reaches no file of a run.

A configuration may use one, `${HF_TOKEN}`, and where the run's own copy is written the value is the variable's name
again: so the copy reads back, wherever the variable is set.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

_NAME = re.compile(r"(^|[_-])(TOKEN|SECRET|PASSWORD|API_?KEY|ACCESS_KEY|CREDENTIALS?)([_-]|$)", re.IGNORECASE)
_KEY = re.compile(r"(^|[_-])(SECRET|PASSWORD|API_?KEY|ACCESS_KEY|ACCESS_TOKEN|AUTH_TOKEN|HF_TOKEN)$", re.IGNORECASE)
"""Keys of a configuration. A `pad_token` is none of them."""
SHORTEST = 8
"""Characters of a secret: shorter values are words, which stand in files for other reasons."""


def secrets() -> dict[str, str]:
    """Return the secrets of the environment, by name; the longest value first, as one may hold another."""
    found = [(name, value) for name, value in os.environ.items() if _NAME.search(name) and len(value) >= SHORTEST]
    return dict(sorted(found, key=lambda item: -len(item[1])))


def concealed(text: str) -> str:
    """Return a text with `${NAME}` in place of each secret."""
    for name, value in secrets().items():
        for written in (value, json.dumps(value)[1:-1]):
            text = text.replace(written, f"${{{name}}}")
    return text


def literal_secrets(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return a problem for each secret that a configuration holds itself, and that its copy would keep."""
    problems = []
    known = secrets().values()
    for key, value in settings.items():
        if isinstance(value, Mapping):
            problems += literal_secrets(value, f"{prefix}{key}.")
        elif isinstance(value, str) and value and _KEY.search(str(key)) and value not in known:
            variable = re.sub(r"\W", "_", str(key)).upper()
            problems.append(
                f"{prefix}{key}: a secret that stands here would be kept in the run's files. Put it into an "
                f"environment variable whose name ends in TOKEN, SECRET, PASSWORD or API_KEY, and name that: "
                f"${{{variable}}}"
            )
    return problems
