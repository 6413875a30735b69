"""llmtk: post-training for language models, in which every training method is a plugin.

Names are imported when they are first used, so `import llmtk` costs little and brings in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from llmtk.errors import (
    CheckpointError,
    ConfigurationError,
    DatasetError,
    LlmtkError,
    ModelLoadError,
    NothingLeft,
    PluginError,
    TrainingError,
)

if TYPE_CHECKING:
    from llmtk.batch import Batch, Group, LossOutput, Mean, Round, Sequence, Term
    from llmtk.config.sections import Section
    from llmtk.contract import Data, Demo, Models, RunView, Stage
    from llmtk.generation import Completion, Sampling
    from llmtk.host.discovery import get_stage, list_stages
    from llmtk.host.hookspecs import hookimpl
    from llmtk.metrics import compute_metrics
    from llmtk.models import load
    from llmtk.run import Run
    from llmtk.scoring import Scores

    __version__: str

_HOMES = {
    "llmtk.batch": ("Batch", "Group", "LossOutput", "Mean", "Round", "Sequence", "Term"),
    "llmtk.config.sections": ("Section",),
    "llmtk.contract": ("Data", "Demo", "Models", "RunView", "Stage"),
    "llmtk.generation": ("Completion", "Sampling"),
    "llmtk.host.discovery": ("get_stage", "list_stages"),
    "llmtk.host.hookspecs": ("hookimpl",),
    "llmtk.metrics": ("compute_metrics",),
    "llmtk.models": ("load",),
    "llmtk.run": ("Run",),
    "llmtk.scoring": ("Scores",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Batch",
    "CheckpointError",
    "Completion",
    "ConfigurationError",
    "Data",
    "DatasetError",
    "Demo",
    "Group",
    "LlmtkError",
    "LossOutput",
    "Mean",
    "ModelLoadError",
    "Models",
    "NothingLeft",
    "PluginError",
    "Round",
    "Run",
    "RunView",
    "Sampling",
    "Scores",
    "Section",
    "Sequence",
    "Stage",
    "Term",
    "TrainingError",
    "__version__",
    "compute_metrics",
    "get_stage",
    "hookimpl",
    "list_stages",
    "load",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("llmtk-core")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
