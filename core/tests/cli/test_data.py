"""data show, data check and data stats, on a stage and a tokenizer made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

MODEL = "model.from_config={model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1}"
TOKENIZER = "model.tokenizer={kind: byte}"


@pytest.fixture
def ask(install: Any, llmtk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs a data command on the toy stage, in an empty folder."""
    install("llmtk-stage-toy", "toy")
    monkeypatch.chdir(tmp_path)

    def run(command: str, *words: str) -> tuple[int, str, str]:
        answer: tuple[int, str, str] = llmtk("data", command, "toy", *words)
        return answer

    return run


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


PAIRS = [{"prompt": "ab", "chosen": "c", "rejected": "d\n"}, {"prompt": "a", "chosen": "b", "rejected": "cd"}]


def test_rows_are_shown_as_the_model_sees_them(ask: Any) -> None:
    write("pairs.jsonl", PAIRS)
    code, out, err = ask("show", MODEL, TOKENIZER, "data.train=pairs.jsonl", "--rows", "1")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "row 1 of 2: pairs.jsonl:1",
        "  prompt, 2 tokens, 0 of them targets",
        "    a·b",
        "  chosen, 2 tokens, 2 of them targets",
        "  > c·<|endoftext|>",
        "  rejected, 3 tokens, 3 of them targets",
        "  > d·⏎·<|endoftext|>",
        "",
    ]
    assert sorted(path.name for path in Path().iterdir()) == ["pairs.jsonl", "site"], "nothing is written"


def test_show_for_scripts(ask: Any) -> None:
    write("rows.jsonl", [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]}])
    words = (MODEL, TOKENIZER, "data.train=rows.jsonl", "data.eval=rows.jsonl", "--split", "eval", "--json")
    code, out, _ = ask("show", *words)
    [row] = json.loads(out)
    [sequence] = row["sequences"]
    assert (code, row["place"], sequence["name"]) == (0, "rows.jsonl:1", "input")
    targets = [token for token, target in zip(sequence["tokens"], sequence["targets"], strict=True) if target]
    assert targets == ["Ã", "©", "<|im_end|>"]
    assert len(sequence["input_ids"]) == len(sequence["tokens"])


def test_a_split_that_is_not_there(ask: Any) -> None:
    write("pairs.jsonl", PAIRS)
    code, _, err = ask("show", MODEL, TOKENIZER, "data.train=pairs.jsonl", "--split", "test")
    assert code == 2
    assert "There is no split test" in err


def test_check_names_every_bad_row_without_a_model(ask: Any) -> None:
    write("pairs.jsonl", PAIRS + [{"prompt": "a", "chosen": "b"}] * 12)
    code, out, _ = ask("check", "data.train=[pairs.jsonl, none.jsonl]")
    lines = out.splitlines()
    assert code == 1
    assert lines[0] == "pairs.jsonl:3: rejected missing; its columns are prompt, chosen"
    assert len(lines) == 14
    assert "none.jsonl does not exist" in lines[12]
    assert lines[-1] == "13 problems in 14 rows."


def test_check_of_good_rows_tokenises_them_where_it_can(ask: Any) -> None:
    write("pairs.jsonl", [*PAIRS, {"prompt": "abcdefghijkl", "chosen": "m", "rejected": "n"}])
    code, out, _ = ask("check", "data.train=pairs.jsonl")
    assert (code, out) == (0, "No problem in 3 rows. Nothing was tokenised: no model is named.\n")
    code, out, _ = ask("check", MODEL, TOKENIZER, "data.train=pairs.jsonl", "data.max_length=8")
    assert code == 0
    assert "Rows left out, no target within max_length, 8: 1 (pairs.jsonl:3)." in out
    assert out.endswith("No problem in 3 rows; as the stage encodes them: 2.\n")


def test_stats(ask: Any) -> None:
    write("pairs.jsonl", [*PAIRS, PAIRS[0]])
    write("eval.jsonl", PAIRS[1:])
    words = (MODEL, TOKENIZER, "data.train=pairs.jsonl", "data.eval=eval.jsonl")
    code, out, _ = ask("stats", *words)
    assert code == 0
    assert out.splitlines() == [
        "train: 3 rows",
        "  20 tokens, 15 of them targets (75.0%)",
        "  6 to 7 tokens a row, the median 7",
        f"    4 to 7  {'█' * 40} 3",
        "  rows that stand there a second time: 1 (pairs.jsonl:3 as pairs.jsonl:1)",
        "eval: 1 row",
        "  6 tokens, 5 of them targets (83.3%)",
        "  6 to 6 tokens a row, the median 6",
        f"    4 to 7  {'█' * 40} 1",
        "  rows that are in train too: 1 (eval.jsonl:1 as pairs.jsonl:2)",
    ]
    found = json.loads(ask("stats", *words, "--json")[1])
    assert found["train"]["targets"] == 15
    assert found["eval"]["in_train"] == [["eval.jsonl:1", "pairs.jsonl:2"]]


def test_a_bad_configuration_is_told_as_ever(ask: Any) -> None:
    code, _, err = ask("stats", MODEL, TOKENIZER, "data.trian=x")
    assert code == 2
    assert "data.trian: unknown key. Did you mean data.train" in err
