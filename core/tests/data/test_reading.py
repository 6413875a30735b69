"""Files and Python objects become checked rows, and every bad one is named with its place."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtk.config.sections import DataConfig
from llmtk.data import Dialogue, PromptCompletion, Splits, Text, read_rows, read_splits
from llmtk.data.rows import RowError, convert
from llmtk.errors import ConfigurationError, DatasetError

if TYPE_CHECKING:
    from pathlib import Path

SFT = ("dialogue", "prompt_completion")
ASK = {"role": "user", "content": "1+1?"}
ANSWER = {"role": "assistant", "content": "2"}


def write(folder: Path, name: str, content: object) -> str:
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, str):
        path.write_bytes(content.encode())
    else:
        lines = content if name.endswith("l") else [content]
        path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def refusal(source: object, row_types: tuple[str, ...] = SFT) -> str:
    with pytest.raises(DatasetError) as caught:
        read_rows(source, row_types)
    return str(caught.value)


def test_importing_the_data_layer_is_light() -> None:
    code = "import sys, llmtk.data; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# -- formats ------------------------------------------------------------------------------------------------------


def test_messages_keep_their_tools_and_lose_null_fields() -> None:
    messages = [dict(ASK, name=None), dict(ANSWER, tool_calls=None)]
    [row] = read_rows([{"messages": messages, "tools": '[{"name": "add"}]'}], SFT)
    assert row == Dialogue([ASK, ANSWER], [{"name": "add"}], place="row 1")


def test_content_in_parts_of_text_is_joined() -> None:
    parts = [{"type": "text", "text": "1+1"}, {"type": "text", "text": "?", "image_url": None}]
    pair = {"prompt": [dict(ASK, content=parts)], "chosen": [dict(ANSWER, content=parts[1:])], "rejected": [ANSWER]}
    assert read_rows([{"messages": [dict(ASK, content=parts), ANSWER]}], SFT)[0].messages == [ASK, ANSWER]
    (row,) = read_rows([pair], ("pair",))
    assert (row.prompt, row.chosen) == ([ASK], [dict(ANSWER, content="?")])


def test_alpaca_joins_instruction_and_input_and_keeps_system_and_history() -> None:
    columns = {
        "instruction": "Add.",
        "input": "1+1",
        "output": "2",
        "system": "Be terse.",
        "history": [["Hi", "Hello"]],
    }
    [row] = read_rows([columns], SFT)
    assert isinstance(row, Dialogue)
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("system", "Be terse."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Add.\n1+1"),
        ("assistant", "2"),
    ]


def test_alpaca_without_input() -> None:
    [row] = read_rows([{"instruction": "Hi", "input": "", "output": "Hello"}], SFT)
    assert row.messages[0]["content"] == "Hi"


def test_prompt_and_completion_as_text_and_as_messages() -> None:
    rows = read_rows([{"prompt": "a", "completion": "b"}, {"prompt": [ASK], "completion": [ANSWER]}], SFT)[:2]
    assert rows == [PromptCompletion("a", "b", place="row 1"), PromptCompletion([ASK], [ANSWER], place="row 2")]


def test_conversational_completion_becomes_a_dialogue_where_only_these_are_wanted() -> None:
    [row] = read_rows([{"prompt": [ASK], "completion": [ANSWER]}], ("dialogue",))
    assert row == Dialogue([ASK, ANSWER], place="row 1")
    assert "row 1: prompt and completion are plain text" in refusal([{"prompt": "a", "completion": "b"}], ("dialogue",))


def test_dialogue_never_becomes_text() -> None:
    with pytest.raises(RowError, match="type dialogue cannot become one of text"):
        convert(Dialogue([ASK, ANSWER]), ("text",))


def test_columns_beside_the_format_are_ignored_and_said() -> None:
    rows = [{"text": "once", "url": "u", "timestamp": "t"}, {"text": "twice", "url": None}]
    splits = read_splits(DataConfig(train=rows), ("text",), seed=0)
    assert [row.text for row in splits.train] == ["once", "twice"]
    assert splits.notices == ["The data given as a list is read as text; not used: timestamp, url."]


def test_the_wanted_row_type_decides_between_formats() -> None:
    both = [{"instruction": "Hi", "output": "Hello", "text": "Hi Hello"}]
    assert isinstance(read_rows(both, SFT)[0], Dialogue)
    assert isinstance(read_rows(both, ("text",))[0], Text)


def test_ambiguous_columns_are_refused() -> None:
    message = refusal([{"messages": [ASK, ANSWER], "prompt": "a", "completion": "b"}])
    assert (
        "has the columns completion, messages, prompt, which fit the formats of messages and of prompt/compl" in message
    )
    assert "Leave out the columns of all but one, in the data or with data.columns ({NAME: null})" in message


def test_rows_of_several_formats_are_told_apart(tmp_path: Path) -> None:
    talk, pair = {"messages": [ASK, ANSWER]}, {"prompt": "1+1?", "completion": "2", "source": "x"}
    path = write(tmp_path, "mixed.jsonl", [talk, talk, pair, {"note": "neither"}, pair | {"source": None}])
    assert refusal(path) == (
        f"{path} mixes rows of 2 formats: {path}:1 is messages (its columns: messages); {path}:3 is prompt/completion "
        "(its columns: completion, prompt, source). Put the rows of each into a file of its own, and give them all: "
        "[FIRST.jsonl, SECOND.jsonl]"
    )


def test_unknown_columns_are_told_with_what_each_format_needs(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", [{"query": "1+1?", "answer": "2"}])
    message = refusal(path)
    assert message.startswith(f"{path} has the columns answer, query, which fit no format")
    assert "alpaca: instruction, output (optional: history, input, system)" in message
    assert "messages: messages" in message


def test_a_format_of_another_row_type_is_told() -> None:
    assert "Rows of type dialogue or prompt_completion are needed here" in refusal([{"text": "once"}])


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"messages": "hi"}, "messages is text; a list of messages is expected"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [ASK]}, "messages has no turn of the assistant; its roles are user"),
        ({"messages": ["hi"]}, "message 1 of messages is text; an object with role and content is expected"),
        ({"messages": [{"content": "x"}]}, "message 1 of messages has no role"),
        ({"messages": [{"role": 3, "content": "x"}]}, "role of message 1 of messages is a number, not text"),
        ({"messages": [ASK, {"role": "assistant"}]}, "message 2 of messages (assistant) has no content"),
        (
            {"messages": [ASK, {"role": "assistant", "content": " "}]},
            "content of message 2 of messages (assistant) is empty",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
            "content of message 1 of messages (user) is a list; text is expected",
        ),
        (
            {"messages": [dict(ASK, content=[{"type": "text", "text": "?"}, {"type": "image_url"}]), ANSWER]},
            "content of message 1 of messages (user) is a list; text is expected, or parts that are all of type text",
        ),
        ({"messages": [ASK, dict(ANSWER, content="\ud800")]}, "holds half a surrogate pair at character 0"),
        ({"messages": [ASK, ANSWER], "tools": {"name": "add"}}, "tools is an object; a list of objects is expected"),
        ({"messages": [ASK, ANSWER], "tools": "[{"}, "tools is text, but not JSON"),
        ({"instruction": "a", "output": ""}, "output is empty"),
        ({"instruction": 1, "output": "b"}, "instruction is a number; text is expected"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "history must be a list of [question, answer] pairs"),
        ({"prompt": "a", "completion": "\n"}, "completion is empty"),
        ({"prompt": "a", "completion": [ANSWER]}, "prompt and completion are of two kinds"),
        ({"prompt": [ASK], "completion": [ASK]}, "completion has no turn of the assistant"),
    ],
)
def test_a_bad_row_is_told_with_its_place(columns: dict[str, object], reason: str) -> None:
    message = refusal([columns])
    assert "1 of 1 rows cannot be used; mend them, or take them out:" in message
    assert "\n  row 1: " in message
    assert reason in message


def test_a_tool_call_needs_no_content() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {}}}]}
    assert len(read_rows([{"messages": [ASK, call]}], SFT)) == 1


def test_all_bad_rows_of_all_files_are_in_one_error(tmp_path: Path) -> None:
    train = write(tmp_path, "train.jsonl", [{"prompt": "a", "completion": "b"}] + 12 * [{"prompt": "a"}])
    held = write(tmp_path, "eval.json", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}, 3])
    with pytest.raises(DatasetError) as caught:
        read_splits(DataConfig(train=[train], eval=held), SFT, seed=0)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("14 of 16 rows cannot be used")
    assert lines[1] == f"  {train}:2: completion missing; its columns are prompt"
    assert len(lines) == 12
    assert lines[-1] == "  and 4 more"
    assert f"{held}: row 3: the row is a number; an object is expected" in refusal(held)


# -- sources ------------------------------------------------------------------------------------------------------


def test_places_are_lines_of_jsonl_and_rows_of_json(tmp_path: Path) -> None:
    lines = write(tmp_path, "a.jsonl", '{"text": "one\\u2028"}\n\n{"text": "two\u2028"}\r\n')
    array = write(tmp_path, "b.json", [{"text": "one"}, {"text": "two"}])
    rows = read_rows([lines, array], ("text",))
    assert [row.place for row in rows] == [f"{lines}:1", f"{lines}:3", f"{array}: row 1", f"{array}: row 2"]
    assert rows[1].text == "two\u2028"


def test_jsonl_in_a_json_file_is_read(tmp_path: Path) -> None:
    two = write(tmp_path, "a.json", '{"text": "one"}\n{"text": "two"}\n')
    one = write(tmp_path, "b.json", '{"text": "one"}\n')
    assert [row.place for row in read_rows(two, ("text",))] == [f"{two}:1", f"{two}:2"]
    assert len(read_rows(one, ("text",))) == 1


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    path = write(tmp_path, "a.TXT", "\ufeffone\r\n\r\ntwo \n")
    assert read_rows(path, ("text",)) == [Text("one\r\n\r\ntwo \n", place=path)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", "{path} is empty: it holds no rows."),
        ("a.jsonl", b" \n\n", "{path} is empty: it holds no rows."),
        ("a.json", b"[]", "{path} is empty: it holds no rows."),
        ("a.txt", b"\n", "{path} is empty: it holds no rows."),
        ("a.jsonl", b"\x00\x01PK", "{path} is not text: byte 0 is 0. Give a text file in UTF-8."),
        ("a.txt", "one".encode("utf-16"), "{path} is UTF-16 text: save it as UTF-8."),
        ("a.txt", b"one\ntw\xffo", "{path}:2: invalid UTF-8 at byte 6 of the file: save it as UTF-8."),
        ("a.json", b'[{"text": "\xff"}]', "{path}:1: invalid UTF-8 at byte 11 of the file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "{path}:2: invalid UTF-8 at byte 24 of the file"),
        (
            "a.jsonl",
            b'[\n {"text": "a"}\n]\n',
            "{path} holds one array, and not an object in each line: name the file .json",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "{path}:2: broken JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "{path}:2: the row is a list; an object is expected"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "{path}:2: broken JSON: Expecting ':' delimiter at column 9."),
        ("a.json", b'{\n"data": [{"text": "a"}]\n}', "{path} holds an object as a whole: put the rows into an array"),
        ("a.json", b'"text"', "{path} holds text as a whole"),
        ("a.json", b"[" * 100_000, "{path}: JSON that cannot be read"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "{path}:1: JSON that cannot be read"),
        (
            "a.doc",
            b"text\none\n",
            "{path} has the suffix .doc; files that can be read end in .csv, .json, .jsonl, .ndjson, .parq",
        ),
        ("data", b"text", "{path} has no suffix; files that can be read end in"),
    ],
)
def test_a_bad_file_is_told_with_place_and_mend(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = write(tmp_path, name, content)
    assert expected.format(path=path) in refusal(path, ("text",))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    path = write(tmp_path, "train.jsonl", [{"text": "a"}])
    missing = str(tmp_path / "trian.jsonl")
    assert refusal(missing).startswith(f"{missing} does not exist. Did you mean 'train.jsonl'?")
    assert refusal(str(tmp_path)) == f"{tmp_path} is a folder: give a file, or a list of files, for example {path}."


def test_no_rows_and_no_columns_at_all() -> None:
    assert refusal([]) == "The data is an empty list: give at least one file, or one row."
    assert "row 1: the row has no columns" in refusal([{}])


GOOD = json.dumps([{"messages": [ASK, ANSWER], "tools": None}, {"messages": [ASK, ANSWER]}]).encode()
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.sampled_from(["user", "assistant", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "tools", "prompt", "completion"]), inner, max_size=3)
    ),
    max_leaves=8,
)
some_columns = st.dictionaries(
    st.sampled_from(["messages", "tools", "instruction", "output", "input", "history", "prompt", "completion", "text"]),
    json_value,
    max_size=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    suffix=st.sampled_from(["json", "jsonl", "txt", "csv", "parquet"]),
    at=st.integers(0, len(GOOD)),
    noise=st.binary(max_size=4),
)
def test_a_damaged_file_gives_rows_or_one_clear_error(tmp_path: Path, suffix: str, at: int, noise: bytes) -> None:
    path = write(tmp_path, f"a.{suffix}", GOOD[:at] + noise + GOOD[at + 2 :])
    try:
        assert read_rows(path, (*SFT, "text"))
    except DatasetError as error:
        assert path in str(error)  # noqa: PT017 - rows are a good answer too


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(some_columns, max_size=4))
def test_rows_of_any_shape_give_rows_or_one_clear_error(rows: list[dict[str, object]]) -> None:
    try:
        found = read_rows(rows, SFT)
    except DatasetError as error:
        assert str(error).startswith(("The data", f"{str(error)[0]} of {len(rows)} rows"))  # noqa: PT017
    else:
        assert len(found) == len(rows)


# -- held-out share -----------------------------------------------------------------------------------------------


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"text {n}"} for n in range(count)]


def split(count: int, share: float, seed: int) -> Splits:
    return read_splits(DataConfig(train=texts(count), eval=share), ("text",), seed=seed)


def test_held_out_rows_are_disjoint_cover_all_and_depend_on_the_seed_alone() -> None:
    one, again, other = split(50, 0.2, 7), split(50, 0.2, 7), split(50, 0.2, 8)
    assert one == again
    assert one.eval is not None
    assert len(one.eval) == 10
    assert {row.place for row in one.train}.isdisjoint(row.place for row in one.eval)
    assert sorted(row.text for row in one.train + one.eval) == sorted(row["text"] for row in texts(50))
    assert other.eval != one.eval


def test_held_out_rows_of_a_seed_are_the_same_in_every_release() -> None:
    held = split(20, 0.25, 42).eval
    assert held is not None
    assert [row.place for row in held] == ["row 1", "row 2", "row 5", "row 11", "row 18"]


def test_the_end_of_a_single_document_is_held_out(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "abcdefghij" * 10)
    splits = read_splits(DataConfig(train=path, eval=0.1), ("text",), seed=0)
    assert splits.train == [Text("abcdefghij" * 9, place=path)]
    assert splits.eval == [Text("abcdefghij", place=f"{path} from character 90")]
    assert splits.notices == [
        "data.eval=0.1 is less than one document: the end of the document is held out, 10 characters."
    ]


def test_too_few_rows_to_hold_one_out() -> None:
    row = {"prompt": "a", "completion": "b"}
    with pytest.raises(DatasetError, match=r"which has 1 row. Give at least 2 rows, or a file as data.eval"):
        read_splits(DataConfig(train=[row], eval=0.5), SFT, seed=0)
    splits = read_splits(DataConfig(train=[row] * 3, eval=0.1), SFT, seed=0)
    assert (len(splits.train), len(splits.eval or [])) == (2, 1)
    assert splits.notices == ["data.eval=0.1 of 3 rows is less than one row: 1 row is held out."]
    with pytest.raises(DatasetError, match="too short to hold a share of it out"):
        read_splits(DataConfig(train=[{"text": "a"}], eval=0.1), ("text",), seed=0)


def test_evaluation_from_a_file_and_none() -> None:
    splits = read_splits(DataConfig(train=texts(3), eval=texts(1)), ("text",), seed=0)
    assert (len(splits.train), len(splits.eval or [])) == (3, 1)
    assert read_splits(DataConfig(train=texts(3)), ("text",), seed=0).eval is None


def test_training_data_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match=r"data.train is missing: give a file"):
        read_splits(DataConfig(), SFT, seed=0)
