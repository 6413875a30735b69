"""What a stage does where it says nothing: the configuration's model, data and optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from llmtk.contract import Data, Models
from llmtk.errors import ConfigurationError
from llmtk.training import optimizers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from llmtk.contract import Dataset, RunView
    from llmtk.data import Row
    from llmtk.run import Run


def build_models(view: RunView) -> Models:
    """Load or make the configuration's model, with an adapter if it asks for one."""
    from llmtk.models.adapters import add_adapter
    from llmtk.models.loading import load_model

    run = cast("Run", view)
    config = run.config
    if run.opened is not None:
        return Models(run.opened)
    if config.peft is not None and config.model.from_config is not None:
        raise ConfigurationError("peft needs a trained model: model.from_config has random weights. Leave peft out")
    model: Any = load_model(
        config.model,
        run.tokenizer,
        trainable=True,
        compute_dtype=run.backend.compute_dtype,
        frozen_base=config.peft is not None,
        seed=config.train.seed,
    )
    if config.train.gradient_checkpointing:
        # transformers 5.23 has another name for it, and warns of the one that 5.17 knows.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Models(model if config.peft is None else add_adapter(model, config.peft, config.train.seed))


def build_data(view: RunView) -> Data:
    """Encode the configuration's rows."""
    run = cast("Run", view)
    train = run.stage.encode_rows(run, run.splits.train)
    return Data(train, None if run.splits.eval is None else run.stage.encode_rows(run, run.splits.eval))


def encode_rows(view: RunView, rows: Sequence[Row]) -> Dataset:
    """Turn rows into tokens and targets, and say what became of them."""
    from llmtk.data import encode

    run = cast("Run", view)
    encoded: Dataset
    encoded, report = encode(rows, run.tokenizer, run.config.data)
    for notice in report.notices:
        run.notify(notice)
    return encoded


def parameter_groups(view: RunView) -> list[dict[str, Any]]:
    """Return decayed matrices and undecayed vectors."""
    run = cast("Run", view)
    return optimizers.decay_groups(run.model, run.config.train.weight_decay)


def build_optimizer(view: RunView) -> torch.optim.Optimizer:
    """Build the optimizer that `train.optim` names."""
    run = cast("Run", view)
    return optimizers.build_optimizer(run.hooks.parameter_groups(), run.config.train)


def export_model(view: RunView, path: Path) -> None:
    """Write the model, or its adapter, with the tokenizer."""
    from llmtk.models.saving import save_model

    run = cast("Run", view)
    save_model(run.model, run.tokenizer, path)
