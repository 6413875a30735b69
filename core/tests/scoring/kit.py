"""What the tests of scoring share: tiny random models of many architectures, batches, and a measure of distance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llmtk import Batch, Group, Sequence

VOCABULARY = 97
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WINDOW = 8
"""Shorter than the sequences of the batches."""
MIXED = ["sliding_attention", "full_attention"]
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

PACKED: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "mistral": TINY | {"sliding_window": WINDOW},
    "qwen2": TINY,
    "qwen3": TINY | {"head_dim": 8},
    "gemma2": TINY
    | {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": WINDOW,
        "layer_types": MIXED,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": TINY | {"head_dim": 8, "sliding_window": WINDOW, "layer_types": MIXED},
    "phi3": TINY,
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, **ENDS},
    "gpt_neox": TINY,
    "olmo2": TINY,
    "olmo3": TINY | {"sliding_window": WINDOW, "layer_types": MIXED},
    "granite": TINY | {"logits_scaling": 3.0, "attention_multiplier": 0.5, "residual_multiplier": 0.7},
    "cohere": TINY | {"logit_scale": 0.3},
    "cohere2": TINY | {"sliding_window": WINDOW, "layer_types": MIXED, "logit_scale": 0.3},
    "glm4": TINY,
    "smollm3": TINY,
    "starcoder2": TINY | {"sliding_window": WINDOW},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
        **ENDS,
    },
    "mixtral": TINY | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": TINY
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8, "norm_topk_prob": True},
    "deepseek_v3": TINY
    | LATENT
    | {
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}
"""Architectures that are scored packed, by model type."""


def build(kind: str, fields: dict[str, Any] | None = None, seed: int = 0, **more: Any) -> Any:
    """Make a model in float32 and eval mode, its weights enlarged by noise, so that attention shows."""
    config = AutoConfig.for_model(kind, **((PACKED[kind] if fields is None else fields) | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        enlarge(model)
    return model


def enlarge(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def adapted(model: Any, target: Any = "all-linear", **more: Any) -> Any:
    """Put a LoRA adapter on a model, both of whose matrices have gradients."""
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        root = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=target, **more))
        for name, parameter in root.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return root.eval()


class Source:
    """Random sequences of tokens, each token a target with some probability."""

    def __init__(self, seed: int = 0, vocabulary: int = VOCABULARY) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.vocabulary = vocabulary

    def tokens(self, length: int) -> Tensor:
        return torch.randint(3, self.vocabulary, (length,), generator=self.generator)

    def sequence(self, length: int, prefix: int | None = None) -> Sequence:
        targets = torch.rand(length, generator=self.generator) > 0.4
        targets[0], targets[-1] = prefix is not None, True
        return Sequence(self.tokens(length), targets, prefix)

    def group(self, *lengths: int | tuple[int, int], prefixes: tuple[int, ...] = ()) -> Group:
        """Make a group: a length stands alone, a pair (length, prefix) behind a prefix."""
        sequences = [self.sequence(*(length if isinstance(length, tuple) else (length,))) for length in lengths]
        return Group(sequences, {"tokens": 1}, [self.tokens(length) for length in prefixes])


def alone() -> Batch:
    """Sequences without shared prefixes, some longer than the window."""
    source = Source(1)
    return Batch.collate([source.group(20), source.group(5), source.group(2, 31), source.group(9)])


def shared() -> Batch:
    """Pairs and groups behind shared prefixes, and sequences that stand alone; one-token sequences; an idle prefix."""
    source = Source(2)
    return Batch.collate(
        [
            source.group(20),
            source.group((12, 0), (17, 0), prefixes=(15,)),
            source.group(5),
            source.group((1, 0), (9, 1), 7, (3, 0), prefixes=(11, 4, 6)),
            source.group((1, 0), prefixes=(10,)),
        ]
    )


def weigh(batch: Batch) -> Tensor:
    """Return a different weight for each target."""
    return torch.linspace(-1, 1.5, len(batch.target_tokens))


def measure(way: Any, root: Any, batch: Batch) -> dict[str, Tensor]:
    """Return log-probs, and the gradient of their weighted sum for each trained parameter, by name."""
    root.zero_grad(set_to_none=True)
    logps = way.score(root, batch).logps
    (logps * weigh(batch)).sum().backward()
    found = {"logps": logps.detach()} | gradients(root)
    root.zero_grad(set_to_none=True)
    return found


def gradients(root: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in root.named_parameters()
        if p.requires_grad
    }


def distances(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return each tensor's distance, relative to its norm.

    One kind of gradient is nothing but rounding: without rotation, softmax does not feel a key's bias. It is measured
    against a hundredth of the whole gradient.
    """
    assert found.keys() == expected.keys()
    whole = float(torch.stack([g.double().norm() for n, g in expected.items() if n != "logps"]).norm())

    def size(name: str, norm: float) -> float:
        return whole / 100 if name.endswith("k_proj.bias") and norm < 1e-6 * whole else norm

    return {
        name: float((found[name].double() - value.double()).norm()) / size(name, float(value.double().norm()))
        for name, value in expected.items()
    }


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], relative: float = 1e-5) -> None:
    far = {name: distance for name, distance in distances(found, expected).items() if not distance <= relative}
    assert not far, {name: f"{distance:.1e}" for name, distance in far.items()}
