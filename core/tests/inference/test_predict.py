"""Predictions of files: which rows can be asked, what is written, and how a call that was stopped goes on."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtk import ConfigurationError, DatasetError, LlmtkError, Sampling
from llmtk.cli.predict import command
from llmtk.data.rows import Dialogue, Labelled, Pair, Prompt, Text
from llmtk.demo import addition
from llmtk.inference import LanguageModel
from llmtk.inference.predictions import beginning_of, open_output, predict
from llmtk.inference.prompts import prompts_of, read_prompts

ASK, SAY = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
Llmtk = Callable[..., tuple[int, str, str]]
SETTINGS = ("--temperature", "0", "--max-new-tokens", "6")


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> str:
    """Eleven sums, with their answers."""
    problems = addition.problems("held-out", 11)
    return write(
        tmp_path / "rows.jsonl", [{"question": p.prompt, "answer": p.answer, "id": n} for n, p in enumerate(problems)]
    )


@pytest.mark.parametrize(
    ("row", "beginning"),
    [
        ({"prompt": "1+1=", "answer": "2", "id": 7}, {"prompt": "1+1=", "answer": "2", "id": 7}),
        ({"question": "1+1=", "id": 7}, {"prompt": [ASK], "id": 7}),
        ({"messages": [ASK, SAY], "id": 7}, {"prompt": [ASK], "answer": "2", "id": 7}),
        ({"messages": [ASK, SAY, ASK]}, {"prompt": [ASK, SAY, ASK]}),
        ({"messages": [ASK], "tools": [{"name": "add"}]}, {"prompt": [ASK], "tools": [{"name": "add"}]}),
        ({"instruction": "1+1=", "output": "2"}, {"prompt": [ASK], "answer": "2"}),
        ({"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1=", "reference": "2"}),
        ({"prompt": [ASK], "completion": [SAY]}, {"prompt": [ASK], "reference": [SAY]}),
        ({"prompt": "1+1=", "messages": [ASK, SAY]}, {"prompt": [ASK], "answer": "2"}),
    ],
)
def test_rows_that_can_be_asked(tmp_path: Path, row: Any, beginning: Any) -> None:
    rows, are_questions = read_prompts(write(tmp_path / "rows.jsonl", [row]))
    assert not are_questions
    assert beginning_of(rows[0]) == beginning


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a"}, "Rows of type unanswered are needed"),
        ({"messages": [SAY]}, "rows.jsonl:1: messages hold the assistant's turn alone"),
        ({"prompt": ""}, "rows.jsonl:1: prompt is empty"),
        ({"messages": [{"role": "user"}]}, "rows.jsonl:1: message 1 of messages .user. has no content"),
    ],
)
def test_bad_rows_are_named_before_a_model_is_loaded(tmp_path: Path, llmtk: Llmtk, row: Any, said: str) -> None:
    file = write(tmp_path / "rows.jsonl", [row])
    code, _, err = llmtk("predict", str(tmp_path / "no-model"), "--data", file, "--output", str(tmp_path / "out"))
    assert code == 2
    with pytest.raises(DatasetError, match=said):
        read_prompts(file)
    assert "no-model" not in err
    assert not (tmp_path / "out").exists()


def test_a_stages_rows_are_asked_with_what_they_should_be_answered_with() -> None:
    tools = [{"name": "add"}]
    rows = [
        Prompt("1+1=", {"id": 7}),
        Dialogue([ASK, SAY], tools),
        Pair([ASK], [SAY], [ASK]),
        Labelled("1+1=", "2", label=True),
        Labelled("1+1=", "3", label=False),
    ]
    assert [(row.prompt, row.columns) for row in prompts_of(rows)] == [
        ("1+1=", {"id": 7}),
        ([ASK], {"answer": "2"}),
        ([ASK], {"reference": [SAY]}),
        ("1+1=", {"reference": "2"}),
        ("1+1=", {}),
    ]
    assert prompts_of(rows)[1].tools == tools
    with pytest.raises(DatasetError, match=r"rows\.txt: a row of type text cannot become one of prompt"):
        prompts_of([Text("a", place="rows.txt")])


def test_a_line_a_row_in_their_order(tmp_path: Path, data: str, loaded: LanguageModel, llmtk: Llmtk) -> None:
    out = tmp_path / "out.jsonl"
    code, printed, err = llmtk("predict", "builtin", "--data", data, "--output", str(out), *SETTINGS)
    assert code == 0, err
    found = lines(out)
    assert [line["id"] for line in found] == list(range(11))
    questions = [line["prompt"][0]["content"] for line in found]
    assert [line["completion"] for line in found] == loaded.answer(questions, temperature=0.0, max_new_tokens=6)
    assert {line["stopped"] for line in found} == {"stop"}
    assert list(found[0]) == ["prompt", "answer", "id", "completion", "stopped"]
    assert "11/11 rows" in err
    assert printed == "" or "11 of 11 rows" in printed


def test_several_completions_stand_in_a_list(tmp_path: Path, data: str, loaded: LanguageModel, llmtk: Llmtk) -> None:
    out = tmp_path / "out.jsonl"
    assert llmtk("predict", "builtin", "--data", data, "--output", str(out), "-n", "3", "--max-new-tokens", "2")[0] == 0
    for line in lines(out):
        assert len(line["completions"]) == len(line["stopped"]) == 3
        assert "completion" not in line


def rows_of(data: str) -> list[Prompt]:
    return read_prompts(data)[0]


def whole(model: LanguageModel, data: str, file: Path, **settings: Any) -> bytes:
    """Return what a call that nothing stops writes."""
    with open_output(str(file)) as output:
        predict(model, rows_of(data), model.sampling(max_new_tokens=6, **settings), output)
    return file.read_bytes()


@pytest.mark.parametrize("left", [0, 1, 5, 11])
def test_a_call_that_was_stopped_goes_on_to_the_same_file(
    tmp_path: Path, data: str, model: LanguageModel, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampled at temperature 1: a row's draws are its own. Half a row at the end is cut off."""
    expected = whole(model, data, tmp_path / "whole.jsonl", seed=3)
    kept = expected.split(b"\n")
    out = tmp_path / "out.jsonl"
    out.write_bytes(b"".join(line + b"\n" for line in kept[:left]) + kept[left][:20])
    written: list[int] = []
    real = model.generate
    monkeypatch.setattr(model, "generate", lambda prompts, *more: written.append(len(prompts)) or real(prompts, *more))
    told: list[int] = []
    with open_output(str(out), resume=True) as output:
        predict(model, rows_of(data), model.sampling(max_new_tokens=6, seed=3, batch_size=1), output, told.append)
    assert out.read_bytes() == expected
    assert sum(written) == 11 - left
    assert told[0] == left
    assert told[-1] == 11


def test_other_seeds_give_other_completions(tmp_path: Path, data: str, model: LanguageModel) -> None:
    assert whole(model, data, tmp_path / "a.jsonl", seed=1) != whole(model, data, tmp_path / "b.jsonl", seed=2)


def test_ctrl_c_leaves_whole_rows_and_says_how_to_go_on(
    tmp_path: Path, data: str, loaded: LanguageModel, llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loaded.generate, []

    def stopped(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(loaded, "generate", stopped)
    out = tmp_path / "out.jsonl"
    code, _, err = llmtk("predict", "builtin", "--data", data, "--output", str(out), "--batch-size", "1", *SETTINGS)
    assert (code, f"{out} holds 4 of 11 rows; go on with --resume" in err) == (130, True), err
    assert len(lines(out)) == 4


def test_an_output_is_neither_overwritten_nor_mixed(
    tmp_path: Path, data: str, loaded: LanguageModel, llmtk: Llmtk
) -> None:
    out = tmp_path / "out.jsonl"
    words = ("predict", "builtin", "--output", str(out), *SETTINGS)
    assert llmtk(*words, "--data", data)[0] == 0
    before = out.read_bytes()
    other = write(tmp_path / "other.jsonl", [{"question": "1+2="}] * 11)
    short = write(tmp_path / "short.jsonl", [{"question": "1+2="}])
    cases = [
        (("--data", data), "exists already, with 11 rows. Go on with it: --resume"),
        (("--data", other, "--resume"), "out.jsonl:1 answers another row"),
        (("--data", short, "--resume"), "holds 11 rows, and the data has 1"),
        (("--data", data, "--resume", "-n", "2"), "out.jsonl:1 holds 1 completions, not 2"),
    ]
    for more, said in cases:
        code, _, err = llmtk(*words, *more)
        assert (code, said in err) == (2, True), err
    assert llmtk(*words, "--data", data, "--resume")[0] == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "line", ["{", "[1]", "7", '"completion"', '{"completion": "a"}', '{"completions": 3, "stopped": 1}']
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "out").write_text(f"{line}\n")
    with (
        pytest.raises(ConfigurationError, match="out:1 is no line of predictions"),
        open_output(str(tmp_path / "out"), resume=True),
    ):
        pass
    assert (tmp_path / "out").read_text() == f"{line}\n"


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigurationError, match="cannot be written: No such file"),
        open_output(str(tmp_path / "no" / "out")),
    ):
        pass
    with pytest.raises(ConfigurationError, match="cannot be written: Is a directory"), open_output(str(tmp_path)):
        pass
    with (tmp_path / "out").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(ConfigurationError, match="written to by another process"),
            open_output(str(tmp_path / "out")),
        ):
            pass


def test_a_full_disk_is_said_with_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.open

    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        return real(Path("/dev/full"), "w", **more) if mode == "a+" else real(path, mode, **more)

    monkeypatch.setattr(Path, "open", full)
    out = str(tmp_path / "out")
    (tmp_path / "out").touch()
    with pytest.raises(LlmtkError, match=r"No space left.*first 0 rows stand.*--resume"), open_output(out) as output:
        output.write([{"completion": "a"}])


@pytest.mark.parametrize("columns", [{"stopped": 1}, {"completions": []}, {"completion": "a", "reference": "b"}])
def test_a_column_that_the_output_needs_is_refused(columns: Any) -> None:
    with pytest.raises(DatasetError, match="here: the output has a column"):
        beginning_of(Prompt("a", columns, place="here"))


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ("1+1=\n\n 2+2= \n", [[ASK], [{"role": "user", "content": "2+2="}]]),
        ('\n{"prompt": "a"}\n\n{"question": "1+1="}', None),
        ('{"prompt": "a"}\n{"prompt": "b"}', ["a", "b"]),
    ],
)
def test_standard_input_is_json_lines_or_a_question_a_line(
    loaded: LanguageModel, llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch, given: str, prompts: Any
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    code, out, err = llmtk("predict", "builtin", "--data", "-", "--max-new-tokens", "1")
    if prompts is None:
        assert code == 2
        assert "mixes rows of 2 formats" in err
    else:
        assert code == 0, err
        assert [json.loads(line)["prompt"] for line in out.splitlines()] == prompts


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b" \n", "standard input is empty"),
        (b"a\xff", "invalid UTF-8 at byte 1"),
        (b'{"a": 1}\n{', "line 2: broken JSON"),
    ],
)
def test_bad_standard_input(llmtk: Llmtk, monkeypatch: pytest.MonkeyPatch, given: bytes, said: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(given)))
    code, _, err = llmtk("predict", "builtin", "--data", "-")
    assert (code, said in err) == (2, True), err


def test_a_text_file_has_a_question_a_line(tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("one?\n\ntwo?\n")
    rows, are_questions = read_prompts(str(tmp_path / "questions.txt"))
    assert are_questions
    assert [(row.prompt, row.place[-4:]) for row in rows] == [("one?", "xt:1"), ("two?", "xt:3")]


OPTIONS = {
    "n": (("-n", "2"), 2),
    "max_new_tokens": (("--max-new-tokens", "3"), 3),
    "temperature": (("--temperature", "0.5"), 0.5),
    "top_k": (("--top-k", "4"), 4),
    "top_p": (("--top-p", "0.9"), 0.9),
    "min_p": (("--min-p", "0.1"), 0.1),
    "repetition_penalty": (("--repetition-penalty", "1.5"), 1.5),
    "stop_tokens": (("--stop-token", "<|im_end|>", "--stop-token", "5"), ("<|im_end|>", "5")),
    "stop_strings": (("--stop", "a", "--stop", "b"), ("a", "b")),
    "seed": (("--seed", "7"), 7),
    "batch_size": (("--batch-size", "2"), 2),
}


def test_every_setting_of_sampling_has_an_option() -> None:
    assert OPTIONS.keys() == {field.name for field in dataclasses.fields(Sampling)}
    assert OPTIONS.keys() <= {option.name for option in command.params}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_reach_the_engine(
    name: str, loaded: LanguageModel, llmtk: Llmtk, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sampling] = []

    def stop(prompts: Any, sampling: Sampling, *more: Any) -> Any:
        asked.append(sampling)
        raise LlmtkError("enough")

    monkeypatch.setattr(loaded, "generate", stop)
    words, value = OPTIONS[name]
    assert llmtk("predict", "builtin", "--data", data)[0] == 1
    assert llmtk("predict", "builtin", "--data", data, *words)[0] == 1
    if name == "stop_tokens":
        value = tuple(loaded.tokenizer.convert_tokens_to_ids(list(value)))
    assert asked[1] == dataclasses.replace(asked[0], **{name: value}) != asked[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--temperature", "-1"), "temperature and top_k at 0"),
        (("--top-p", "0"), "0 < top_p <= 1"),
        (("--stop", ""), "stop_strings are texts, none of them empty"),
        (("--stop-token", "nosuch"), "builtin has no such token"),
        (("--reference", "nosuch"), "no row has such a column; there are prompt, answer, id"),
        (("--metric", "nosuch"), "Unknown metric 'nosuch'"),
        (("--metric", "nosuch.a=1"), "Unknown metric 'nosuch'"),
        (("--metric", "nosuch=1"), "an option is written NAME.OPTION=VALUE"),
        (("--resume",), "--resume needs --output, a file"),
        (("--json",), "--json needs --output, a file"),
        (("--template", "nosuch"), "--template=nosuch is neither a file nor the name of a template"),
    ],
)
def test_wrong_words_are_bad_input(data: str, llmtk: Llmtk, words: Any, said: str) -> None:
    code, out, err = llmtk("predict", "builtin", "--data", data, *words)
    assert (code, out) == (2, "")
    assert said in err


def test_metrics_are_printed_where_there_is_a_reference(
    tmp_path: Path, data: str, loaded: LanguageModel, llmtk: Llmtk, install: Any
) -> None:
    install("same", "lengths", "judged")
    words = ("predict", "builtin", "--data", data, *SETTINGS)
    right = [line["answer"] for line in map(json.loads, Path(data).read_text().splitlines())]
    code, out, err = llmtk(*words, "--output", str(tmp_path / "a.jsonl"))
    said = [line["completion"] for line in lines(tmp_path / "a.jsonl")]
    same = sum(map(str.__eq__, said, right)) / 11
    assert (code, out.splitlines()[0]) == (0, "11 of 11 rows beside 'answer'"), err
    assert f"same    {same:.4f}" in out
    assert "wanted" in out

    code, out, _ = llmtk(*words, "--output", str(tmp_path / "a.jsonl"), "--resume", "--metric", "same", "--json")
    assert json.loads(out) == {"rows": 11, "reference": "answer", "measured": 11, "metrics": {"same": same}}
    code, out, _ = llmtk(
        *words, "--output", str(tmp_path / "b.jsonl"), "--reference", "id", "--metric", "lengths", "--json"
    )
    assert json.loads(out)["metrics"]["wanted"] == len("012345678910")
    code, out, err = llmtk(*words)  # to stdout, where metrics would be in the way
    assert len(out.splitlines()) == 11
    assert f"same    {same:.4f}" in err


def test_without_a_reference_or_a_metric_there_is_none(
    tmp_path: Path, loaded: LanguageModel, llmtk: Llmtk, install: Any, data: str
) -> None:
    install()
    code, out, err = llmtk("predict", "builtin", "--data", data, "--output", str(tmp_path / "a.jsonl"), *SETTINGS)
    assert (code, out) == (0, "")
    assert "No metric of text is installed to measure them against 'answer'" in err
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "a"}])
    code, out, err = llmtk("predict", "builtin", "--data", bare, "--output", str(tmp_path / "b.jsonl"), *SETTINGS)
    assert (code, out, err.count("\n")) == (0, "", 1)
