"""The model card that goes along with an exported model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtk.models.checks import is_hub_name
from llmtk.reporting.summary import model_name

if TYPE_CHECKING:
    from llmtk.run import Result, Run


def card(run: Run, result: Result) -> str:
    """Return the text of the run's README.md."""
    from llmtk.training.snapshot import environment

    train, plan, peft = run.config.train, run.plan, run.config.peft
    paper = f" ({run.stage.paper})" if run.stage.paper else ""
    rows = [
        ("base model", model_name(run)),
        ("method", f"{run.stage_name}{paper}"),
        ("trained parameters", f"{plan.trainable_parameters:,} of {plan.total_parameters:,}"),
        ("rows", f"{plan.train_rows:,} to train on, {plan.eval_rows:,} to evaluate"),
        ("steps", f"{result.steps:,} of {plan.global_batch} rows"),
        ("tokens of a row", f"{run.max_length:,} at most"),
        ("adapter", f"{peft.method}, r {peft.r}, alpha {peft.lora_alpha:g}" if peft else "none"),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}"),
        ("optimizer", f"{train.optim}, weight decay {train.weight_decay:g}"),
        ("seed", str(train.seed)),
        ("precision", plan.precision),
        ("final loss", "not logged" if result.final_loss is None else f"{result.final_loss:.4f}"),
        *((name, f"{value:.4f}") for name, value in result.metrics.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in environment()["versions"].items())),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    is_adapter = hasattr(run.model, "peft_config") and not train.merge_and_save
    library = "peft" if is_adapter else "transformers"
    return (
        f"---\n{_base_model(run)}library_name: {library}\ntags: [llmtk, {run.stage_name}]\n---\n\n"
        f"# {run.output_dir.name}\n\n"
        f"Trained with llmtk: {run.stage.summary}\n\n| | |\n|---|---|\n{table}\n\n"
        f"The whole configuration is in `config.yaml`, versions and data hashes in `run.json`.\n"
    )


def _base_model(run: Run) -> str:
    """Return the line by which the hub knows what a model comes from; a folder's name would tell it nothing."""
    name = run.config.model.name_or_path
    return f"base_model: {name}\n" if name and is_hub_name(name) else ""


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
