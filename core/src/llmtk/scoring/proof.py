"""Proof before use: the fast path against the model's own plain forward, on this model and on a tiny twin of it.

The model itself shows whether its weights, head and wrappers are met. The twin, of the same configuration class with
its window, chunk and original position count shrunk to 8, shows what no short probe of the model can: a window of
4,096 that is ignored makes no difference to 30 tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llmtk.batch import Batch, Group, Sequence
from llmtk.scoring import packed, padded
from llmtk.scoring.packed import CannotPack

SMALL = 8
"""What windows, chunks and original position counts are shrunk to in the twin."""
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (2e-2, 1e-1), torch.float16: (1e-2, 5e-2)}
"""Greatest distance, relative to the plain forward's norm, of log-probs and of gradients, by the weights' dtype."""


def why_not_packed(root: nn.Module) -> str | None:
    """Patch the causal model in a root for packed scoring; return None, or why it stays as it was."""
    try:
        causal = packed.causal_model(root)
        _refuse_known(causal.config.get_text_config())
        _prove(*_twin(causal), what="a tiny twin of it")
        with _patched(root) as keep:
            _prove(root, causal, what="the model")
            _prove_training(root, causal)
            keep()
    except CannotPack as reason:
        return str(reason)
    return None


def _refuse_known(config: Any) -> None:
    """Refuse what no probe would show: rotary embeddings that depend on the longest position in the row."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type")} | {part.get("rope_type") for part in rope.values() if isinstance(part, dict)}
    if varying := kinds & {"longrope", "dynamic"}:
        raise CannotPack(f"its {varying.pop()} rotary embedding depends on the longest sequence in the row")


def _twin(causal: Any) -> tuple[nn.Module, Any]:
    """Make the twin, patched. CannotPack where it cannot be made."""
    try:
        config = _shrunk(causal.config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = type(causal)(config).float().eval()
            for parameter in twin.parameters():
                # As drawn, weights are so small that attention hardly shows in the result.
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    except Exception as error:
        raise CannotPack(f"no tiny twin of it can be made to prove packing on ({_short(error)})") from error
    packed.patch(twin)
    return twin, twin


def _shrunk(config: Any) -> Any:
    """Return a copy of a configuration, small, with each kind of layer that it has."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    kept = sorted({kinds.index(kind) for kind in kinds}) if kinds else [0, 1]
    for name, value in {
        "vocab_size": 64,
        "num_hidden_layers": max(len(kept), 2),
        "max_position_embeddings": 64,
        "sliding_window": SMALL,
        "attention_chunk_size": SMALL,
        "original_max_position_embeddings": SMALL,
        "num_experts": 4,
        "num_local_experts": 4,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }.items():
        if getattr(text, name, None) is not None:
            setattr(text, name, value)
    if kinds:
        text.layer_types = [kinds[index] for index in kept] if len(kept) > 1 else [kinds[0]] * 2
    rope = getattr(text, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("original_max_position_embeddings"):
            part["original_max_position_embeddings"] = SMALL
    _narrow(text)
    return config


def _narrow(text: Any) -> None:
    """Make layers narrow, with as many query heads to a key head as before, up to 4."""
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    group = min(heads // key_heads, 4)
    text.num_attention_heads = 2 * group
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = 2
    text.hidden_size = 16 * text.num_attention_heads
    if getattr(text, "head_dim", None) is not None:
        text.head_dim = 16
    for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 64)
    if getattr(text, "word_embed_proj_dim", None) is not None:
        text.word_embed_proj_dim = text.hidden_size


@contextlib.contextmanager
def _patched(root: nn.Module) -> Iterator[Any]:
    """Patch a root, and take the patch off again unless told to keep it."""
    before = _state(root)
    kept = []
    packed.patch(root)
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


def _prove(root: nn.Module, causal: Any, *, what: str) -> None:
    """Compare both ways on random sequences, some behind a shared prefix. CannotPack where they disagree."""
    batch = _probe(causal.config.get_text_config()).to(next(causal.parameters()).device)
    watched = _watched(root)
    dtype = next(root.parameters()).dtype
    modes = [(module, module.training) for module in root.modules()]
    root.eval()
    try:
        expected = _score(padded.score, root, batch, watched)
        found = _score(packed.score, root, batch, watched)
    except Exception as error:
        raise CannotPack(f"packed scoring fails on {what} ({_short(error)})") from error
    finally:
        for module, training in modes:
            module.training = training
    near, near_gradient = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    distances = [_distance(a, b) for a, b in zip(found, expected, strict=True)]
    if distances[0] > near:
        raise CannotPack(f"packed log-probs of {what} are off by {distances[0]:.1e}, more than {near:.0e}")
    if len(distances) > 1 and max(distances[1:]) > near_gradient:
        raise CannotPack(
            f"packed gradients of {what} are off by {max(distances[1:]):.1e}, more than {near_gradient:.0e}"
        )


def _prove_training(root: nn.Module, causal: Any) -> None:
    """Refuse what is only done while training, such as dropout of attention weights."""
    if not any(module.training for module in root.modules()):
        return
    batch = _probe(causal.config.get_text_config()).to(next(causal.parameters()).device)
    try:
        with torch.no_grad():
            packed.score(root, batch)
    except NotImplementedError as error:
        raise CannotPack(f"training it needs {error}") from error


def _score(way: Any, root: nn.Module, batch: Batch, watched: list[nn.Parameter]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, len(batch.target_tokens), device=batch.tokens.device)
    logps = way(root, batch).logps
    gradients = torch.autograd.grad((logps * weights).sum(), watched) if watched else ()
    return [logps.detach(), *gradients]


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


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    distance = float((found - expected).norm() / expected.norm().clamp(min=1e-12))
    return distance if distance == distance else float("inf")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"
