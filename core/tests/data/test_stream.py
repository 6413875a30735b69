"""Rows read block by block are those read at once, from any block on; what cannot be streamed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import Text, read_splits, stream
from llmtk.data.stream import check_stream, stream_blocks
from llmtk.errors import ConfigurationError, DatasetError

TEXT = ("text",)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 4)


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    for name, count in (("a", 6), ("b", 4), ("c", 1)):
        lines = [json.dumps({"text": f"{name}{n}"}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(lines) + "\n")
    return [str(tmp_path / f"{name}.jsonl") for name in "abc"]


def blocks(config: DataConfig, skip: int = 0) -> list[list[Any]]:
    return list(stream_blocks(config, TEXT, lambda _: None, skip))


def test_blocks_hold_the_rows_in_their_order_and_none_crosses_two_sources(sources: list[str]) -> None:
    config = DataConfig(train=sources, streaming=True)
    found = blocks(config)
    assert [len(block) for block in found] == [4, 2, 4, 1]
    whole = read_splits(DataConfig(train=sources), TEXT, seed=0).train
    assert [row for block in found for row in block] == whole


@pytest.mark.parametrize("skip", range(5))
def test_a_stream_goes_on_at_any_block(sources: list[str], skip: int) -> None:
    config = DataConfig(train=sources, streaming=True)
    assert blocks(config, skip) == blocks(config)[skip:]


def test_a_bad_row_is_told_when_its_block_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 5 + '{"text": 3}\n{"text": \n')
    coming = stream_blocks(DataConfig(train=str(path), streaming=True), TEXT, lambda _: None)
    assert len(next(coming)) == 4
    with pytest.raises(DatasetError) as caught:
        next(coming)
    assert f"{path}:6: text is a number; text is expected" in str(caught.value)
    assert f"{path}:7: broken JSON" in str(caught.value)


def test_columns_are_renamed_and_those_not_used_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "a", "url": "u"}\n' * 5)
    said: list[str] = []
    config = DataConfig(train=str(path), streaming=True, columns={"content": "text"})
    found = [row for block in stream_blocks(config, TEXT, said.append) for row in block]
    assert found[4] == Text("a", place=f"{path}:5")
    assert said == [f"{path} is read as text; not used: url."]


def test_a_data_set_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import IterableDataset

    def load_dataset(path: str, name: str | None = None, *, streaming: bool, **_: Any) -> Any:
        assert streaming
        return {"train": IterableDataset.from_generator(lambda: ({"text": str(n)} for n in range(6)))}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    [block] = blocks(DataConfig(train="some/texts", streaming=True), skip=1)
    assert block == [Text("4", place="some/texts: row 5"), Text("5", place="some/texts: row 6")]


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DatasetError, match="is empty: it holds no rows"):
        blocks(DataConfig(train=str(tmp_path / "a.jsonl"), streaming=True))


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(
        ConfigurationError, match=r"reads \.jsonl files and data sets on the hub, and .*a\.txt is neither"
    ):
        check_stream(DataConfig(train=str(tmp_path / "a.txt"), streaming=True))
    with pytest.raises(DatasetError, match="does not exist"):
        check_stream(DataConfig(train=str(tmp_path / "b.jsonl"), streaming=True))
    with pytest.raises(ConfigurationError, match="in place of rows"):
        check_stream(DataConfig(train=[{"text": "a"}], streaming=True))


@pytest.mark.parametrize(
    "settings", [{"eval": 0.1}, {"test": 0.1}, {"train": {"path": "a.jsonl", "weight": 2}}, {"cache": True}]
)
def test_settings_that_a_stream_has_no_use_for(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="streaming: "):
        DataConfig(**{"train": "a.jsonl", "streaming": True, **settings})
