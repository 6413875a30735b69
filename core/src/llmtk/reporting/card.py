"""The model card that goes along with an exported model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtk.reporting.summary import model_name

if TYPE_CHECKING:
    from llmtk.run import Result, Run


def card(run: Run, result: Result) -> str:
    """Return the text of the run's README.md."""
    train, plan = run.config.train, run.plan
    paper = f" ({run.stage.paper})" if run.stage.paper else ""
    rows = [
        ("base model", model_name(run)),
        ("method", f"{run.stage_name}{paper}"),
        ("trained parameters", f"{plan.trainable_parameters:,} of {plan.total_parameters:,}"),
        ("rows", f"{plan.train_rows:,} to train on, {plan.eval_rows:,} to evaluate"),
        ("steps", f"{result.steps:,} of {plan.global_batch} rows"),
        ("learning rate", f"{train.learning_rate:g}, {train.lr_scheduler_type}"),
        ("optimizer", train.optim),
        ("precision", plan.precision),
        ("final loss", "not logged" if result.final_loss is None else f"{result.final_loss:.4f}"),
        *((name, f"{value:.4f}") for name, value in result.metrics.items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    is_adapter = hasattr(run.model, "peft_config") and not train.merge_and_save
    library = "peft" if is_adapter else "transformers"
    return (
        f"---\nlibrary_name: {library}\ntags: [llmtk, {run.stage_name}]\n---\n\n# {run.output_dir.name}\n\n"
        f"Trained with llmtk: {run.stage.summary}\n\n| | |\n|---|---|\n{table}\n\n"
        f"The whole configuration is in `config.yaml`, versions and data hashes in `run.json`.\n"
    )
