"""What the tests of all plugins share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no loss curve, which takes longer than the rest of a tiny run."""
    monkeypatch.setattr("llmtk.reporting.plot.plot_losses", lambda *_: False)
