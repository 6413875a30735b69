"""Tokenizers: a model's own, another folder's, or one trained on the run's data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtk.errors import ConfigurationError, ModelLoadError
from llmtk.models.checks import NAMED, adapter_folder, base_of, check_model, is_hub_name, resolve, where
from llmtk.models.errors import loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from llmtk.config.sections import ModelConfig, TokenizerConfig

EOS, PAD, UNKNOWN = "<|endoftext|>", "<|pad|>", "<|unk|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (EOS, PAD, TURN_START, TURN_END)

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The ChatML template. A turn ends with ``<|im_end|>``."""


def load_tokenizer(
    config: ModelConfig, training_texts: Callable[[], Iterable[str]] | None = None, *, key: str = NAMED
) -> PreTrainedTokenizerFast:
    """Return the run's tokenizer, with a padding token that is no stop token.

    Args:
        config: The run's ``model`` section.
        training_texts: Gives the texts that a tokenizer is trained on. Called only if one is to be trained.
        key: What errors call the key that names the model.

    Raises:
        ConfigurationError: The section has no tokenizer, or one to be trained without text.
        ModelLoadError: The folder or hub name has no tokenizer that loads, or fails ``check_model``.
    """
    check_model(config, key)
    wanted = config.tokenizer
    if wanted is None or isinstance(wanted, str):
        tokenizer = _pretrained(config, wanted, key)
    elif training_texts is None:
        raise ConfigurationError(f"model.tokenizer: a {wanted.kind} tokenizer is trained on text, and there is none")
    else:
        tokenizer = train_tokenizer(wanted, training_texts())
    ensure_padding(tokenizer)
    return tokenizer


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a tokenizer: the same texts, in any order for ``char`` and ``byte``, give the same one.

    It has ``<|endoftext|>`` (eos), ``<|pad|>``, and ChatML with ``<|im_start|>`` and ``<|im_end|>``; ``char`` has
    ``<|unk|>`` too. ``decode(encode(text)) == text`` for any text (``char``: of the characters seen).

    Raises:
        ConfigurationError: No text, or a ``vocab_size`` that cannot hold the bytes and the special tokens.
    """
    from transformers import PreTrainedTokenizerFast

    trained = {"char": _char, "byte": _byte, "bpe": _bpe}[config.kind](config, texts)
    special: dict[str, Any] = {"unk_token": UNKNOWN} if config.kind == "char" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[TURN_START, TURN_END],
        clean_up_tokenization_spaces=False,
        **special,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def ensure_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the tokenizer a padding token: its own, else an unused special token, else a new ``<|pad|>``.

    A token that also ends texts or turns does not count as its own: what hides padding from a loss would then hide
    the stop token too, and the model would never learn to stop.
    """
    if tokenizer.pad_token is None or _is_in_use(tokenizer, tokenizer.pad_token):
        tokenizer.add_special_tokens({"pad_token": _unused_special_token(tokenizer) or PAD})


def stop_token_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a generated text: eos, and ChatML's end of turn where the template writes it."""
    ids = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if TURN_END in str(tokenizer.chat_template) and TURN_END in tokenizer.get_vocab():
        ids.append(tokenizer.convert_tokens_to_ids(TURN_END))
    return list(dict.fromkeys(ids))


_FILES = ("tokenizer*", "vocab*", "*.model", "tekken.json")
"""What the files of a tokenizer are called; one of these is always there."""


def _pretrained(config: ModelConfig, name: str | None, key: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    key, name, revision = ("model.tokenizer", name, None) if name else (key, _named(config), config.revision)
    another = "model.tokenizer: " if key in ("model.tokenizer", NAMED) else ""  # only a run's own model has that option
    mend = f"Give {another}a folder with tokenizer.json and tokenizer_config.json."
    if is_hub_name(name):
        mend = f"Check the name and the network. {mend}"
    elif not any(file.match(pattern) for file in Path(resolve(name)).glob("*") for pattern in _FILES):
        raise ModelLoadError(f"{key}: {name} has no tokenizer: none of its usual files is there. {mend}")
    with loading(f"{key}: the tokenizer of {where(name)}", mend):
        return AutoTokenizer.from_pretrained(
            resolve(name), revision=revision, trust_remote_code=config.trust_remote_code
        )


def _named(config: ModelConfig) -> str:
    """Return the model that the tokenizer comes with: an adapter's base, where the adapter has none."""
    name = str(config.name_or_path)
    folder = adapter_folder(name)
    return base_of(folder) if folder and not (folder / "tokenizer_config.json").is_file() else name


def _is_in_use(tokenizer: PreTrainedTokenizerFast, token: str) -> bool:
    used = {tokenizer.eos_token, tokenizer.bos_token, TURN_END}
    return token in used or token in str(tokenizer.chat_template or "")


def _unused_special_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    # Only the name tells that a special token is not in use: others (tools, fill-in-the-middle) have a meaning.
    special: list[str] = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    for pattern in (r"\bpad(ding)?\b|_pad_", r"reserved|unused"):
        for token in special:
            if re.search(pattern, token, re.IGNORECASE) and not _is_in_use(tokenizer, token):
                return token
    return None


def _char(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models

    seen: set[str] = set()
    for text in texts:
        seen.update(text)
    if not seen:
        raise ConfigurationError("model.tokenizer: a char tokenizer is trained on text, and there is none")
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, UNKNOWN, *sorted(seen)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, fuse_unk=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([*SPECIAL_TOKENS, UNKNOWN])
    return tokenizer


def _byte(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _bpe(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + len(SPECIAL_TOKENS)
    if config.vocab_size < least:
        raise ConfigurationError(
            f"model.tokenizer.vocab_size is {config.vocab_size}; a bpe tokenizer needs at least {least}: "
            f"{len(alphabet)} bytes and {len(SPECIAL_TOKENS)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
