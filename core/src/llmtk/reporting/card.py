"""The model card that goes along with an exported model."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.config.reading import to_yaml
from llmtk.config.run_config import spelt_out
from llmtk.config.sections import HELD_OUT, sources_of
from llmtk.data import hub
from llmtk.models.checks import is_hub_name
from llmtk.reporting.summary import model_name

if TYPE_CHECKING:
    from llmtk.run import Result, Run

PIPELINES = {"language": "text-generation", "value": "text-classification"}
"""What the hub calls the tasks of models with these heads. A reward model is a classifier of one label."""


def card(run: Run, result: Result) -> str:
    """Return the text of the run's README.md: metadata as the hub reads them, and tables.

    Where models and files lie is not told.
    """
    from llmtk.training.snapshot import environment

    sections = {
        "Model": _model(run),
        "Data": _data(run),
        "Training": _training(run, result),
        f"Options of {run.stage_name}": _options(run),
        "Results": _results(result),
        "Versions": environment()["versions"],
    }
    return (
        "\n\n".join(
            [
                f"---\n{to_yaml(_metadata(run))}---",
                f"# {run.output_dir.name}",
                f"Trained with llmtk: {run.stage.summary}",
                *(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items() if rows),
                "The whole configuration is in `config.yaml`, data hashes are in `run.json`.",
                *_citation(run),
            ]
        )
        + "\n"
    )


def _metadata(run: Run) -> dict[str, Any]:
    """Return what the hub reads. A base or data that are not on the hub would tell it nothing."""
    base = run.config.model.name_or_path
    named = [source.path for split in _splits(run).values() for source in sources_of(split)]
    data = sorted({path for path in named if hub.is_hub_name(path)})
    adapts = hasattr(run.model, "peft_config") and not run.config.train.merge_and_save
    return {
        **({"base_model": base} if base and is_hub_name(base) else {}),
        **({"datasets": data} if data else {}),
        "library_name": "peft" if adapts else "transformers",
        "pipeline_tag": PIPELINES[run.stage.head],
        "tags": ["llmtk", run.stage_name],
    }


def _splits(run: Run) -> dict[str, Any]:
    """Return what the configuration names for each split that there is."""
    data = run.config.data
    return {name: given for name in ("train", *HELD_OUT) if (given := getattr(data, name)) is not None}


def _model(run: Run) -> dict[str, str]:
    plan, peft, base = run.plan, run.config.peft, run.config.model.name_or_path
    name = model_name(run)
    if base and not is_hub_name(base):
        name = name.replace(base, Path(base).expanduser().name)
    return {
        "base model": name,
        "method": f"{run.stage_name} ({run.stage.paper})" if run.stage.paper else run.stage_name,
        "adapter": f"{peft.method}, r {peft.r}, alpha {peft.lora_alpha:g}" if peft else "none",
        "trained parameters": f"{plan.trainable_parameters:,} of {plan.total_parameters:,}",
    }


def _data(run: Run) -> dict[str, str]:
    counts = {"train": run.plan.train_rows, "eval": run.plan.eval_rows, "test": len(run.test_rows or ())}
    rows = {name: f"{counts[name]:,} rows" if counts[name] else "a stream of rows" for name in _splits(run)}
    return {name: f"{rows[name]} {_origin(run, given)}" for name, given in _splits(run).items()}


def _origin(run: Run, given: Any) -> str:
    """Return where the rows of a split are from; of files, their names."""
    if isinstance(given, float):
        return f"held out of the training data (a share of {given:g})"
    if not (sources := sources_of(given)):
        return "of the stage's demo" if run.demo else "given in Python"
    names = [path if hub.is_hub_name(path) else Path(path).name for path in (source.path for source in sources)]
    return f"of {', '.join(names)}"


def _training(run: Run, result: Result) -> dict[str, str]:
    train, plan = run.config.train, run.plan
    count = f"{plan.warmup_steps:,} step{'s' * (plan.warmup_steps > 1)}"
    warmup = f", {count} of warm-up" if plan.warmup_steps else ""
    return {
        "steps": f"{result.steps:,} of {plan.global_batch} rows",
        "tokens of a row": f"{run.max_length:,} at most",
        "learning rate": f"{train.learning_rate:g}, {train.lr_scheduler_type}{warmup}",
        "optimizer": f"{train.optim}, weight decay {train.weight_decay:g}",
        "gradients": f"clipped to a norm of {train.max_grad_norm:g}" if train.max_grad_norm else "not clipped",
        "precision": plan.precision,
        "seed": str(train.seed),
    }


def _results(result: Result) -> dict[str, str]:
    loss = "not logged" if result.final_loss is None else f"{result.final_loss:.4f}"
    return {"final loss": loss, **{name: f"{value:.4f}" for name, value in result.metrics.items()}}


def _options(run: Run) -> dict[str, str]:
    """Return the stage's own options, those left at their defaults too, but for what is not in use."""
    options = {name: value for name, value in spelt_out(run.config.options).items() if value is not None}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}


def _citation(run: Run) -> list[str]:
    text = inspect.cleandoc(run.stage.citation)
    return [f"## Citation\n\n```bibtex\n{text}\n```"] if text else []


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
