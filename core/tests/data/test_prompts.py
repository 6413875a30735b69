"""Prompts: rows to be answered, with whatever else they bring for rewards."""

from __future__ import annotations

import json

import pytest

from llmtk import DatasetError
from llmtk.config.sections import DataConfig, TokenizerConfig
from llmtk.data import Prompt, encode, read_rows, read_splits
from llmtk.models.tokenizers import train_tokenizer

ASK = {"role": "user", "content": "1+1="}
SAY = {"role": "assistant", "content": "2"}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TokenizerConfig(kind="byte"), [])


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"prompt": "1+1=", "answer": "2", "level": 3}, "1+1=", {"answer": "2", "level": 3}),
        ({"prompt": [ASK], "completion": [SAY]}, [ASK], {"completion": [SAY]}),
        ({"question": "1+1=", "answer": "#### 2"}, [ASK], {"answer": "#### 2"}),
        ({"messages": [ASK, SAY]}, [ASK], {"answer": "2"}),
        ({"messages": [ASK, SAY, ASK, SAY]}, [ASK, SAY, ASK], {"answer": "2"}),
        ({"instruction": "1+1=", "output": "2"}, [ASK], {"answer": "2"}),
    ],
)
def test_prompts_keep_the_other_columns(row, prompt, columns):
    (found,) = read_rows([row], ("prompt",))
    assert isinstance(found, Prompt)
    assert (found.prompt, found.columns) == (prompt, columns)


def test_no_column_of_a_prompt_is_said_to_be_unused():
    splits = read_splits(DataConfig(train=[{"prompt": "a", "level": 1}, {"prompt": "b"}]), ("prompt",), seed=0)
    assert not splits.notices
    assert [row.columns for row in splits.train] == [{"level": 1}, {}]


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": " "}, "prompt is empty"),
        ({"prompt": [ASK, SAY]}, "ends with a turn of the assistant"),
        ({"messages": [SAY]}, "leaves no prompt"),
        ({"prompt": "a", "when": object()}, "its columns hold what JSON cannot"),
        ({"query": "a"}, r"fit no format(.|\n)*prompt: prompt \(optional: tools, any others\)"),
    ],
)
def test_what_is_refused(row, why):
    with pytest.raises(DatasetError, match=why):
        read_rows([row], ("prompt",))


def test_prompts_become_tokens_up_to_where_the_answer_begins(tokenizer):
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    tokenizer.chat_template = template
    rows = [Prompt("1+1=", {"answer": "2"}, place="a"), Prompt([ASK], {}, place="b")]
    data, _ = encode(rows, tokenizer, DataConfig())
    assert [tokenizer.decode(ids) for ids in data["prompt_ids"]] == ["1+1=", "<1+1=>:"]
    assert [json.loads(columns) for columns in data["columns"]] == [{"answer": "2"}, {}]
    assert [json.loads(prompt) for prompt in data["prompt"]] == ["1+1=", [ASK]]
    assert list(data["length"]) == [4, 7]


@pytest.mark.parametrize("on_too_long", ["truncate", "drop"])
def test_a_prompt_without_room_behind_it_is_left_out_never_cut(tokenizer, on_too_long):
    rows = [Prompt("x" * n, {}, place=f"row {n}") for n in (3, 4, 5)]
    data, report = encode(rows, tokenizer, DataConfig(max_length=4, on_too_long=on_too_long))
    assert [len(ids) for ids in data["prompt_ids"]] == [3]
    assert report.too_long == ["row 4", "row 5"]
