"""Values: one number at each position that predicts a target, from a head of one label on a causal trunk.

Such are transformers' sequence and token classification models with `num_labels` 1: reward models, value models. Their
own forward keeps the value of a row's last token at most; the patched one gives that of every position asked for, of a
padded batch or of a packed row, through the wrapped root. The padded way is checked against the model's own forward
before anything is computed with it, the packed way is proven against the padded one like that of log-probs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmtk.errors import ModelLoadError
from llmtk.scoring.layout import Layout
from llmtk.scoring.packed import TASK, CannotPack, _function, _select, _trunk
from llmtk.scoring.padded import padded_rows
from llmtk.scoring.value_head import find, of_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from llmtk.batch import Batch

TOLERANCE = {torch.float32: 1e-3}
ROUGH = 5e-2
"""Greatest distance of values from those of the model's own forward, relative to their norm; by the weights' dtype."""


@dataclass(frozen=True, eq=False)
class ValueTask:
    """What a patched model is asked: the values (targets,) at `predictors`, of a packed row or of padded rows.

    `predictors` (targets,) are indices into the row, or into the padded rows laid end to end.
    """

    predictors: Tensor
    layout: Layout | None = None
    mask: Tensor | None = None


def packed(root: Callable[..., Any], batch: Batch) -> Tensor:
    """Return the values of a batch, in one packed row through a root whose value model is patched and selected."""
    layout = Layout.of(batch)
    values: Tensor = root(input_ids=layout.ids, **{TASK: ValueTask(layout.predictors, layout)})
    return values


def padded(root: Callable[..., Any], batch: Batch) -> Tensor:
    """Return the values of a batch, each sequence with its whole prefix, through a root whose value model is patched.

    It is the model's own trunk on rows padded behind their end, and so right for every causal one.
    """
    ids, mask, positions = padded_rows(batch)
    values: Tensor = root(input_ids=ids, **{TASK: ValueTask(positions, mask=mask)})
    return values


def patch(model: Any) -> None:
    """Teach a model with a head of one label to give values. CannotPack where its forward is not one to patch."""
    plain = _function(model)

    @wraps(plain)
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        task = kwargs.get(TASK)
        if not isinstance(task, ValueTask):
            return plain(self, *args, **kwargs)
        if task.layout is not None:
            hidden, _ = _trunk(self, task.layout, routed=False)
        else:
            ids = kwargs.get("input_ids", args[0] if args else None)
            hidden = self.base_model(input_ids=ids, attention_mask=task.mask, use_cache=False).last_hidden_state
        return of_states(self, hidden.flatten(0, 1).index_select(0, task.predictors))

    model.forward = MethodType(forward, model)


def select(root: nn.Module) -> None:
    """Select packed attention in the value model of a root."""
    _select(_found(root))


def check(model: Any) -> None:
    """Check that a classifier's own forward gives the value of a row's last token. ModelLoadError where it does not."""
    text = model.config.get_text_config()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    limit = min(text.vocab_size, 32_000)
    rows = [torch.randint(min(3, limit - 1), limit, (length,), generator=generator) for length in (12, 7, 3)]
    for row in rows:
        # A row that ends with padding is read elsewhere, and rightly.
        row[row == text.pad_token_id] = 0 if text.pad_token_id else limit - 1
    dtype = next(model.parameters()).dtype
    # A head in float32 on a trunk in bfloat16 runs under autocast alone.
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        own = torch.stack([model(input_ids=row[None].to(device)).logits.flatten()[-1] for row in rows]).float()
        task = [{TASK: ValueTask(torch.tensor([len(row) - 1], device=device))} for row in rows]
        found = torch.cat([model(input_ids=r[None].to(device), **t) for r, t in zip(rows, task, strict=True)])
    if not (found - own).norm() <= TOLERANCE.get(dtype, ROUGH) * own.norm():
        raise ModelLoadError(
            f"{type(model).__name__} does not read its label off a row's last token ({found.tolist()} there, "
            f"{own.tolist()} by its own forward), so that it gives no values. Take a causal model"
        )


def _found(root: nn.Module) -> Any:
    model = find(root)
    if model is None:
        raise CannotPack("it holds no model with a head of one value")
    return model
