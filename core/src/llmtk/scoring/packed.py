"""The fast way to score: a packed row through the model's trunk, then the fused head at the targets alone.

The wrapped root is the one called, so that DDP, FSDP, PEFT and autocast are felt: the innermost causal model's forward
is patched to know one more keyword, and its head to score where it is asked to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtk.scoring import attention, router, value_head
from llmtk.scoring.head import TILE_ELEMENTS, HeadScores, HeadShape, head_scores, shaped
from llmtk.scoring.layout import Layout
from llmtk.scoring.scores import ALSO, Scores, checked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from transformers import PreTrainedModel

    from llmtk.batch import Batch
    from llmtk.scoring.layout import PackedRow

TASK = "llmtk_task"
"""The private keyword that carries a task through the wrapped root to the causal model inside it."""


class CannotPack(Exception):
    """Why a model cannot be scored packed, in a few words."""


@dataclass(frozen=True, eq=False)
class Task:
    """What the patched causal model is asked of a packed row: `of(hidden, head, shape)` at its target positions.

    `hidden` (targets, width) are the states that predict the targets. With `values`, the head of one value that stands
    beside the model's own is asked too, of the same states.
    """

    layout: PackedRow
    of: Callable[[Tensor, Any, HeadShape], dict[str, Tensor]]
    values: bool = False


def score(root: Callable[..., Any], batch: Batch, also: Iterable[str] = (), temperature: float = 1.0) -> Scores:
    """Score every target token of the batch with a root whose causal model is patched."""
    wanted, targets = checked(also), batch.target_tokens

    def of(hidden: Tensor, head: Any, shape: HeadShape) -> dict[str, Tensor]:
        return _named(head_scores(hidden, head, targets, replace(shape, temperature=temperature), wanted))

    found = _ask(root, batch, of, "values" in wanted)
    return Scores(batch, **{name: found[name] for name in ("logps", *ALSO) if name in found})


def map_logits(root: Callable[..., Any], batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor]) -> Tensor:
    """Apply `fn(logits, *columns)` to tiles of targets; each tile's logits are made again in the backward pass."""

    def of(hidden: Tensor, head: Any, shape: HeadShape) -> dict[str, Tensor]:
        rows = max(1, TILE_ELEMENTS // head.weight.shape[0])

        def tile(states: Tensor, *parts: Tensor) -> Tensor:
            return fn(shaped(F.linear(states, head.weight, head.bias).float(), shape), *parts)

        tiles = zip(*(torch.split(part, rows) for part in (hidden, *columns)), strict=True)
        return {"mapped": torch.cat([checkpoint(tile, *parts, use_reentrant=False) for parts in tiles])}

    mapped: Tensor = _ask(root, batch, of)["mapped"]
    return mapped


def _ask(root: Callable[..., Any], batch: Batch, of: Any, with_values: bool = False) -> Any:
    layout = Layout.of(batch)
    # The ids go by their own name, because wrappers look at them.
    return root(input_ids=layout.ids, **{TASK: Task(layout, of, with_values)})


def patch(root: nn.Module) -> None:
    """Teach the causal model inside a root to score packed rows. CannotPack where its shape is not known."""
    causal = causal_model(root)
    head = causal.get_output_embeddings()
    if type(head) is not nn.Linear:
        kind = f"{type(head).__module__.partition('.')[0]}'s {type(head).__name__}"
        raise CannotPack(f"its head is {kind}, not a plain linear layer")
    shape = head_shape(causal.config)
    routed = router.coefficient(causal) is not None
    _select(causal)
    plain_head, plain = _function(head), _function(causal)

    # Nothing here may hold on to these modules: a copy of the model has its own.
    def forward_head(self: nn.Linear, hidden: Tensor, task: Task | None = None) -> Any:
        if task is None:
            return plain_head(self, hidden)
        return task.of(hidden, self, shape)

    @wraps(plain)  # generation looks at the signature, and gives no positions to a forward that does not name them
    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        task = kwargs.get(TASK)
        if not isinstance(task, Task):  # there is none, or it is for the head of one value
            return plain(self, *args, **kwargs)
        hidden, router_loss = _trunk(self, task.layout, routed)
        states = hidden[0].index_select(0, task.layout.predictors)
        # The head is called as a module, so that FSDP gathers its weight.
        found = self.get_output_embeddings()(states, task=task)
        if task.values:
            found["values"] = value_head.of_states(self, states)
        return found if router_loss is None else {**found, router.NAME: router_loss}

    head.__dict__["forward"] = MethodType(forward_head, head)
    causal.forward = MethodType(forward, causal)


def _function(module: nn.Module) -> Callable[..., Any]:
    """Return a module's forward as a function of the module. CannotPack where it has been replaced by no method."""
    if not isinstance(module.forward, MethodType):
        raise CannotPack(f"the forward of its {type(module).__name__} has been replaced")
    return module.forward.__func__


def causal_model(root: nn.Module) -> Any:
    """Return the innermost causal language model of a root. CannotPack where there is not exactly one."""
    from transformers import PreTrainedModel

    found = [
        module
        for module in root.modules()
        if isinstance(module, PreTrainedModel)
        and module.get_output_embeddings() is not None
        and module.base_model is not module
    ]
    if len(found) != 1:
        raise CannotPack(f"it holds {len(found)} causal language models whose body and head can be told apart")
    return found[0]


def head_shape(config: Any) -> HeadShape:
    """Read what a model does to its logits from its configuration."""
    text = config.get_text_config()
    scale = 1.0 / getattr(text, "logits_scaling", 1.0) * (getattr(text, "logit_scale", None) or 1.0)
    return HeadShape(scale, getattr(text, "final_logit_softcapping", None) or 0.0)


def _select(causal: Any) -> None:
    """Select packed attention, beside the implementation that the model has."""
    implementation = causal.config._attn_implementation
    if implementation is None or implementation.startswith(attention.PREFIX):
        return
    name = attention.register(implementation)
    for module in causal.modules():
        if hasattr(module, "config") and getattr(module.config, "_attn_implementation", None) == implementation:
            module.config._attn_implementation = name


def _trunk(causal: Any, layout: PackedRow, routed: bool) -> tuple[Tensor, Tensor | None]:
    """Run the model without its head: hidden states (1, T, width) behind the last norm, and a router loss if asked."""
    # A 4-D mask is taken as it is: no mask is built, and packed attention does not look at it.
    no_mask = torch.zeros(1, 1, 1, 1, device=layout.ids.device)
    output = causal.base_model(
        input_ids=layout.ids,
        attention_mask=no_mask,
        position_ids=layout.positions,
        use_cache=False,
        **{attention.LAYOUT: layout},
        **({"output_router_logits": True} if routed else {}),
    )
    hidden: Tensor = output.last_hidden_state
    if not routed or not output.router_logits:
        return hidden, None
    # That the choice is the k likeliest, and nothing else, is for the proof to find.
    taken = causal.config.get_text_config().num_experts_per_tok
    return hidden, router.router_loss(output.router_logits, layout.copies, taken)


def _named(scores: HeadScores) -> dict[str, Tensor]:
    """Return what there is as a mapping: wrappers look for tensors in it."""
    return {name: value for name, value in vars(scores).items() if value is not None}
