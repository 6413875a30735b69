"""Rows become tokens: boundaries, truncation, what is dropped, and what is said about it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import Dialogue, Pair, Prompt, PromptCompletion, Text, encode, read_rows
from llmtk.data.processes import in_processes
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
    assert str(caught.value) == ("No row is left, of 1.\nRows left out, no target within max_length, 4: 1 (d.jsonl:3).")


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


# -- what is learnt -----------------------------------------------------------------------------------------------

TALK = Dialogue(
    [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd", strict=True)],
    place="row 1",
)
ASKED = PromptCompletion(TALK.messages[:3], TALK.messages[3:], place="row 2")


def learnt(row: Any, tokenizer: Any, **options: Any) -> str:
    data, _ = encode([row], tokenizer, config(template="chatml", **options))
    pairs = zip(data[0]["input_ids"], data[0]["targets"], strict=True)
    return str(tokenizer.decode([token for token, target in pairs if target]))


def test_loss_on_turns_of_a_dialogue(chatml_tokenizer: Any) -> None:
    end = "<|im_end|>"
    assert learnt(TALK, chatml_tokenizer) == learnt(TALK, chatml_tokenizer, loss_on="assistant") == f"b{end}d{end}"
    assert learnt(TALK, chatml_tokenizer, loss_on="last_turn") == f"d{end}"
    whole = chatml_tokenizer.decode(encode([TALK], chatml_tokenizer, config(template="chatml"))[0][0]["input_ids"])
    assert "<|im_start|>" + learnt(TALK, chatml_tokenizer, loss_on="everything") == whole


def test_loss_on_a_completion_of_turns(chatml_tokenizer: Any) -> None:
    end = "<|im_end|>"
    assert learnt(ASKED, chatml_tokenizer) == learnt(ASKED, chatml_tokenizer, loss_on="completion") == f"d{end}"
    assert learnt(ASKED, chatml_tokenizer, loss_on="assistant") == f"b{end}d{end}"
    several = PromptCompletion(TALK.messages[:1], TALK.messages[1:])
    assert learnt(several, chatml_tokenizer) == f"b{end}d{end}"
    assert learnt(several, chatml_tokenizer, loss_on="last_turn") == f"d{end}"


def test_loss_on_plain_text(tokenizer: Any) -> None:
    assert learnt(PromptCompletion("ab", "cd"), tokenizer, loss_on="completion") == "cd</s>"
    assert learnt(PromptCompletion("ab", "cd"), tokenizer, loss_on="everything") == "bcd</s>"


@pytest.mark.parametrize(
    ("row", "options", "reason"),
    [
        (TALK, {"loss_on": "completion"}, r"completion is for rows of prompt and completion, and row 1 is a dialogue"),
        (
            PromptCompletion("a", "b", place="row 3"),
            {"loss_on": "last_turn"},
            r"for turns of a dialogue, and row 3 is plai",
        ),
        (Pair("a", "b", "c"), {"loss_on": "everything"}, r"data\.loss_on: documents are learnt whole, and preferences"),
        (Text("a"), {"loss_on": "assistant"}, r"data\.loss_on: "),
        (Text("a"), {"truncation_side": "left"}, r"data\.truncation_side: documents are never cut"),
        (Text("a"), {"max_prompt_length": 2}, r"data\.max_prompt_length: a document has no prompt"),
        (Prompt("a", {}), {"truncation_side": "left"}, r"prompts are by max_prompt_length alone"),
    ],
)
def test_options_that_a_row_has_no_use_for_are_refused(
    chatml_tokenizer: Any, row: Any, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        encode([row], chatml_tokenizer, config(template="chatml", **options))


# -- where a row is cut -------------------------------------------------------------------------------------------


def tokens(tokenizer: Any, ids: list[int]) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_the_beginning_can_be_cut(tokenizer: Any) -> None:
    data, report = encode(LONG, tokenizer, config(max_length=4, truncation_side="left"))
    assert [tokens(tokenizer, ids) for ids in data["input_ids"]] == ["abc</s>", "def</s>", "cde</s>"]
    assert data["targets"][:] == [[False, False, True, True], [False, True, True, True], [False, False, True, True]]
    assert report.notices == ["Rows cut at max_length, 4 tokens: 2."]


def test_from_the_left_a_pairs_prompt_gives_way_to_its_answers(tokenizer: Any) -> None:
    rows = [Pair("abcde", "f", "gg"), Pair("abc", "dddddd", "e")]
    data, report = encode(rows, tokenizer, config(max_length=5, truncation_side="left"))
    shown = [[tokens(tokenizer, row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")] for row in data]
    assert shown == [["de", "f</s>", "gg</s>"], ["c", "dddd", "e</s>"]]
    assert report.truncated == 2


def test_a_prompt_is_cut_at_its_beginning(tokenizer: Any) -> None:
    settings = config(max_length=8, max_prompt_length=2)
    data, report = encode([PromptCompletion("abcd", "e"), PromptCompletion("a", "b")], tokenizer, settings)
    assert [tokens(tokenizer, ids) for ids in data["input_ids"]] == ["cde</s>", "ab</s>"]
    assert data["targets"][0] == [False, False, True, True]
    assert report.notices == ["Prompts cut to max_prompt_length, their last 2 tokens: 1."]
    pairs, _ = encode([Pair("abcd", "e", "f")], tokenizer, settings)
    assert tokens(tokenizer, pairs[0]["prompt_ids"]) == "cd"
    prompts, _ = encode([Prompt("abcd", {})], tokenizer, settings)
    assert tokens(tokenizer, prompts[0]["prompt_ids"]) == "cd"


def test_a_row_with_a_long_prompt_can_be_left_out(tokenizer: Any) -> None:
    settings = config(max_length=8, max_prompt_length=2, on_too_long="drop")
    rows = [PromptCompletion("abcd", "e", place="d.jsonl:1"), PromptCompletion("a", "b", place="d.jsonl:2")]
    data, report = encode(rows, tokenizer, settings)
    assert data["place"][:] == ["d.jsonl:2"]
    assert report.dropped == ["d.jsonl:1"]
    assert report.notices == ["Rows left out, prompt over max_prompt_length, 2 tokens: 1 (d.jsonl:1)."]


@pytest.mark.parametrize(
    "options",
    [
        {"on_too_long": "drop", "truncation_side": "left"},
        {"max_length": 8, "max_prompt_length": 8},
        {"max_prompt_length": 8, "loss_on": "everything"},
    ],
)
def test_lengths_that_do_not_go_together(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"truncation_side|max_prompt_length"):
        DataConfig(**options)


# -- in several processes -----------------------------------------------------------------------------------------


def test_several_processes_give_the_same_tokens_and_the_same_report(chatml_tokenizer: Any) -> None:
    rows = [
        replace(row, place=f"row {n}") for n in range(400) for row in (TALK, ASKED, PromptCompletion("a", "b" * 20))
    ]
    settings = {"template": "chatml", "max_length": 40}
    one, report = encode(rows, chatml_tokenizer, config(**settings))
    two, same = encode(rows, chatml_tokenizer, config(num_proc=2, **settings))
    assert two[:] == one[:]
    assert same == report
    assert (report.rows, report.truncated, len(report.without_target)) == (800, 400, 400)


def test_what_is_said_of_the_first_row_is_said_once(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(["</s>"], [("b", "c")], eos_token="</s>")
    rows = [PromptCompletion("ab", "cd", place=f"row {n}") for n in range(1, 1201)]
    for processes in (1, 2):
        _, report = encode(rows, tokenizer, config(num_proc=processes))
        assert [notice[:5] for notice in report.notices] == ["row 1", "Rows "]
        assert report.moved == 1200


def test_an_error_in_another_process_is_told_as_ever(make_tokenizer: Any) -> None:
    template = "{{ raise_exception('no') }}"
    tokenizer = make_tokenizer(["</s>"], eos_token="</s>", chat_template=template)
    with pytest.raises(DatasetError, match=r"^row 1: the chat template fails: no\.$"):
        encode([TALK] * 600, tokenizer, config(num_proc=2))


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(DatasetError, match=r"died, for want of memory perhaps\. Lower data\.num_proc\."):
        list(in_processes(lambda _: os._exit(1), [1, 2], 2))
