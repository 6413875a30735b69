"""A pytest plugin, there where llmtk-core is installed: the fixture `check_stage`.

It imports nothing of llmtk until a test asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    from llmtk.testing import Outcome


@pytest.fixture(scope="session")
def check_stage() -> Callable[..., list[Outcome]]:
    """Return `llmtk.testing.check_stage`."""
    from llmtk.testing import check_stage

    return check_stage
