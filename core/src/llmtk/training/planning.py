"""What a run is going to do, worked out from what it has loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llmtk.host.manager import plugin_versions
from llmtk.training import optimizers
from llmtk.training.events import Plan
from llmtk.training.micro_batches import cut_sizes
from llmtk.training.order import RowOrder

if TYPE_CHECKING:
    from llmtk.run import Run

LOOK_AHEAD = 8
"""Steps whose micro-batches are looked at."""


def make_plan(run: Run) -> Plan:
    """Return the plan of a run whose data, model, optimizer and order of rows are there."""
    from llmtk.models.loading import parameter_counts

    config = run.config.train
    per_epoch = -(-run.order.rows // run.global_rows) * run.stage.windows_per_round
    steps = config.max_steps if config.max_steps > 0 else int(-(-per_epoch * config.num_train_epochs // 1))
    trained, total = parameter_counts(run.model)
    compute_dtype = str(run.backend.compute_dtype).removeprefix("torch.")
    return Plan(
        stage=run.stage_name,
        plugins=plugin_versions(run.manager),
        max_steps=steps,
        steps_per_epoch=per_epoch,
        train_rows=len(run.train_rows),
        eval_rows=len(run.eval_rows) if run.eval_rows is not None else 0,
        global_batch=run.global_rows,
        micro_batches=first_micro_batches(run)[0],
        warmup_steps=optimizers.warmup_steps(config, steps),
        trainable_parameters=trained,
        total_parameters=total,
        precision=f"{compute_dtype} ({run.backend.why_precision})",
        device=f"{run.device.type} x {run.world_size}",
        facts=run.hooks.extra_run_info(),
    )


def first_micro_batches(run: Run) -> tuple[int, int]:
    """Return into how many micro-batches this rank cuts a step, and the tokens of the largest, over the first steps.

    By the lengths of rows alone, `max_length` where they are not known, and in the order that no plugin has changed.
    What a stage makes of a row, such as completions, is not counted.
    """
    config, lengths = run.config.train, run.train_lengths
    # Of a stream a global batch of rows is all that is known.
    usual = run.order.usual(0) if isinstance(run.order, RowOrder) else np.arange(run.global_rows)
    first = usual[: LOOK_AHEAD * run.global_rows].tolist()
    steps = [run.mine(first[start : start + run.global_rows]) for start in range(0, len(first), run.global_rows)]
    cuts = [
        cut_sizes(
            [run.max_length] * len(rows) if lengths is None else lengths[rows].tolist(),
            config.per_device_train_batch_size,
            config.micro_batch_tokens,
        )
        for rows in steps
    ]
    return max(1, *map(len, cuts)), max((sum(part) for cut in cuts for part in cut), default=0)
