"""Columns by other names, tables, sets of the `datasets` library, the catalog, mixtures and a test split."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from llmtk.config.sections import DataConfig, SourceConfig
from llmtk.data import Dialogue, Labelled, Pair, Prompt, PromptCompletion, Text, read_rows, read_splits
from llmtk.data.reading import check_sources
from llmtk.errors import ConfigurationError, DatasetError

SFT = ("dialogue", "prompt_completion")
ROWS = [{"question": f"{n}+1?", "answer": str(n + 1)} for n in range(4)]
NAMED = {"question": "prompt", "answer": "completion"}


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(config: DataConfig, row_types: tuple[str, ...] = SFT) -> list[Any]:
    return list(read_splits(config, row_types, seed=0).train)


def refusal(config: DataConfig, row_types: tuple[str, ...] = SFT) -> str:
    with pytest.raises((DatasetError, ConfigurationError)) as caught:
        read(config, row_types)
    return str(caught.value)


# -- columns ------------------------------------------------------------------------------------------------------


def test_columns_are_read_under_their_new_names(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ROWS)
    rows = read(DataConfig(train=path, columns=NAMED))
    assert rows[1] == PromptCompletion("1+1?", "2", place=f"{path}:2")
    rows = read(DataConfig(train=path, columns={"question": "instruction", "answer": "output"}))
    assert rows[0].messages == [{"role": "user", "content": "0+1?"}, {"role": "assistant", "content": "1"}]


def test_each_source_has_its_own_columns_or_those_of_all(tmp_path: Path) -> None:
    asked, told = jsonl(tmp_path / "a.jsonl", ROWS), jsonl(tmp_path / "b.jsonl", [{"in": "x", "out": "y"}])
    own = SourceConfig(path=told, columns={"in": "prompt", "out": "completion"})
    assert len(read(DataConfig(train=[asked, own], columns=NAMED))) == 5


def test_a_column_inside_of_an_object_is_named_by_its_path() -> None:
    rows = [{"q": "1+1?", "judged": {"by": {"text": "2", "right": True}}}]
    columns = {"q": "prompt", "judged.by.text": "completion", "judged.by.right": "label"}
    assert read(DataConfig(train=rows, columns=columns), ("labelled",)) == [Labelled("1+1?", "2", True, place="row 1")]


def test_a_column_named_null_is_left_out() -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}], "prompt": "a", "completion": "b"}]
    assert "fit the formats of messages and of prompt/completion" in refusal(DataConfig(train=rows))
    assert read(DataConfig(train=rows, columns={"messages": None})) == [PromptCompletion("a", "b", place="row 1")]


def test_columns_that_have_their_new_names_already_are_left_as_they_are() -> None:
    assert read(DataConfig(train=[{"prompt": "a", "completion": "b"}], columns=NAMED))


def test_a_renamed_column_reaches_rewards_beside_the_others() -> None:
    [row] = read(DataConfig(train=[{"q": "1+1?", "gold": "2"}], columns={"q": "prompt", "gold": "answer"}), ("prompt",))
    assert row == Prompt("1+1?", {"answer": "2"}, place="row 1")


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"questoin": "prompt"}, "has no column questoin, which data.columns names. Did you mean 'question'?"),
        ({"question": "answer"}, "has a column answer already, and data.columns gives this name to question."),
    ],
)
def test_columns_that_cannot_be_renamed(columns: dict[str, str | None], reason: str) -> None:
    assert reason in refusal(DataConfig(train=ROWS, columns=columns))


def test_two_columns_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="several columns are named prompt"):
        DataConfig(train="a.jsonl", columns={"a": "prompt", "b": "prompt"})


def test_the_format_of_a_source(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b", "prompt": "c", "completion": "d"}])

    def source(name: str) -> DataConfig:
        return DataConfig(train=SourceConfig(path=path, format=name))

    assert isinstance(read(source("alpaca"))[0], Dialogue)
    assert isinstance(read(source("prompt/completion"))[0], PromptCompletion)
    assert "there is no format 'alpacca'. Did you mean 'alpaca'?" in refusal(source("alpacca"))
    assert "lacks messages, which the format messages needs" in refusal(source("messages"))
    assert "gives rows of type prompt" in refusal(source("prompt"))


# -- tables -------------------------------------------------------------------------------------------------------


def test_a_table_is_read_by_line(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["prompt", "completion", "label"], ["a, b", 'two\n"lines"', "True"], ["c", "d", "false"]]
        )
    assert read_rows(str(path), ("labelled",)) == [
        Labelled("a, b", 'two\n"lines"', True, place=f"{path}:2"),
        Labelled("c", "d", False, place=f"{path}:4"),
    ]


def test_a_table_with_tabs_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("prompt\tchosen\trejected\tmargin\n1+1?\t2\t3\t0.5\n2+2?\t4\t5\t\n")
    assert read_rows(str(path), ("pair",)) == [
        Pair("1+1?", "2", "3", margin=0.5, place=f"{path}:2"),
        Pair("2+2?", "4", "5", place=f"{path}:3"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "is empty: it holds no rows"),
        ("prompt,completion\n", "is empty: it holds no rows"),
        ("prompt,prompt\na,b\n", ":1: the column 'prompt' stands twice"),
        ("prompt,completion\na\n", ":2: it has 1 cells, and the first line names 2 columns"),
        ("prompt,completion\nx,y\na,\n", ":3: completion missing; its columns are prompt"),
        ('prompt,completion\na,"b\nc,d\n', ":2: broken CSV: a quotation mark in this row is not closed"),
        ('prompt,"completion\na,b\n', ":1: broken CSV: a quotation mark in this row is not closed"),
        ("prompt;completion\na;b\n", ":1: cells are parted by semicolons; a .csv file parts them by commas."),
    ],
)
def test_a_bad_table(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    assert expected in refusal(DataConfig(train=str(path)))


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.Table.from_pylist([{"messages": messages}] * 2), path)
    assert read_rows(str(path), SFT)[1] == Dialogue(messages, place=f"{path}: row 2")
    path.write_bytes(path.read_bytes()[:-10])
    assert "is no Parquet file that can be read" in refusal(DataConfig(train=str(path)))


# -- data sets of the `datasets` library --------------------------------------------------------------------------


def saved(path: Path, *splits: str) -> str:
    from datasets import Dataset, DatasetDict

    sets = {name: Dataset.from_list([{"text": f"{name} {n}"} for n in range(2)]) for name in splits or ("train",)}
    (DatasetDict(sets) if splits else sets["train"]).save_to_disk(str(path))
    return str(path)


def test_a_saved_data_set(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one"), saved(tmp_path / "two", "train", "validation")
    assert read(DataConfig(train=one), ("text",)) == [Text(f"train {n}", place=f"{one}: row {n + 1}") for n in (0, 1)]
    picked = read(DataConfig(train=SourceConfig(path=two, split="validation")), ("text",))
    assert [row.text for row in picked] == ["validation 0", "validation 1"]
    assert f"{two} has the splits train, validation: give one" in refusal(DataConfig(train=two), ("text",))
    assert "leave split out" in refusal(DataConfig(train=SourceConfig(path=one, split="train")), ("text",))
    assert "leave name out" in refusal(DataConfig(train=SourceConfig(path=one, name="x")), ("text",))


def test_a_damaged_saved_data_set(tmp_path: Path) -> None:
    path = saved(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    assert f"{path}: the saved data set cannot be read" in refusal(DataConfig(train=path), ("text",))


def test_a_hub_data_set_by_name_configuration_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked: list[Any] = []

    def load_dataset(path: str, name: str | None = None, **more: Any) -> Any:
        asked.append((path, name, more))
        return Dataset.from_list([{"question": "1+1?", "answer": "2"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = SourceConfig(path="openai/gsm8k", name="main", split="train", revision="v1", columns=NAMED)
    assert read(DataConfig(train=source)) == [PromptCompletion("1+1?", "2", place="openai/gsm8k: row 1")]
    assert asked == [("openai/gsm8k", "main", {"split": "train", "revision": "v1"})]


def test_a_hub_data_set_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (ConnectError)")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    message = refusal(DataConfig(train="openai/gsm8k"))
    assert message.startswith(
        "openai/gsm8k (no such file here, so it was looked for on the hub) cannot be loaded: Couldn't reach"
    )
    assert "Without a network, give a file" in message


def test_a_hub_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    message = refusal(DataConfig(train="no-such/rows"))
    assert message.startswith("no-such/rows does not exist here, and http://127.0.0.1:9 cannot be reached (")
    assert "Without a network, give a file" in message


def test_settings_of_the_hub_are_refused_for_a_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    for key in ("name", "split", "revision"):
        message = refusal(DataConfig(train=SourceConfig(path=path, **{key: "x"})), ("text",))
        assert f"leave {key} out" in message


# -- the catalog --------------------------------------------------------------------------------------------------


def catalog(folder: Path) -> str:
    path = folder / "sets.yaml"
    path.write_text("sums: {path: sums.jsonl, columns: {question: prompt, answer: completion}}\nplain: plain.jsonl\n")
    jsonl(folder / "sums.jsonl", ROWS)
    jsonl(folder / "plain.jsonl", [{"prompt": "a", "completion": "b"}])
    return str(path)


def test_the_catalog_names_data_sets_beside_it(tmp_path: Path) -> None:
    rows = read(DataConfig(train=["sums", "plain"], catalog=catalog(tmp_path)))
    assert [row.place for row in rows] == [
        *(f"{tmp_path}/sums.jsonl:{n}" for n in (1, 2, 3, 4)),
        f"{tmp_path}/plain.jsonl:1",
    ]


def test_what_the_run_says_goes_over_the_catalog(tmp_path: Path) -> None:
    own = SourceConfig(path="sums", columns={"question": "instruction", "answer": "output"}, weight=2)
    splits = read_splits(DataConfig(train=own, catalog=catalog(tmp_path)), SFT, seed=0)
    assert isinstance(splits.train[0], Dialogue)
    assert [source[:2] for source in splits.mixture] == [(4, 2.0)]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("sums: {path: a, colums: {}}", "sums: colums: unknown key. Did you mean columns?"),
        ("sums: 3", "sums: path: expected text, got 3"),
        ("sums: {path: a, weight: 2}", "sums: weight belongs to a run: give it in data.train"),
        ("- a", "a configuration is keys and values"),
    ],
)
def test_a_broken_catalog(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "sets.yaml"
    path.write_text(content)
    assert reason in refusal(DataConfig(train="sums", catalog=str(path)))


def test_an_unknown_name_is_told_with_those_that_are_known(tmp_path: Path) -> None:
    message = refusal(DataConfig(train="sms", catalog=catalog(tmp_path)))
    assert "sms does not exist. Did you mean 'sums'? data.catalog names sums, plain." in message


# -- mixtures and splits ------------------------------------------------------------------------------------------


def test_weights_are_kept_by_source_also_where_rows_are_held_out(tmp_path: Path) -> None:
    a = jsonl(tmp_path / "a.jsonl", [{"text": f"a{n}"} for n in range(10)])
    b = jsonl(tmp_path / "b.jsonl", [{"text": f"b{n}"} for n in range(10)])
    splits = read_splits(DataConfig(train=[SourceConfig(path=a, weight=2), b], eval=0.25), ("text",), seed=3)
    assert [source.weight for source in splits.mixture] == [2, 1]
    first = sum(row.text.startswith("a") for row in splits.train if isinstance(row, Text))
    assert [source.rows for source in splits.mixture] == [first, 15 - first]
    assert read_splits(DataConfig(train=[a, b]), ("text",), seed=3).mixture == []


def test_test_rows_are_held_out_beside_those_to_evaluate() -> None:
    rows = [{"text": f"text {n}"} for n in range(50)]
    splits = read_splits(DataConfig(train=rows, eval=0.2, test=0.1), ("text",), seed=7)
    assert splits.eval is not None
    assert splits.test is not None
    parts = [splits.train, splits.eval, splits.test]
    assert [len(part) for part in parts] == [35, 10, 5]
    assert len({row.place for part in parts for row in part}) == 50
    assert splits.eval == read_splits(DataConfig(train=rows, eval=0.2), ("text",), seed=7).eval


def test_the_end_of_one_document_is_held_out_twice() -> None:
    [row] = [{"text": "abcdefghij" * 10}]
    splits = read_splits(DataConfig(train=[row], eval=0.1, test=0.1), ("text",), seed=0)
    texts = [part[0].text for part in (splits.train, splits.test or [], splits.eval or []) if isinstance(part[0], Text)]
    assert [len(text) for text in texts] == [80, 10, 10]
    assert "".join(texts) == row["text"]


def test_test_rows_from_a_file(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "t"}])
    assert read_splits(DataConfig(train=[{"text": "a"}], test=path), ("text",), seed=0).test == [
        Text("t", place=f"{path}:1")
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"test": 1.5}, "test is a share of the training data between 0 and 1"),
        ({"eval": 0.5, "test": 0.5}, "eval and test hold out 1 of the training data, which leaves none"),
        ({"eval": {"path": "a.jsonl", "weight": 2}}, "eval has a source with a weight"),
        ({"train": [{"path": "a.jsonl", "weight": 0}]}, "greater than 0"),
        ({"train": [{"path": "a.jsonl", "wieght": 2}]}, "wieght"),
    ],
)
def test_splits_that_cannot_be(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        DataConfig(**{"train": "a.jsonl", **settings})


def test_rows_with_a_path_are_rows() -> None:
    rows = [{"text": "a = 1", "path": "a.py"}]
    assert read(DataConfig(train=rows), ("text",)) == [Text("a = 1", place="row 1")]


def test_a_check_names_all_that_is_wrong_in_all_sources(tmp_path: Path) -> None:
    bad = jsonl(tmp_path / "a.jsonl", [{"text": "a"}] + [{"text": ""}] * 15)
    config = DataConfig(train=[bad, str(tmp_path / "none.jsonl")], test=[{"text": 3}])
    found = check_sources(config, ("text",)).bad
    assert [place for place, _ in found] == [*(f"{bad}:{n}" for n in range(2, 17)), "", "row 1"]
    assert "none.jsonl does not exist" in found[15][1]


# -- real files ---------------------------------------------------------------------------------------------------

SUMS = {"question": "instruction", "answer": "output"}
SOLUTIONS = {"question": "prompt", "175b_verification.solution": "completion", "175b_verification.is_correct": "label"}


@pytest.mark.parametrize(
    ("name", "row_types", "columns", "count"),
    [
        ("alpaca_en_demo.json", SFT, {}, 999),
        ("identity.json", SFT, {}, 91),
        ("glaive_toolcall_en_demo.json", SFT, {}, 300),
        ("dpo_en_demo.json", ("pair",), {}, 300),
        ("dpo_en_demo.json", SFT, {}, 300),
        ("kto_en_demo.json", ("labelled",), {}, 300),
        ("gsm8k_train_3000.jsonl", SFT, SUMS, 3000),
        ("gsm8k_test_400.jsonl", SFT, NAMED, 400),
        ("gsm8k_test_400.jsonl", ("prompt",), {}, 400),
        ("gsm8k_model_solutions_600.jsonl", ("labelled",), SOLUTIONS, 600),
        ("c4_demo.jsonl", ("text",), {}, 300),
        ("tinyshakespeare.txt", ("text",), {}, 1),
        ("wiki_demo_400k.txt", ("text",), {}, 1),
    ],
)
def test_real_files_load_unmodified(
    shared_data: Any, name: str, row_types: tuple[str, ...], columns: dict[str, str | None], count: int
) -> None:
    splits = read_splits(DataConfig(train=shared_data(name), columns=columns), row_types, seed=0)
    assert len(splits.train) == count
    assert {row.type for row in splits.train} <= set(row_types)


def test_tool_calls_of_sharegpt_pass_through() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [("human", "1+1?"), ("function_call", json.dumps(call)), ("observation", "2"), ("gpt", "2.")]
    conversations = [{"from": who, "value": said} for who, said in turns]
    [row] = read_rows([{"conversations": conversations, "tools": '[{"name": "add"}]'}], SFT)
    assert row.messages == [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "2."},
    ]
    assert row.tools == [{"type": "function", "function": {"name": "add"}}]


@pytest.mark.parametrize("value", ["add(1)", "{}", "[]", 3])
def test_a_broken_tool_call_of_sharegpt_is_told(value: Any) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]
    with pytest.raises(DatasetError, match="row 1: turn 2 of conversations is a function_call"):
        read_rows([{"conversations": turns}], SFT)
