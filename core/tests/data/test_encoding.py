"""Rows become tokens: boundaries, truncation, what is dropped, and what is said about it."""

from __future__ import annotations

from typing import Any

import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import Dialogue, PromptCompletion, Text, encode, read_rows
from llmtk.errors import ConfigurationError, DatasetError


def config(max_length: int = 2048, **options: Any) -> DataConfig:
    return DataConfig(max_length=max_length, **options)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer(["</s>"], eos_token="</s>")


def test_text_gets_no_special_token_and_is_never_cut(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["<s>", "</s>"], bos=True, eos_token="</s>")
    data, report = encode([Text("abcdef", place="a.txt"), Text("g")], tokenizer, config(max_length=2))
    assert data.column_names == ["input_ids", "length", "place"]
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in data["input_ids"]] == [[*"abcdef"], ["g"]]
    assert data["place"][:] == ["a.txt", ""]
    assert (report.rows, report.tokens, report.targets, report.notices) == (2, 7, 7, [])


def test_columns_are_compact(tokenizer: Any) -> None:
    data, _ = encode([PromptCompletion("a", "b")], tokenizer, config())
    assert {name: str(column.type) for name, column in zip(data.column_names, data.data.columns, strict=True)} == {
        "input_ids": "list<item: int32>",
        "targets": "list<item: bool>",
        "length": "int32",
        "place": "string",
    }


def test_plain_completion_by_hand(tokenizer: Any) -> None:
    data, report = encode([PromptCompletion("ab", "cd", place="row 1")], tokenizer, config())
    assert tokenizer.convert_ids_to_tokens(data[0]["input_ids"]) == ["a", "b", "c", "d", "</s>"]
    assert data[0]["targets"] == [False, False, True, True, True]
    assert data[0]["place"] == "row 1"
    assert (report.rows, report.tokens, report.targets, report.moved) == (1, 5, 3, 0)


def test_the_tokenizers_first_token_comes_once_and_an_end_token_is_not_doubled(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["<s>", "</s>"], bos=True, eos_token="</s>")
    data, _ = encode([PromptCompletion("", "a</s>")], tokenizer, config())
    assert tokenizer.convert_ids_to_tokens(data[0]["input_ids"]) == ["<s>", "a", "</s>"]
    assert data[0]["targets"] == [False, True, True]


def test_the_first_token_is_never_a_target(tokenizer: Any) -> None:
    data, report = encode([PromptCompletion("", "ab")], tokenizer, config())
    assert data[0]["targets"] == [False, True, True]
    assert report.targets == 2


def test_the_boundary_moves_to_the_common_prefix_and_the_first_such_row_is_shown(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["</s>"], [("b", "c")], eos_token="</s>")
    rows = [PromptCompletion("ab", "x"), *[PromptCompletion("ab", "cd", place=f"d.jsonl:{n}") for n in (2, 3)]]
    data, report = encode(rows, tokenizer, config())
    assert tokenizer.convert_ids_to_tokens(data[1]["input_ids"]) == ["a", "bc", "d", "</s>"]
    assert data[1]["targets"] == [False, True, True, True]
    assert report.moved == 2
    assert report.notices[0].startswith("d.jsonl:2: the token 'bc' joins the prompt's end with the answer's beginning.")
    assert report.notices[1] == "Rows in which a token joins the prompt's end with the answer's beginning: 2."


def test_a_plain_completion_needs_an_end_token(make_tokenizer: Any) -> None:
    with pytest.raises(ConfigurationError, match="The tokenizer has no end token"):
        encode([PromptCompletion("a", "b")], make_tokenizer(), config())


LONG = [
    PromptCompletion("ab", "c", place="d.jsonl:1"),  # 4 tokens: fits
    PromptCompletion("ab", "cdef", place="d.jsonl:2"),  # 7 tokens: cut
    PromptCompletion("abcd", "e", place="d.jsonl:3"),  # no target in the first 4
]


def test_truncation_is_counted_and_a_row_without_a_target_is_left_out(tokenizer: Any) -> None:
    data, report = encode(LONG, tokenizer, config(max_length=4))
    assert [len(ids) for ids in data["input_ids"]] == data["length"][:] == [4, 4]
    assert data[1]["targets"] == [False, False, True, True]
    assert (report.truncated, report.dropped) == (1, ["d.jsonl:3"])
    assert report.notices == [
        "Rows cut at max_length, 4 tokens: 1.",
        "Rows left out, no target within max_length, 4: 1 (d.jsonl:3).",
    ]


def test_rows_that_are_too_long_can_be_left_out(tokenizer: Any) -> None:
    data, report = encode(LONG, tokenizer, config(max_length=4, on_too_long="drop"))
    assert data["place"][:] == ["d.jsonl:1"]
    assert (report.truncated, report.dropped) == (0, ["d.jsonl:2", "d.jsonl:3"])
    assert report.notices == ["Rows left out, over max_length, 4 tokens: 2 (d.jsonl:2, d.jsonl:3)."]


def test_no_row_left_is_an_error_that_says_why(tokenizer: Any) -> None:
    with pytest.raises(DatasetError) as caught:
        encode(LONG[2:], tokenizer, config(max_length=4))
    assert str(caught.value) == (
        "None of the 1 rows is left to train on.\nRows left out, no target within max_length, 4: 1 (d.jsonl:3)."
    )


def test_a_token_beyond_the_vocabulary_names_its_row(tokenizer: Any) -> None:
    rows = [PromptCompletion("a", "b", place="d.jsonl:1")]
    with pytest.raises(DatasetError, match=r"d\.jsonl:1: token 256 \('</s>'\) is beyond the model's embeddings, which"):
        encode(rows, tokenizer, config(), vocab_size=256)
    assert encode(rows, tokenizer, config(), vocab_size=300)[1].rows == 1


def test_unknown_text_is_counted(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["<unk>", "</s>"], eos_token="</s>", unk_token="<unk>")
    _, report = encode([Text("a<unk><unk>")], tokenizer, config())
    assert report.notices == ["Tokens for text that the tokenizer doesn't know: 2 of 3."]


def test_many_rows_of_mixed_types_keep_their_order(chatml_tokenizer: Any) -> None:
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    kinds = [PromptCompletion("a", "b"), Dialogue([ask, answer]), PromptCompletion([ask], [answer])]
    one_by_one = [encode([row], chatml_tokenizer, config(template="chatml"))[0][0] for row in kinds]
    data, report = encode(kinds * 400, chatml_tokenizer, config(template="chatml"))
    assert report.rows == 1200
    assert data[:] == {name: [row[name] for row in one_by_one] * 400 for name in data.column_names}


def test_real_rows_decode_to_their_answers(shared_data: Any, chatml_tokenizer: Any) -> None:
    rows = read_rows(shared_data("alpaca_en_demo.json"), ("dialogue",))[:50]
    data, report = encode(rows, chatml_tokenizer, config(max_length=100_000, template="chatml"))
    for row, item in zip(rows, data, strict=True):
        assert isinstance(row, Dialogue)
        chosen = [token for token, target in zip(item["input_ids"], item["targets"], strict=True) if target]
        assert chatml_tokenizer.decode(chosen) == row.messages[-1]["content"] + "<|im_end|>"
    assert report.dropped == []
