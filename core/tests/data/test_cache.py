"""Tokens are kept under a hash of all that they follow from, and found again only where all of that is the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import PromptCompletion, cache
from llmtk.data.cache import encode_once

ROWS = [PromptCompletion("ab", "cdef", place="a.jsonl:1"), PromptCompletion("abcdef", "g", place="a.jsonl:2")]
CONFIG = DataConfig(max_length=5, cache=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTK_CACHE", str(tmp_path))
    return tmp_path / "tokens"


@pytest.fixture
def tokenizer(make_tokenizer: Any) -> Any:
    return make_tokenizer(["</s>"], eos_token="</s>")


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_rows_are_tokenised_once(folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, report = encode_once(ROWS, tokenizer, CONFIG, pytest.fail)
    monkeypatch.setattr(cache, "encode", lambda *_: pytest.fail("tokenised again"))
    again, same = encode_once(ROWS, tokenizer, CONFIG, pytest.fail)
    assert again[:] == first[:]
    assert again.features == first.features
    assert same == report
    assert same.notices == [
        "Rows cut at max_length, 5 tokens: 1.",
        "Rows left out, no target within max_length, 5: 1 (a.jsonl:2).",
    ]
    assert len(files(folder)) == 1


def test_anything_else_is_tokenised_anew(folder: Path, tokenizer: Any, make_tokenizer: Any) -> None:
    others = [
        (ROWS, tokenizer, CONFIG),
        (ROWS[:1], tokenizer, CONFIG),
        ([replace(ROWS[0], place="b.jsonl:1"), ROWS[1]], tokenizer, CONFIG),
        (ROWS, make_tokenizer(["</s>"], [("a", "b")], eos_token="</s>"), CONFIG),
        (ROWS, tokenizer, DataConfig(max_length=6, cache=True)),
        (ROWS, tokenizer, DataConfig(max_length=5, cache=True, truncation_side="left")),
        (ROWS, tokenizer, DataConfig(max_length=5, cache=True, loss_on="everything")),
        (ROWS, tokenizer, DataConfig(max_length=5, cache=True, max_prompt_length=1)),
    ]
    for number, (rows, with_tokenizer, config) in enumerate(others, start=1):
        encode_once(rows, with_tokenizer, config, pytest.fail)
        assert len(files(folder)) == number


def test_a_template_counts(folder: Path, chatml_tokenizer: Any) -> None:
    from llmtk.data import read_rows

    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = read_rows([{"messages": asked}], ("dialogue",))
    template = (
        "{% for m in messages %}{{ m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    first, _ = encode_once(rows, chatml_tokenizer, DataConfig(cache=True, template="chatml"), pytest.fail)
    path = folder.parent / "own.jinja"
    path.write_text(template)
    other, _ = encode_once(rows, chatml_tokenizer, DataConfig(cache=True, template=str(path)), pytest.fail)
    assert first[:] != other[:]


def test_few_rows_are_not_kept_unless_it_is_asked_for(
    folder: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_once(ROWS, tokenizer, DataConfig(), pytest.fail)
    assert files(folder) == []
    monkeypatch.setattr(cache, "LEAST_ROWS", 2)
    encode_once(ROWS, tokenizer, DataConfig(cache=False), pytest.fail)
    assert files(folder) == []
    encode_once(ROWS, tokenizer, DataConfig(), pytest.fail)
    assert len(files(folder)) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_file_is_told_and_made_anew(folder: Path, tokenizer: Any, damage: Any) -> None:
    first, _ = encode_once(ROWS, tokenizer, CONFIG, pytest.fail)
    [file] = files(folder)
    file.write_bytes(damage(file.read_bytes()))
    said: list[str] = []
    assert encode_once(ROWS, tokenizer, CONFIG, said.append)[0][:] == first[:]
    assert said[0].startswith(f"{file} cannot be read")
    assert encode_once(ROWS, tokenizer, CONFIG, pytest.fail)[0][:] == first[:]


def test_a_folder_that_cannot_be_written_is_told(folder: Path, tokenizer: Any) -> None:
    folder.write_text("a file")
    said: list[str] = []
    assert len(encode_once(ROWS, tokenizer, CONFIG, said.append)[0]) == 1
    assert "The tokens are not kept" in said[0]
