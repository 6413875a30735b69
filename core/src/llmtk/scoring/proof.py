"""Proof before use: the fast path against the model's own plain forward, on this model and on a tiny twin of it.

The model itself shows whether its weights, head and wrappers are met. The twin, of the same configuration class with
its window, chunk and original position count shrunk to 8, shows what no short probe of the model can: a window of
4,096 that is ignored makes no difference to 30 tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtk.batch import Batch, Group, Sequence
from llmtk.scoring import packed, padded, router, value_head, values
from llmtk.scoring.packed import CannotPack
from llmtk.seeding import seeded

SMALL = 8
"""What windows, chunks and original position counts are shrunk to in the twin."""
WINDOWS = (
    "sliding_window",
    "window_size",
    "attention_window_size",
    "local_attention",
    "attention_chunk_size",
    "index_topk",
    "index_block_size",
    "original_max_position_embeddings",
)
CAPS = ("final_logit_softcapping", "attn_logit_softcapping")
"""Set to 1 in the twin: a cap of 50 that is left out makes no difference to numbers as small as these."""
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 1e-1), torch.float16: (1e-2, 5e-2)}
"""Greatest distance, relative to the plain forward's norm, of log-probs and of gradients, by the weights' dtype."""


@dataclass(frozen=True)
class Ways:
    """Two ways to one number a target, and what makes a root ready for the packed one."""

    what: str
    """What the numbers are called."""
    model: Callable[[nn.Module], Any]
    """Finds in a root the model that they come of."""
    prepare: Callable[[Any], None]
    """Makes such a model ready for the padded way."""
    patch: Callable[[nn.Module], None]
    packed: Callable[[nn.Module, Batch], Tensor]
    padded: Callable[[nn.Module, Batch], Tensor]


LOGPS = Ways(
    what="log-probs",
    model=lambda root: packed.causal_model(root),
    prepare=lambda model: None,
    patch=lambda root: packed.patch(root),
    packed=lambda root, batch: packed.score(root, batch).logps,
    padded=lambda root, batch: padded.score(root, batch).logps,
)
VALUES = Ways(
    what="values",
    model=value_head.find,
    prepare=values.patch,
    patch=values.select,
    packed=values.packed,
    padded=values.padded,
)


def why_not_packed(root: nn.Module, measured: dict[str, float] | None = None, ways: Ways = LOGPS) -> str | None:
    """Patch the causal model in a root for packed scoring; return None, or why it stays as it was.

    `measured` takes the distances of log-probs (or of values) and gradients, by what they are of.
    """
    measured = {} if measured is None else measured
    try:
        causal = ways.model(root)
        _refuse_known(causal.config.get_text_config())
        # On the same device, where attention may be another: its window shows on the twin alone.
        twin = _twin(causal).to(next(causal.parameters()).device)
        ways.prepare(twin)
        trained = [p for p in twin.parameters() if p.requires_grad]
        _prove(twin, twin, trained, measured, ways, what="a tiny twin of it")
        _prove(root, causal, _watched(root), measured, ways, what="the model")
    except CannotPack as reason:
        return str(reason)
    except Exception as error:  # a model of a kind never seen must not end the run: it can be scored padded
        return f"packed scoring cannot be set up on it ({_short(error)})"
    return None


def _refuse_known(config: Any) -> None:
    """Refuse what no probe would show, or would show in words that explain nothing."""
    if getattr(config, "num_attention_heads", None) is None:
        raise CannotPack("it has no attention heads: its state would flow from one sequence of a row into the next")
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if varying := kinds & {"longrope", "dynamic"}:
        raise CannotPack(f"its {varying.pop()} rotary embedding depends on the longest sequence in the row")


def _twin(causal: Any) -> Any:
    """Make the twin. CannotPack where it cannot be made."""
    try:
        config = _shrunk(causal.config)
        with seeded(0):
            twin = type(causal)(config).float().eval()
            if hasattr(causal, value_head.ADDED):
                value_head.add_head(twin)
            for parameter in twin.parameters():
                # As drawn, weights are so small that attention hardly shows in the result.
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    except Exception as error:
        raise CannotPack(f"no tiny twin of it can be made to prove packing on ({_short(error)})") from error
    return twin


def _shrunk(config: Any) -> Any:
    """Return a copy of a configuration, small, with each kind of layer that it has."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or [])
    kept = sorted({kinds.index(kind) for kind in kinds})
    layer_types = [kinds[index] for index in kept] if len(kept) > 1 else kinds[:1] * 2
    if kinds and not _set(text, "layer_types", layer_types):
        layer_types = kinds[: max(kept) + 1]  # a pattern that the configuration computes
    for name, value in {
        "vocab_size": 64,
        "num_hidden_layers": max(len(layer_types), 2),
        "first_k_dense_replace": 1,
        "max_position_embeddings": 64,
        **dict.fromkeys(WINDOWS, SMALL),
        "index_topk_blocks": 1,
        **dict.fromkeys(CAPS, 1.0),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }.items():
        _set(text, name, value)
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = SMALL
    _narrow(text)
    return config


def _set(config: Any, name: str, value: Any) -> bool:
    """Set what a configuration has, unless it computes it."""
    if not getattr(config, name, None):
        return False
    try:
        setattr(config, name, value)
    except AttributeError:
        return False
    return True


def _narrow(text: Any) -> None:
    """Make layers narrow, with as many query heads to a key head as before, up to 4."""
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    group = min(heads // key_heads, 4)
    text.num_attention_heads = 2 * group
    _set(text, "num_key_value_heads", 2)
    text.hidden_size = 16 * text.num_attention_heads
    if not hasattr(text, "qk_rope_head_dim"):  # latent attention has widths of its own
        _set(text, "head_dim", 16)
    for name in [*vars(text)]:
        if name.endswith(("intermediate_size", "ffn_hidden_size", "ffn_dim")) and isinstance(getattr(text, name), int):
            _set(text, name, 64)
    _set(text, "query_pre_attn_scalar", 16)
    _set(text, "word_embed_proj_dim", text.hidden_size)


@contextlib.contextmanager
def _patched(root: nn.Module, ways: Ways) -> Iterator[Any]:
    """Patch a root, and take the patch off again unless told to keep it."""
    before = _state(root)
    kept = []
    ways.patch(root)
    try:
        yield lambda: kept.append(True)
    finally:
        if not kept:
            for module, forward, implementation in before:
                module.__dict__.pop("forward", None)
                if forward is not None:
                    module.__dict__["forward"] = forward
                if implementation is not None:
                    module.config._attn_implementation = implementation


def _state(root: nn.Module) -> list[tuple[Any, Any, str | None]]:
    return [
        (module, module.__dict__.get("forward"), getattr(getattr(module, "config", None), "_attn_implementation", None))
        for module in root.modules()
    ]


def _prove(
    root: nn.Module,
    causal: Any,
    watched: list[nn.Parameter],
    measured: dict[str, float],
    ways: Ways = LOGPS,
    *,
    what: str,
) -> None:
    """Patch a root, if both ways agree on random sequences, some behind a shared prefix. CannotPack if they do not."""
    batch = _probe(causal.config.get_text_config()).to(next(causal.parameters()).device)
    coarsest = max((parameter.dtype for parameter in root.parameters()), key=_coarseness)
    near, near_gradient = TOLERANCE.get(coarsest, TOLERANCE[torch.bfloat16])
    try:
        # Before the patch, by whose name a model might choose another way.
        with evaluating(root), _autocast(root, coarsest):
            expected = _score(ways.padded, root, batch, watched)
        with _patched(root, ways) as keep:
            with evaluating(root), _autocast(root, coarsest):
                found = _score(ways.packed, root, batch, watched)
                plain = _score(ways.padded, root, batch, [])
            distance = measured[f"{ways.what} of {what}"] = _distance(found[0], expected[0])
            if not distance <= near:
                raise CannotPack(f"packed {ways.what} of {what} are off by {distance:.1e}, more than {near:.0e}")
            if found[1].any() or expected[1].any():
                distance = measured[f"router loss of {what}"] = _distance(found[1], expected[1])
            if not distance <= near:
                raise CannotPack(f"the packed router loss of {what} is off by {distance:.1e}, more than {near:.0e}")
            # Some gradients are nothing but rounding, such as that of a key's bias, which softmax does not feel.
            floor = 1e-4 * max((float(gradient.norm()) for gradient in expected[2:]), default=0.0)
            distances = [_distance(a, b, floor) for a, b in zip(found[2:], expected[2:], strict=True)]
            distance = measured[f"gradients of {what}"] = max(distances, default=0.0)
            if not distance <= near_gradient:
                raise CannotPack(f"packed gradients of {what} are off by {distance:.1e}, more than {near_gradient:.0e}")
            if not (distance := _distance(plain[0], expected[0])) <= near:
                raise CannotPack(f"beside packed attention, the plain forward of {what} is off by {distance:.1e}")
            with _autocast(root, coarsest):
                _prove_training(root, batch, ways)
            keep()
    except CannotPack:
        raise
    except Exception as error:
        raise CannotPack(f"packed scoring fails on {what} ({_short(error)})") from error


def _coarseness(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps if dtype.is_floating_point else 0.0


def _autocast(root: nn.Module, coarsest: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which weights of several dtypes, as a reference has, compute together."""
    # Quantised weights are whole numbers, and compute in a dtype of their own.
    dtypes = {parameter.dtype for parameter in root.parameters() if parameter.is_floating_point()}
    device = next(root.parameters()).device
    return torch.autocast(device.type, coarsest) if len(dtypes) > 1 else contextlib.nullcontext()


@contextlib.contextmanager
def evaluating(root: nn.Module) -> Iterator[None]:
    """Put a root into eval mode, and each of its modules back to what it was."""
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _prove_training(root: nn.Module, batch: Batch, ways: Ways) -> None:
    """Refuse what is only done while training, such as dropout of attention weights."""
    if not any(module.training for module in root.modules()):
        return
    try:
        with torch.no_grad(), _generators_kept(batch.tokens.device):
            ways.packed(root, batch)
    except NotImplementedError as error:
        raise CannotPack(f"training it needs {error}") from error


def _generators_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Leave torch's global generators as they are: a probe in training mode draws dropout."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def _score(way: Any, root: nn.Module, batch: Batch, watched: list[nn.Parameter]) -> list[Tensor]:
    """Return log-probs, the router loss (0 where there is none), and gradients of both together."""
    router_loss = torch.zeros((), device=batch.tokens.device)

    def forward(**inputs: Any) -> Any:
        nonlocal router_loss
        output = root(**inputs)
        if (loss := router.loss_in(output)) is not None:
            router_loss = loss
        return output

    weights = torch.linspace(-1, 1, len(batch.target_tokens), device=batch.tokens.device)
    numbers = way(forward, batch)
    # A root may hold more than what is scored: a value head has no gradient here.
    total = (numbers * weights).sum() + router_loss
    gradients = torch.autograd.grad(total, watched, allow_unused=True) if watched else ()
    zeros = (torch.zeros_like(parameter) for parameter in watched)
    return [
        numbers.detach(),
        router_loss.detach(),
        *(zero if g is None else g for g, zero in zip(gradients, zeros, strict=False)),
    ]


def _watched(root: nn.Module, count: int = 8) -> list[nn.Parameter]:
    """Return a few trained parameters from the first layer to the last, small ones: big models have big gradients."""
    trained = [parameter for parameter in root.parameters() if parameter.requires_grad]
    small = [parameter for parameter in trained if parameter.numel() <= 2**22] or trained[-1:]
    step = max(1, len(small) // count)
    return small[::step]


def _probe(config: Any) -> Batch:
    generator = torch.Generator().manual_seed(0)
    limit = min(config.vocab_size, 32_000)
    longest = min(getattr(config, "max_position_embeddings", None) or 64, 40)

    def draw(length: int) -> Tensor:
        return torch.randint(min(3, limit - 1), limit, (length,), generator=generator)

    def sequence(length: int, prefix: int | None = None) -> Sequence:
        targets = torch.rand(length, generator=generator) > 0.5
        targets[0], targets[-1] = prefix is not None, True
        return Sequence(draw(length), targets, prefix)

    return Batch.collate(
        [
            Group([sequence(longest * 2 // 3)], {}),
            Group([sequence(longest // 3, 0), sequence(longest // 2, 0), sequence(1, 0)], {}, [draw(longest // 3)]),
            Group([sequence(5)], {}),
        ]
    )


def _distance(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the distance relative to what was expected, or to the floor where that is larger."""
    found, expected = found.double(), expected.double()
    distance = float((found - expected).norm() / expected.norm().clamp(min=max(floor, 1e-12)))
    return distance if distance == distance else float("inf")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
