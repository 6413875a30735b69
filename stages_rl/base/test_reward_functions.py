"""The rewards that come with llmtk, against closed forms, hand-written cases and solutions that people have marked."""

from __future__ import annotations

import json
import re
import sys
import tomllib
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from llmtk_rl import reward_functions
from llmtk_rl.reward_functions import ExactMatch, Format, Length, Math, Numeric, Repetition, number_in
from llmtk_rl.rewards import Rewards, Sample
from pydantic import ValidationError

from llmtk import ConfigurationError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHARED = ROOT.parent / "shared" / "data"


def real(name: str) -> list[dict[str, Any]]:
    if not (SHARED / name).exists():
        pytest.skip(f"{name} is not in {SHARED.name}/: real data that only the developers' machines have")
    return [json.loads(line) for line in (SHARED / name).read_text().splitlines()]


def made(reward: Any, **options: Any) -> Any:
    return reward(reward.Options(**options))


def test_exact_match_is_of_text_but_for_white_space_around_it() -> None:
    same = made(ExactMatch)
    assert same([" 85\n", "085", "It is 85", ""], answer=["85", "85", "85", ""]) == [1, 0, 0, 1]
    assert same([[{"role": "assistant", "content": "85"}]], answer=[85]) == [1]
    other = made(ExactMatch, column="solution")
    assert other.columns == ["solution"]
    assert other(["a"], solution=["a"]) == [1]
    with pytest.raises(ValueError, match="column 'answer' is null"):
        same(["a"], answer=[None])


def test_format_matches_all_or_a_part() -> None:
    think = r"(?s)<think>.*?</think>\s*\S.*"
    completions = ["<think>a\nb</think>\nc", "so <think>a</think> c", "<think>a</think>"]
    assert made(Format, pattern=think)(completions) == [1, 0, 0]
    assert made(Format, pattern=think, match="search")(completions) == [1, 1, 0]
    assert made(Format, pattern="^b$", match="search")(["a\nb"]) == [0]
    assert made(Format, pattern="(?m)^b$", match="search")(["a\nb"]) == [1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("72", 72),
        ("so 5 and then 72.", 72),
        ("It costs $1,234.50!", Fraction("1234.5")),
        ("-$3", -3),
        ("$-3", -3),
        ("x = −3", -3),
        ("10-5", 5),
        ("- 5 eggs", 5),
        ("50%", 50),
        ("3/4", Fraction(3, 4)),
        ("3 / 4.", Fraction(3, 4)),
        ("1/2.5", Fraction("2.5")),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("1e-3", Fraction(1, 1000)),
        ("1,2,3", 3),
        ("1,234,567", 1234567),
        ("12,34", 34),
        ("2 of 3\n#### 72\nThe next has 5", 72),
        ("#### $1,000 in 2 years", 1000),
        ("####", None),
        (r"\boxed{5} or \boxed{72} of 100", 72),
        (r"\boxed{\frac{3}{4}} is above 0.7", Fraction(3, 4)),
        (r"\boxed{x = \dfrac{-3}{4}}", Fraction(-3, 4)),
        (r"\boxed{x} where x is 5", None),
        (r"\boxed{7", 7),
        (r"\$72", 72),
        ("3/0", None),
        ("none", None),
        ("", None),
        ("9" * 5000, None),
        ("1e99999", 99999),
    ],
)
def test_the_number_that_a_text_ends_in(text: str, number: Any) -> None:
    assert number_in(text) == number


def test_numbers_are_equal_by_value() -> None:
    numeric = made(Numeric)
    right = ["#### 72"] * 5
    assert numeric(["72.0", "$72", "144/2", "72.001", "no"], answer=right) == [1, 1, 1, 0, 0]
    assert made(Numeric, tolerance=0.01)(["72.001", "72.1"], answer=[72, 72.0]) == [1, 0]
    with pytest.raises(ValueError, match="column 'answer' holds no number: 'many'"):
        numeric(["1"], answer=["many"])


def test_every_answer_of_gsm8k_holds_its_number() -> None:
    for row in real("gsm8k_train_3000.jsonl"):
        marked = row["answer"].rpartition("#### ")[2]
        assert number_in(row["answer"]) == Fraction(marked.replace(",", ""))


def test_solutions_that_people_have_marked_get_the_same_mark() -> None:
    """Each of four models' solutions ends in `A: 18`, and so does the true one."""
    rows = real("gsm8k_model_solutions_600.jsonl")
    answers = [row["ground_truth"] for row in rows]
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        solutions = [row[model]["solution"] for row in rows]
        marks = made(Numeric, column="ground_truth")(solutions, ground_truth=answers)
        agree = sum(mark == row[model]["is_correct"] for mark, row in zip(marks, rows, strict=True))
        assert agree == len(rows), model


def test_expressions_are_equal_as_mathematics() -> None:
    pytest.importorskip("math_verify", reason="math-verify is an extra: pip install 'llmtk-rl[math]'")
    same = made(Math)
    completions = [r"The answer is $\frac{2}{4}$.", r"\boxed{0.5}", r"\boxed{\{2, 1\}}", "1/3", "", r"\boxed{\frac{1}{"]
    answers = [r"\frac{1}{2}", "$1/2$", r"$\{1, 2\}$", r"\frac{1}{2}", "2", "2"]
    assert same(completions, answer=answers) == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="column 'answer' holds no expression: ''"):
        same(["1"], answer=[""])
    assert made(Math, seconds=1)([r"\boxed{9^{9^{9^9}}}"], answer=["2"]) == [0], "it takes too long"


def test_math_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'llmtk-rl\[math\]'"):
        made(Math)


@pytest.mark.parametrize(("tokens", "penalty"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (100, -1), (101, -1)])
def test_overlong_completions_are_punished_as_in_dapo(tokens: int, penalty: float) -> None:
    length = made(Length, max_tokens=100, buffer_tokens=20)
    assert length([[0] * tokens]) == [pytest.approx(penalty)]


def test_lengths_without_a_buffer_and_with_a_target() -> None:
    ids = [[0] * n for n in (0, 5, 10, 11, 15, 40)]
    assert made(Length, max_tokens=10)(ids) == [0, 0, 0, -1, -1, -1]
    assert made(Length, target_tokens=10)(ids) == [-1, -0.5, 0, -0.1, -0.5, -1]
    with pytest.raises(ValidationError, match="not both"):
        Length.Options(max_tokens=5, target_tokens=5)
    with pytest.raises(ValidationError, match="which must be more"):
        Length.Options(max_tokens=5, buffer_tokens=6)


def test_repetition_is_the_share_of_ngrams_said_before() -> None:
    ids = [[1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1], [1], []]
    assert made(Repetition, n=2)(ids) == [0, -0.75, -0.5, 0, 0]
    assert made(Repetition)([[1, 2, 3] * 3]) == [pytest.approx(3 / 7 - 1)]


def test_the_page_on_rewards_names_every_reward_and_option() -> None:
    entries = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]["entry-points"]["llmtk.rewards"]
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs" / "rewards.md").read_text(), re.MULTILINE)
    told = {name: set(re.findall(r"`(\w+)", options)) for name, options in rows}
    for name, value in entries.items():
        options = getattr(reward_functions, value.partition(":")[2]).Options
        assert told[name] == set(options.model_fields)


def test_the_examples_of_the_page_on_rewards_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "rewards.md").read_text(), re.DOTALL)
    (tmp_path / "reward.py").write_text("\n".join(blocks))
    file = {"file": str(tmp_path / "reward.py")}
    specs = [file | {"function": "score"}, file | {"function": "Contains", "text": "8"}]
    rewards = Rewards(specs, section="grpo")
    columns = {"answer": "85", "worth": 3}
    found = rewards([Sample([], completion, [], [], columns, "row 1") for completion in ("It is 85", "84", "no")])
    assert found.tolist() == [[1, 3], [-0.1, 3], [-0.1, 0]]
    rewards.close()


def test_all_are_found_by_name_and_run_in_their_processes() -> None:
    """As installed: this test needs the distribution's entry points."""
    specs: list[Any] = [
        "exact_match",
        {"name": "format", "pattern": r"\d+"},
        {"name": "length", "target_tokens": 2},
        "numeric",
        "repetition",
    ]
    rewards = Rewards(specs, section="grpo")
    found = rewards([Sample("1+1=", "2.0", [1], [5, 6], {"answer": "2"}, "row 1")])
    assert rewards.names == ["exact_match", "format", "length", "numeric", "repetition"]
    assert found.tolist() == [[0, 0, 0, 1, 0]]
    rewards.close()
