"""What a stage does where it says nothing: the configuration's model, data and optimizer."""

from __future__ import annotations

import contextlib
import copy
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from llmtk.config.sections import HELD_OUT
from llmtk.contract import REFERENCE, Data, Models
from llmtk.errors import ConfigurationError
from llmtk.training import optimizers
from llmtk.training.order import rows_taken

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import torch
    from torch import nn

    from llmtk.contract import Dataset, RunView
    from llmtk.data import Row, Splits
    from llmtk.run import Run

ADAPTER = "adapter"
"""The folder of an adapter within that of the model which it is merged into."""


def build_models(view: RunView) -> Models:
    """Load or make the configuration's model, with an adapter if it asks for one."""
    from llmtk.models.adapters import add_adapter
    from llmtk.models.loading import load_model

    run = cast("Run", view)
    config = run.config
    if run.opened is not None:
        return _opened(run, run.opened)
    model: Any = load_model(
        config.model,
        run.tokenizer,
        trainable=True,
        compute_dtype=run.backend.compute_dtype,
        frozen_base=config.peft is not None,
        seed=config.train.seed,
        head=run.stage.head,
    )
    if config.train.gradient_checkpointing:
        # transformers 5.23 has another name for it, and warns of the one that 5.17 knows.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.peft is not None:
        model = add_adapter(model, config.peft, config.train.seed, config.model.revision)
    if config.train.merge_and_save and getattr(model, "is_quantized", False) and not config.model.quantization:
        raise ConfigurationError(
            f"train.merge_and_save: {config.model.name_or_path} is saved quantised, and merging would round the "
            "adapter away with the weights. Leave it out, or train on the model as it was before it was quantised"
        )
    return _with_reference(run, model)


def _with_reference(run: Run, root: nn.Module) -> Models:
    """Put the reference beside the policy, in the cheapest way that is exact."""
    from llmtk.models.references import frozen_copy, is_continued, load_reference, view_of

    config, wanted = run.config, run.stage.reference
    dtype = run.backend.compute_dtype
    if wanted == "none":
        if config.model.reference:
            raise ConfigurationError(
                f"model.reference: {run.stage_name} uses no reference with these options; remove it"
            )
        return Models(root)
    if wanted == "changing" and hasattr(root, "peft_config"):
        raise ConfigurationError(
            "a reference that moves with the policy needs a model of its own, and that of an adapter is the same "
            "model with the adapter switched off. Train in full, without peft, or leave the reference where it is"
        )
    if config.model.reference:
        # One that moves takes steps that a coarse dtype would round away.
        cast = _dtype_of(root) if wanted == "changing" else dtype
        frozen = load_reference(config.model, run.tokenizer, cast, _dtype_of(root))
        if wanted == "changing" and _shapes(frozen) != _shapes(root):
            raise ConfigurationError(
                f"model.reference: {config.model.reference} is of another shape than the policy, towards which it is "
                "to move. Give a model of the same architecture and size"
            )
    elif wanted == "changing":
        frozen = copy.deepcopy(root).requires_grad_(False).eval()
    elif config.train.precompute_reference:
        return Models(root, views={REFERENCE: contextlib.nullcontext})  # it is computed before anything is trained
    elif view := view_of(root, continued=is_continued(config.model)):
        return Models(root, views={REFERENCE: view})
    else:
        frozen = frozen_copy(root, dtype)
    return Models(root, {REFERENCE: frozen}, changing=frozenset({REFERENCE} if wanted == "changing" else ()))


def _opened(run: Run, root: nn.Module) -> Models:
    """Put what was the reference beside a finished run's model."""
    from llmtk.models.checks import adapter_folder
    from llmtk.models.loading import load_model
    from llmtk.models.references import load_reference, view_of

    config, dtype = run.config.model, run.backend.compute_dtype
    if run.stage.reference == "none":
        return Models(root)
    if run.stage.reference == "changing":
        raise ConfigurationError(
            f"{run.output_dir}: the reference of this run moved with the policy and is not kept beside the exported "
            "model, so that the run cannot be evaluated again"
        )
    was_fresh = config.reference is None and adapter_folder(config.name_or_path) is None
    if was_fresh and (view := view_of(root, continued=False)):
        return Models(root, views={REFERENCE: view})
    if config.from_config and not config.reference:
        seed = run.config.train.seed
        frozen: nn.Module = load_model(config, run.tokenizer, trainable=False, compute_dtype=dtype, seed=seed)
    else:
        # The policy's own origin may have had another tokenizer than the run gave it.
        named = config.model_copy(update={"reference": config.reference or config.name_or_path})
        frozen = load_reference(named, run.tokenizer, dtype, _dtype_of(root), is_other=bool(config.reference))
    return Models(root, {REFERENCE: frozen})


def _shapes(model: nn.Module) -> dict[str, Any]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _dtype_of(root: nn.Module) -> torch.dtype:
    return next(parameter.dtype for parameter in root.parameters())


def build_data(view: RunView) -> Data:
    """Encode the configuration's rows."""
    run = cast("Run", view)
    train, mixture = _training_rows(run)
    held, tested = (
        None if rows is None else _encoded(run, f"data.{name}", rows)
        for name in HELD_OUT
        for rows in [getattr(run.splits, name)]
    )
    return Data(train, held, tested, mixture)


def _encoded(run: Run, name: str, rows: Sequence[Row]) -> Dataset:
    """Return rows as the stage encodes them; what is said of them names where they belong."""
    with run.speaking_of(name):
        return run.stage.encode_rows(run, rows)


def _training_rows(run: Run) -> tuple[Dataset, list[tuple[int, float]]]:
    """Return the training rows and, where sources have weights, how many are of each: a stage may leave some out."""
    splits = run.splits
    if run.config.data.streaming:
        from llmtk.training.stream import stream

        return stream(run), []
    if not splits.mixture:
        return _encoded(run, "data.train", splits.train), []
    parts = [_encoded(run, f"data.train, {path}", rows) for path, rows in _by_source(splits)]
    mixture = [(len(part), source.weight) for part, source in zip(parts, splits.mixture, strict=True)]
    shares = ", ".join(f"{rows_taken(*part):,} of {part[0]:,}" for part in mixture)
    run.notify(f"An epoch takes of the sources, in turn, rows: {shares}.")
    return _joined(parts), mixture


def _joined(parts: list[Dataset]) -> Dataset:
    import datasets
    from torch.utils.data import ConcatDataset

    joined: Any
    if all(isinstance(part, datasets.Dataset) for part in parts):
        joined = datasets.concatenate_datasets(parts)
    else:
        joined = ConcatDataset(cast("Any", parts))
    return cast("Dataset", joined)


def _by_source(splits: Splits) -> Iterator[tuple[str, list[Row]]]:
    """Yield the path of each source, and its training rows."""
    rows = iter(splits.train)
    for source in splits.mixture:
        yield source.path, list(islice(rows, source.rows))


def encode_rows(view: RunView, rows: Sequence[Row]) -> Dataset:
    """Turn rows into tokens and targets, and say what became of them."""
    from llmtk.data.cache import encode_once

    run = cast("Run", view)
    encoded: Dataset
    encoded, report = encode_once(rows, run.tokenizer, run.config.data, run.notify)
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
    """Write the model, or its adapter, with the tokenizer; with merge_and_save, the adapter in a folder within."""
    from llmtk.models.saving import save_merged, save_model

    run = cast("Run", view)
    if not run.config.train.merge_and_save:
        save_model(run.model, run.tokenizer, path, run.whole_weights)
        return
    adapter = path / ADAPTER
    save_model(run.model, run.tokenizer, adapter, run.whole_weights)
    save_merged(adapter, path, run.config.model)
    base = "its base as that was before it was quantised" if run.config.model.quantization else "its base"
    run.notify(f"{path} has the adapter merged into {base}; {adapter} has the adapter alone")
