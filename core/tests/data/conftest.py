"""Tiny tokenizers, made here: one token a byte, but for the merges and special tokens that a test asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).parents[3].parent / "shared" / "data"

MakeTokenizer = Callable[..., Any]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the hub out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(
        special: Sequence[str] = (),
        merges: Sequence[tuple[str, str]] = (),
        *,
        bos: bool = False,
        trim: bool = False,
        **options: Any,
    ) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
        vocabulary = {token: index for index, token in enumerate(letters)}
        backend = Tokenizer(models.BPE(vocabulary, list(merges)))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
        if bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
            options["bos_token"] = "<s>"
        if trim:
            backend.post_processor = processors.ByteLevel(trim_offsets=True)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **options)

    return make


@pytest.fixture(scope="session")
def chatml_tokenizer(make_tokenizer: MakeTokenizer) -> Any:
    return make_tokenizer(["<|im_start|>", "<|im_end|>", "<|end|>"], eos_token="<|end|>")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], str]:
    def find(name: str) -> str:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} is not in {SHARED.name}/: real data that only the developers' machines have")
        return str(path)

    return find
