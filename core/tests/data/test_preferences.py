"""Pairs and labelled rows: what is read as them, what they become, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import Dialogue, Labelled, Pair, encode, read_rows, read_splits
from llmtk.errors import DatasetError

ASKED: list[dict[str, Any]] = [{"role": "user", "content": "q"}]
GOOD: list[dict[str, Any]] = [{"role": "assistant", "content": "good"}]
BAD: list[dict[str, Any]] = [{"role": "assistant", "content": "bad"}]
PLAIN = {"prompt": "q ", "chosen": "good", "rejected": "bad"}


def read(row: dict[str, Any], row_type: str = "pair") -> Any:
    (found,) = read_rows([row], [row_type])
    return found


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
        {"prompt": ASKED, "chosen": GOOD[0], "rejected": BAD[0]},
        {"prompt": "q", "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"chosen": ASKED + GOOD, "rejected": ASKED + BAD},
        {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
    ],
    ids=["messages", "a-message", "text-prompt", "prompt-twice", "implicit", "alpaca", "sharegpt"],
)
def test_one_pair_in_every_format(row: dict[str, Any]) -> None:
    assert read(row) == Pair(ASKED, GOOD, BAD, place="row 1")


def test_a_pair_of_texts_and_its_margin() -> None:
    assert read(PLAIN | {"margin": 2}) == Pair("q ", "good", "bad", margin=2, place="row 1")


def test_the_words_that_both_begin_with_are_the_prompt() -> None:
    row = {"chosen": "Two and two is four", "rejected": "Two and two is five"}
    assert read(row) == Pair("Two and two is", " four", " five", place="row 1")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Capital of France?\nParis", "Capital of France?\nLyon", "Capital of France?"),
        ("日本の首都は東京", "日本の首都は大阪", "日本の首都は"),
        ("two words", "two", ""),
        ("a b", "a b c", "a"),
        ("one same", "one same", "one"),
        ("cat", "car", ""),
    ],
)
def test_where_the_common_words_end(chosen: str, rejected: str, prompt: str) -> None:
    found = read({"chosen": chosen, "rejected": rejected})
    assert (found.prompt, found.prompt + found.chosen, found.prompt + found.rejected) == (prompt, chosen, rejected)


def test_answers_to_one_prompt_are_held_out_together() -> None:
    rows = [{"prompt": f"q{n % 20}", "chosen": f"a{n}", "rejected": "b"} for n in range(40)]
    for row_type in ("pair", "labelled"):
        splits = read_splits(DataConfig(train=rows, eval=0.2), [row_type], seed=0)
        train, held = ({row.prompt for row in part} for part in (splits.train, splits.eval))
        assert not train & held
        assert len(held) == 4


def test_what_is_there_as_it_is_wanted_goes_before_what_is_converted() -> None:
    row = {"messages": ASKED + GOOD, "prompt": "q", "chosen": ASKED + GOOD, "rejected": ASKED + BAD}
    assert read(row, "dialogue") == Dialogue(ASKED + GOOD, place="row 1")
    assert read(row) == Pair(ASKED, GOOD, BAD, place="row 1")


def test_equal_answers_keep_their_last_turn() -> None:
    found = read({"chosen": ASKED + GOOD, "rejected": ASKED + GOOD})
    assert (found.prompt, found.chosen, found.rejected) == (ASKED, GOOD, GOOD)


@pytest.mark.parametrize("row", [{"messages": ASKED + GOOD}, {"prompt": ASKED, "completion": GOOD}])
def test_labels(row: dict[str, Any]) -> None:
    assert read(row | {"label": False}, "labelled") == Labelled(ASKED, GOOD, False, place="row 1")


def test_a_pair_becomes_two_labelled_rows_or_a_dialogue() -> None:
    row = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
    assert read_rows([row], ["labelled"]) == [
        Labelled(ASKED, GOOD, True, place="row 1"),
        Labelled(ASKED, BAD, False, place="row 1"),
    ]
    assert read_rows([row], ["dialogue"]) == [Dialogue(ASKED + GOOD, place="row 1")]


@pytest.mark.parametrize(
    ("row", "row_type", "why"),
    [
        ({"prompt": "q", "completion": "a", "label": "yes"}, "labelled", "label is text"),
        ({"prompt": "q", "completion": "a", "label": 1}, "labelled", "label is a number"),
        ({"prompt": "q", "completion": " ", "label": True}, "labelled", "completion is empty"),
        ({"messages": ASKED, "label": True}, "labelled", "must end with the assistant's turn"),
        (PLAIN | {"rejected": ""}, "pair", "rejected is empty"),
        (PLAIN | {"chosen": GOOD}, "pair", "prompt and chosen are of two kinds"),
        (PLAIN | {"margin": float("nan")}, "pair", "margin is nan"),
        (PLAIN | {"margin": "much"}, "pair", "margin is text"),
        (PLAIN | {"rejected": None}, "pair", "Rows of type pair are needed"),
        ({"chosen": GOOD, "rejected": BAD}, "pair", "there is no prompt"),
        ({"conversations": [{"from": "cat", "value": "q"}], "chosen": {}, "rejected": {}}, "pair", "from 'cat'"),
    ],
)
def test_what_is_refused(row: dict[str, Any], row_type: str, why: str) -> None:
    with pytest.raises(DatasetError, match=why):
        read(row, row_type)


DATA = Path(__file__).parents[4] / "shared" / "data"


@pytest.mark.parametrize(("file", "row_type"), [("dpo_en_demo.json", "pair"), ("kto_en_demo.json", "labelled")])
def test_real_rows_are_read_as_they_are(file: str, row_type: str) -> None:
    if not (DATA / file).exists():
        pytest.skip(f"{DATA / file} is absent")
    rows = read_rows(str(DATA / file), [row_type])
    assert len(rows) == 300
    for row in rows:
        answer = row.chosen if isinstance(row, Pair) else row.completion
        assert row.prompt[-1]["role"] == "user"
        assert [message["role"] for message in answer] == ["assistant"]


# Tokens


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer(["</s>"], eos_token="</s>")


def tokens(tokenizer: Any, row: dict[str, Any], name: str) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(row[f"{name}_ids"]))


def test_a_pair_by_hand(tokenizer: Any) -> None:
    data, report = encode([Pair("ab", "cd", "cef", margin=0.5, place="row 1")], tokenizer, DataConfig())
    row = data[0]
    assert [tokens(tokenizer, row, name) for name in ("prompt", "chosen", "rejected")] == ["ab", "cd</s>", "cef</s>"]
    assert row["chosen_targets"] == [True] * 3
    assert row["rejected_targets"] == [True] * 4
    assert (row["margin"], row["place"]) == (0.5, "row 1")
    assert (report.rows, report.tokens, report.targets) == (1, 9, 7)


def test_a_label_by_hand(tokenizer: Any) -> None:
    data, _ = encode([Labelled("", "ab", True), Labelled("a", "b", False)], tokenizer, DataConfig())
    assert data["label"][:] == [True, False]
    assert data["completion_targets"][:] == [[False, True, True], [True, True]], "a first token is no target"


def test_answers_are_cut_and_the_prompt_never_is(tokenizer: Any) -> None:
    data, report = encode(
        [Pair("abc", "dddd", "ee"), Pair("abcde", "f", "g", place="row 2")], tokenizer, DataConfig(max_length=5)
    )
    assert [tokens(tokenizer, data[0], name) for name in ("prompt", "chosen", "rejected")] == ["abc", "dd", "ee"]
    assert (len(data), report.truncated, report.without_target) == (1, 1, ["row 2"])
    data, report = encode(
        [Pair("abc", "dddd", "e"), Pair("a", "b", "c")], tokenizer, DataConfig(max_length=5, on_too_long="drop")
    )
    assert (len(data), len(report.too_long)) == (1, 1)


def test_a_margin_that_some_rows_lack_is_null(tokenizer: Any) -> None:
    data, _ = encode([Pair("a", "b", "c", margin=1), *[Pair("a", "b", "c")] * 600], tokenizer, DataConfig())
    assert data["margin"][0] == 1.0
    assert data["margin"][600] is None
