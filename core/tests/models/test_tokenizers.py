"""Tokenizers: trained, loaded, padded."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llmtk.config.sections import ModelConfig, TokenizerConfig
from llmtk.errors import ConfigurationError, ModelLoadError
from llmtk.models.tokenizers import ensure_padding, load_tokenizer, stop_token_ids, train_tokenizer

from .conftest import LLAMA

TEXTS = ["First Citizen:\nBefore we proceed any further, hear me speak.\n", "All:\nSpeak, speak.\n"]
ANY_TEXT = "  A\ttab , 's and\r\n\n日本語 ✓ é \x00 \U0001f600<|im_end|>."
KINDS = [TokenizerConfig(kind="char"), TokenizerConfig(kind="byte"), TokenizerConfig(kind="bpe", vocab_size=300)]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_round_trip_of_text_and_of_the_folder(config, tmp_path):
    trained = train_tokenizer(config, TEXTS)
    trained.save_pretrained(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(ModelConfig(name_or_path="builtin", tokenizer=str(tmp_path))),
    ):
        for text in TEXTS if config.kind == "char" else [*TEXTS, ANY_TEXT]:
            assert loaded.decode(loaded.encode(text)) == text
            assert loaded.encode(text) == trained.encode(text)
        assert loaded.get_vocab() == trained.get_vocab()
        assert loaded.chat_template == trained.chat_template
        assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_chat_ends_with_its_stop_token(config):
    tokenizer = train_tokenizer(config, [*TEXTS, "usertassistant"])
    messages = [{"role": "user", "content": "hear"}, {"role": "assistant", "content": "me"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|im_start|>user\nhear<|im_end|>\n<|im_start|>assistant\nme<|im_end|>\n"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.encode(text).count(end) == 2
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id, end]


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_training_is_deterministic(config):
    first, second = (train_tokenizer(config, TEXTS).backend_tokenizer.to_str() for _ in range(2))
    assert first == second


def test_sizes():
    char, byte, bpe = (train_tokenizer(config, TEXTS) for config in KINDS)
    assert len(char) == len(set("".join(TEXTS))) + 5
    assert len(byte) == 260
    assert len(bpe) == 300


def test_a_char_that_was_not_seen_is_unknown():
    tokenizer = train_tokenizer(TokenizerConfig(kind="char"), ["ab"])
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("aéèb")) == ["a", "<|unk|>", "<|unk|>", "b"]


def test_a_bpe_vocabulary_holds_the_bytes_at_least():
    with pytest.raises(ConfigurationError, match="vocab_size is 100; a bpe tokenizer needs at least 260"):
        train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=100), TEXTS)


@pytest.mark.parametrize("texts", [None, list])
def test_training_needs_text(texts):
    with pytest.raises(ConfigurationError, match="trained on text, and there is none"):
        load_tokenizer(ModelConfig(from_config=LLAMA, tokenizer=TokenizerConfig(kind="char")), texts)


def test_training_texts_are_read_only_where_they_are_needed(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)

    def never():
        raise AssertionError

    assert len(load_tokenizer(ModelConfig(from_config=LLAMA, tokenizer=str(tmp_path)), never)) == 260


def test_a_folder_without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelLoadError, match=r"has no tokenizer: .*Give model.tokenizer"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))


def plain(special, **roles):
    """A tokenizer of one letter and these special tokens."""
    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


@pytest.mark.parametrize(
    ("special", "roles", "padding", "size"),
    [
        (["</s>", "<pad>"], {"eos_token": "</s>", "pad_token": "<pad>"}, "<pad>", 3),
        (["</s>", "<unk>"], {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}, "<unk>", 3),
        (["</s>", "<|reserved_0|>", "<|right_pad_id|>"], {"eos_token": "</s>"}, "<|right_pad_id|>", 4),
        (["</s>", "<|reserved_0|>", "<|reserved_1|>"], {"eos_token": "</s>"}, "<|reserved_0|>", 4),
        (["</s>", "<tool_call>"], {"eos_token": "</s>"}, "<|pad|>", 4),
        (["</s>"], {"eos_token": "</s>", "pad_token": "</s>"}, "<|pad|>", 3),
        (["</s>", "<|im_end|>"], {"eos_token": "</s>", "pad_token": "<|im_end|>"}, "<|pad|>", 4),
    ],
)
def test_padding_is_never_a_token_that_stops(special, roles, padding, size):
    tokenizer = plain(special, **roles)
    ensure_padding(tokenizer)
    assert tokenizer.pad_token == padding
    assert tokenizer.pad_token_id == tokenizer.get_vocab()[padding]
    assert len(tokenizer) == size


def test_a_token_of_the_template_is_in_use():
    tokenizer = plain(["</s>", "<pad>"], eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = "{{ messages[0].content }}<pad>"
    ensure_padding(tokenizer)
    assert tokenizer.pad_token == "<|pad|>"
