"""Rows read block by block are those read at once, from any block on; what cannot be streamed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtk.config.sections import DataConfig
from llmtk.data import Text, files, read_splits, stream
from llmtk.data.stream import check_stream, stream_blocks
from llmtk.errors import ConfigurationError, DatasetError

TEXT = ("text",)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 4)


def write(path: Path, texts: list[str]) -> str:
    """Write a file with one column, as its suffix says; the Parquet file in groups of three rows."""
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    elif path.suffix == ".csv":
        path.write_text("\n\n".join(["text", *(f'"{text}"' for text in texts)]) + "\n")
    else:
        path.write_text("\n\n".join(json.dumps({"text": text}) for text in texts) + "\n")
    return str(path)


@pytest.fixture(params=[".jsonl", ".csv", ".parquet"])
def sources(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    counts = {"a": 6, "b": 4, "c": 1}
    return [
        write(tmp_path / f"{name}{request.param}", [f"{name},\n{n}" for n in range(count)])
        for name, count in counts.items()
    ]


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


def test_row_groups_that_are_passed_over_stay_unread_and_one_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.parquet", [str(n) for n in range(13)])
    asked, sizes = [], []
    iter_batches = pq.ParquetFile.iter_batches

    def counted(self: Any, size: int, row_groups: list[int]) -> Any:
        asked.append(row_groups)
        for part in iter_batches(self, size, row_groups=row_groups):
            sizes.append(len(part))
            yield part

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    monkeypatch.setattr(files, "_ROWS", 2)
    [*_, last] = blocks(DataConfig(train=path, streaming=True), skip=2)
    assert [row.text for row in last] == ["12"]
    # The first block tells the format; the second, of rows 4 to 7, is passed over, with the whole group of rows 6 to 8
    # but for row 8, which is in the third.
    assert asked == [[0], [1], [2], [3], [4]]
    assert max(sizes) == 2
    asked.clear()
    assert len(blocks(DataConfig(train=path, streaming=True), skip=3)) == 1
    assert asked == [[0], [1], [4]]


def test_a_broken_file_is_told_before_it_is_needed_where_its_beginning_is(tmp_path: Path) -> None:
    broken = {
        "a.parquet": (b"PAR1 and no more", "is no Parquet file that can be read"),
        "b.parquet": (b"", "is no Parquet file that can be read"),
        "c.csv": (b"a,a\n1,2\n", "the column 'a' stands twice"),
        "d.csv": (b"", "is empty: it holds no rows"),
        "e.jsonl": (b"\xff\xfe{", "is UTF-16 text"),
    }
    for name, (content, message) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=rf"{name}.*{message}"):
            check_stream(DataConfig(train=str(tmp_path / name), streaming=True))


def test_a_table_that_breaks_further_down(tmp_path: Path) -> None:
    head = "text\n" + "a\n" * 6
    for content, message in (
        (head.encode() + b"\xff\n", r"a\.csv:8: invalid UTF-8 at byte 17 of the file"),
        ((head + '"a\n').encode(), r"a\.csv:8: broken CSV: a quotation mark in this row is not closed"),
    ):
        (tmp_path / "a.csv").write_bytes(content)
        coming = stream_blocks(DataConfig(train=str(tmp_path / "a.csv"), streaming=True), TEXT, lambda _: None)
        assert len(next(coming)) == 4
        with pytest.raises(DatasetError, match=message):
            next(coming)


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
        ConfigurationError, match=r"reads \.csv, \.jsonl, .* files and data sets on the hub, and .*a\.txt is neither"
    ):
        check_stream(DataConfig(train=str(tmp_path / "a.txt"), streaming=True))
    with pytest.raises(DatasetError, match="does not exist"):
        check_stream(DataConfig(train=str(tmp_path / "b.jsonl"), streaming=True))
    write(tmp_path / "b.jsonl", ["a"])
    with pytest.raises(ConfigurationError, match="leave split out"):
        check_stream(DataConfig(train={"path": str(tmp_path / "b.jsonl"), "split": "train"}, streaming=True))
    with pytest.raises(ConfigurationError, match="in place of rows"):
        check_stream(DataConfig(train=[{"text": "a"}], streaming=True))


@pytest.mark.parametrize(
    "settings", [{"eval": 0.1}, {"test": 0.1}, {"train": {"path": "a.jsonl", "weight": 2}}, {"cache": True}]
)
def test_settings_that_a_stream_has_no_use_for(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="streaming: "):
        DataConfig(**{"train": "a.jsonl", "streaming": True, **settings})
