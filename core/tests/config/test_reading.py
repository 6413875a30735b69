"""Files, overrides and environment variables, and what is said when they are wrong."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmtk.config.reading import merge, parse_overrides, read_file, to_yaml, without_shorthands
from llmtk.errors import ConfigurationError, LlmtkError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "config.yaml"


def read(file: Path, text: str) -> dict[str, Any]:
    file.write_text(text)
    return read_file(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("10", 10),
        ("010", 10),
        ("+3", 3),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("2025-01-01", "2025-01-01"),
        ("1_000", "1_000"),
        ("1e", "1e"),
        ("'5e-7'", "5e-7"),
        ("~", None),
        ("", None),
        ("[1, 5e-7]", [1, 5e-7]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(file: Path, text: str, value: Any) -> None:
    assert read(file, f"key: {text}") == {"key": value}
    assert parse_overrides([f"key={text}"]) == {"key": value}
    assert type(read(file, f"key: {text}")["key"]) is type(value)


def test_anchors_and_merge_keys_work(file: Path) -> None:
    text = "base: &base {a: 1, b: 2}\nother: {<<: *base, b: 3}\n"
    assert read(file, text) == {"base": {"a": 1, "b": 2}, "other": {"a": 1, "b": 3}}


def test_an_empty_file_and_a_byte_order_mark_are_fine(file: Path) -> None:
    assert read(file, "# nothing yet\n") == {}
    file.write_bytes(b"\xef\xbb\xbfstage: sft\n")
    assert read_file(file) == {"stage": "sft"}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nb: 2\na: 3\n", ["line 3", "'a' stands twice", "first in line 1"]),
        ("train:\n  seed: 1\n  seed: 2\n", ["line 3", "'seed' stands twice"]),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", ["line 2", "!!python/object/apply:os.system is refused"]),
        ("a: !!binary aGk=", ["line 1", "!!binary is refused"]),
        ("a: !mine x", ["line 1", "!mine is refused"]),
        ("a: 1\nb: [2", ["line 2", "is not YAML"]),
        ("a:\n\tb: 1", ["line 2", "is not YAML"]),
        ("a: *nowhere", ["line 1", "undefined alias"]),
        ("a: {[1]: 2}", ["line 1", "unhashable key"]),
        ("a: 1\n---\nb: 2", ["line 2", "another document"]),
        ("a: &a [*a]", ["an anchor that contains itself"]),
        ("a: " + "[" * 3000, ["nested too deeply"]),
        ("a: !!int x", ["cannot be read"]),
        ("a: \x00", ["is not YAML"]),
        ("- 1\n- 2", ["keys and values", "holds a list"]),
        ("hello", ["keys and values", "'hello'"]),
    ],
)
def test_a_broken_file_is_one_error_with_its_place(file: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(file, text)
    for part in [str(file), *parts]:
        assert part in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_file_that_cannot_be_read_is_named(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no such configuration file"):
        read_file(file)
    with pytest.raises(ConfigurationError, match="directory"):
        read_file(tmp_path)
    file.write_bytes(b"a: \xff")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        read_file(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${SET}", 5e-7),
        ("'${SET}'", 5e-7),
        ("x-${SET}-${SET}", "x-5e-7-5e-7"),
        ("${UNSET:-3}", 3),
        ("${UNSET:-}", None),
        ("${UNSET:-a b}", "a b"),
        ("${EMPTY:-default}", "default"),
        ("${EMPTY}", None),
        ("${TEXT}", "a: b"),
        ("[x, '${SET}']", ["x", 5e-7]),
        ("$SET", "$SET"),
        ("$${SET}", "${SET}"),
    ],
)
def test_variables_are_filled_in(file: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: Any) -> None:
    for name, filled in {"SET": "5e-7", "EMPTY": "", "TEXT": "a: b"}.items():
        monkeypatch.setenv(name, filled)
    monkeypatch.delenv("UNSET", raising=False)
    assert read(file, f"a:\n  b: {text}") == {"a": {"b": value}}
    assert parse_overrides([f"a.b={text}"]) == {"a": {"b": value}}


def test_an_unset_variable_is_named_with_its_key(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNSET", raising=False)
    with pytest.raises(ConfigurationError) as caught:
        read(file, "data:\n  train: ['${UNSET}/rows']")
    assert str(caught.value) == (
        f"{file}: data.train.0 uses the environment variable UNSET, which is not set. "
        "Set it, or give a default: ${UNSET:-value}."
    )
    with pytest.raises(ConfigurationError, match="the command line: a uses the environment variable UNSET"):
        parse_overrides(["a=${UNSET}"])


def test_overrides_reach_into_sections() -> None:
    given_ = [
        "train.learning_rate=1e-4",
        "data.train=a.jsonl",
        "plugins.early-stop.patience=1",
        "train.seed=3",
        "a=x=y",
    ]
    assert parse_overrides(given_) == {
        "train": {"learning_rate": 1e-4, "seed": 3},
        "data": {"train": "a.jsonl"},
        "plugins": {"early-stop": {"patience": 1}},
        "a": "x=y",
    }
    assert parse_overrides(["a=1", "a=2"]) == {"a": 2}
    assert parse_overrides(["a={b: 1}", "a.c=2"]) == {"a": {"b": 1, "c": 2}}
    assert parse_overrides([]) == {}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed"], "seed: an override is written KEY=VALUE"),
        (["=1"], "=1: the key is incomplete"),
        (["a..b=1"], "a..b=1: the key is incomplete"),
        (["a=[1"], "a=[1, line 1: is not YAML"),
        (["a=!!python/name:os.system"], "is refused"),
        (["a=1", "a.b=2"], "a.b=2: a was given a value of its own"),
    ],
)
def test_a_wrong_override_is_named(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_overrides(overrides)
    assert message in str(caught.value)


def test_merge_goes_key_by_key_and_leaves_its_layers_alone() -> None:
    low, high = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}, "e": Path("x")}
    assert merge(low, high) == {"a": {"b": 1, "c": [3]}, "d": 1, "e": "x"}
    assert low == {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    assert merge({"a": 1}, {"a": {"b": 2}}, {"a": None}) == {"a": None}
    assert merge() == {}


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(st.dictionaries(st.text(), trees))
def test_what_is_written_reads_back(file: Path, tree: dict[str, Any]) -> None:
    try:
        text = to_yaml(tree)
    except ConfigurationError:
        return
    file.write_text(text, encoding="utf-8")
    assert read_file(file) == tree


@quick
@given(st.text() | st.binary())
def test_no_file_gives_anything_but_settings_or_a_clear_error(file: Path, content: str | bytes) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    try:
        settings = read_file(file)
    except LlmtkError:
        return
    assert isinstance(settings, dict)


@quick
@given(st.lists(st.text()))
def test_no_override_gives_anything_but_settings_or_a_clear_error(overrides: list[str]) -> None:
    try:
        settings = parse_overrides(overrides)
    except LlmtkError:
        return
    assert isinstance(settings, dict)


def test_short_sections_are_spelt_out_and_what_is_no_section_is_left_to_the_schema() -> None:
    assert without_shorthands({"model": "base", "data": "a.jsonl", "train": None}) == {
        "model": {"name_or_path": "base"},
        "data": {"train": "a.jsonl"},
        "train": None,
    }
    assert without_shorthands({"data": [{"text": "a"}]}) == {"data": {"train": [{"text": "a"}]}}
    assert without_shorthands({"model": 3, "train": [1]}) == {"model": 3, "train": [1]}
