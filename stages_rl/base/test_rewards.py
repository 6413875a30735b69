"""What a configuration may say of rewards, what functions are given, and what happens when one fails for a row."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from llmtk_rl.rewards import RewardOptions, Rewards, Sample, changed_files
from pydantic import ValidationError

from llmtk import ConfigurationError, DatasetError, TrainingError

MakeRewards = Callable[..., Rewards]
MakeSamples = Callable[..., list[Sample]]
DIALOGUE = [{"role": "user", "content": "1+1="}]

# What a completion says is what the function does for it.
OBEDIENT = """
import math
def score(completions):
    rewards = []
    for completion in completions:
        if completion == "raise":
            raise KeyError("x")
        if completion != "forget":
            rewards.append({"nan": math.nan, "inf": math.inf, "none": None, "text": "0.5", "huge": 10**400}
                           .get(completion, len(completion)))
    return rewards
"""


# What functions are given, and what they may return

OF_TEXT = """
def score(prompts, completions, answer, **kwargs):
    return [float(completion == right) for completion, right in zip(completions, answer)]
"""
OF_MESSAGES = """
def score(completions, answer, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if content == right else 0.0 for content, right in zip(contents, answer)]
"""
OF_TOKENS = """
def score(prompts, completions, completion_ids, answer, level=None, **kwargs):
    assert len(kwargs["extra"]) == len(level) == len(completion_ids)
    assert prompts[0][-1]["content"] == "1+1="
    return [1.0 if len(ids) == 1 else 0.0 for ids in completion_ids]
"""
ASYNC = """
import asyncio
async def score(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [float(completion == right) for completion, right in zip(completions, answer)]
"""


@pytest.mark.parametrize(
    ("prompt", "source"),
    [("1+1=", OF_TEXT), (DIALOGUE, OF_MESSAGES), (DIALOGUE, OF_TOKENS), ("1+1=", ASYNC)],
    ids=["text", "messages", "token ids", "async"],
)
def test_a_function_written_for_trl_runs_unchanged(
    of_file: MakeRewards, samples: MakeSamples, prompt: Any, source: str
) -> None:
    batch = samples("2", "11", prompt=prompt, answer="2", level=1, extra="e")
    assert of_file(source)(batch).tolist() == [[1], [0]]


@pytest.mark.parametrize(
    "values",
    ["[True, 0.5]", "np.array([1, 0.5])", "[np.float32(1), np.bool_(0) + 0.5]", "(x for x in (1, 0.5))"],
)
def test_numbers_of_any_kind_come_back(of_file: MakeRewards, samples: MakeSamples, values: str) -> None:
    found = of_file(f"import numpy as np\ndef score(completions): return {values}")(samples("a", "b"))
    assert found.dtype == torch.float64
    assert found.tolist() == [[1], [0.5]]


def test_several_rewards_keep_their_order_names_and_weights(tmp_path: Path, samples: MakeSamples) -> None:
    (tmp_path / "reward.py").write_text("def score(completions): return [len(c) for c in completions]")
    score = {"file": str(tmp_path / "reward.py"), "function": "score"}
    rewards = Rewards([score | {"weight": 0.5}, score, score | {"weight": -2}], section="grpo")
    assert rewards.names == ["score", "score_2", "score_3"]
    assert rewards.weights == [0.5, 1, -2]
    assert rewards(samples("a", "bbb")).tolist() == [[1, 1, 1], [3, 3, 3]]
    assert rewards([]).shape == (0, 3)
    rewards.close()


def test_a_function_sees_the_same_in_every_process(of_file: MakeRewards, samples: MakeSamples) -> None:
    """The order of a set of text would be drawn anew in each, and with it sums of its floats."""
    source = "def score(completions): return [hash(c) % 1000 for c in completions]"
    batch = samples(*"abcdef")
    assert of_file(source)(batch).tolist() == of_file(source)(batch).tolist()


def test_columns_travel_as_json(of_file: MakeRewards, samples: MakeSamples) -> None:
    source = """
    def score(completions, when, scores, text):
        assert when == ["2025-01-31"] and scores == [[0.5, 1.0]] and text == ["\\ud800 é"]
        return [1]
    """
    rewards = of_file(source)
    assert rewards(samples("a", when=date(2025, 1, 31), scores=np.array([0.5, 1]), text="\ud800 é")).item() == 1
    with pytest.raises(TrainingError, match=r"rows.jsonl:1: .* cannot be given a column of type bytes"):
        rewards(samples("a", when=b"", scores=0, text=""))


# Columns


def test_a_column_that_the_row_lacks_is_named_with_the_row(of_file: MakeRewards, samples: MakeSamples) -> None:
    rewards = of_file("def score(completions, answer, level=3): return [level or 0 for _ in completions]")
    assert rewards(samples("a", answer="1")).item() == 3
    with pytest.raises(
        DatasetError, match=r"rows.jsonl:1: the reward score \(grpo.rewards.0\) needs the column 'answer'.*question, id"
    ):
        rewards(samples("a", question="q", id=1))
    with pytest.raises(DatasetError, match=r"row 7: .* which this row lacks. It has none but the prompt"):
        rewards.check_columns((), "row 7")
    rewards.check_columns(["answer"], "row 8")


def test_a_column_that_some_rows_lack_is_none_there(of_file: MakeRewards, samples: MakeSamples) -> None:
    rewards = of_file("def score(completions, **columns): return [x or 0 for x in columns['level']]")
    assert rewards(samples("a", level=2) + samples("b")).tolist() == [[2], [0]]


# Failures


@pytest.fixture(scope="module")
def obedient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rewards]]:
    """Return rewards of OBEDIENT that stop, and others that drop."""
    file = tmp_path_factory.mktemp("obedient") / "reward.py"
    file.write_text(OBEDIENT)
    score = {"file": str(file), "function": "score"}
    made = {then: Rewards([score | {"on_error": then}], section="grpo") for then in ("stop", "drop")}
    yield made
    for rewards in made.values():
        rewards.close()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("raise", r"raised KeyError: 'x' \(reward.py, line 7\)"),
        ("nan", "returned nan in place of a finite number"),
        ("inf", "returned inf in place of a finite number"),
        ("none", "returned None in place of a finite number"),
        ("text", "returned '0.5' in place of a finite number"),
        ("huge", "returned 1000.* in place of a finite number"),
        ("forget", "returned 0 rewards for 1 completions"),
    ],
)
def test_a_failure_names_function_and_row_or_leaves_the_row_out(
    obedient: dict[str, Rewards], samples: MakeSamples, bad: str, words: str
) -> None:
    batch = samples("a", bad, "ccc", bad)
    with pytest.raises(
        TrainingError, match=rf"^rows.jsonl:2: the reward score \(grpo.rewards.0\) {words}. The"
    ) as error:
        obedient["stop"](batch)
    assert f'The completion is "{bad}"' in str(error.value)
    assert "grpo.on_reward_error: drop" in str(error.value)
    rewards = obedient["drop"]
    assert [x if math.isfinite(x) else None for x in rewards(batch).flatten().tolist()] == [1, None, 3, None]
    assert len(rewards.left_out) == 2
    assert rewards.left_out[1].startswith("rows.jsonl:4: the reward score")
    rewards(samples("a"))
    assert not rewards.left_out


def test_what_is_no_list_is_refused(of_file: MakeRewards, samples: MakeSamples) -> None:
    rewards = of_file("def score(completions): return eval(completions[0])")
    for returned in ("None", "0.5", "'text'", "{'a': 1}"):
        with pytest.raises(TrainingError, match=r"rows.jsonl:1: .* returned .* in place of a list of numbers"):
            rewards(samples(returned, "[]"))


def test_a_reward_has_its_own_say_over_failures(tmp_path: Path, samples: MakeSamples) -> None:
    (tmp_path / "reward.py").write_text(OBEDIENT)
    score = {"file": str(tmp_path / "reward.py"), "function": "score"}
    rewards = Rewards([score, score | {"on_error": "stop"}], section="grpo", on_error="drop")
    with pytest.raises(TrainingError, match=r"grpo\.rewards\.1"):
        rewards(samples("none"))
    rewards.close()


def test_other_rows_are_asked_for_together_when_one_is_left_out(of_file: MakeRewards, samples: MakeSamples) -> None:
    """A function may compare a row with its neighbours: one by one it would give other numbers."""
    source = """
    def score(completions):
        lengths = [len(c) for c in completions if c != "bad" or 1 / 0]
        return [length - min(lengths) for length in lengths]
    """
    found = of_file(source, on_error="drop")(samples("a", "bad", "aaa"))
    assert found[[0, 2]].tolist() == [[0], [2]]


def test_a_batch_that_fails_though_no_row_does_is_said_to(of_file: MakeRewards, samples: MakeSamples) -> None:
    source = "def score(completions):\n    assert len(completions) < 3, 'too many'\n    return [1] * len(completions)"
    batch = samples("a", "b", "c")
    words = (
        r"raised AssertionError: too many \(reward.py, line 2\) when asked for the 3 completions of rows.jsonl:1 to "
        r"rows.jsonl:3, though for each alone it did not"
    )
    with pytest.raises(TrainingError, match=words):
        of_file(source)(batch)
    rewards = of_file(source, on_error="drop")
    assert rewards(batch).isnan().all()
    assert len(rewards.left_out) == 3


# Files


def test_files_are_recorded_and_run_as_they_were_read(
    of_file: MakeRewards, samples: MakeSamples, tmp_path: Path
) -> None:
    rewards = of_file("import os\ndef score(completions): return [completions[0] == 'exit' and os._exit(1) or 1]")
    file = tmp_path / "reward.py"
    assert rewards.files() == {str(file): hashlib.sha256(file.read_bytes()).hexdigest()}
    before = rewards.files()
    file.write_text("def score(completions): return [2]")
    with pytest.raises(TrainingError):
        rewards(samples("exit"))
    assert rewards(samples("a")).item() == 1, "a process that starts anew has what was read at first"
    assert rewards.files() == before


def test_a_file_finds_its_neighbours_and_its_own_classes(
    of_file: MakeRewards, samples: MakeSamples, tmp_path: Path
) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 3")
    source = """
    from __future__ import annotations
    from dataclasses import dataclass
    from beside import VALUE

    @dataclass
    class Kept:
        value: int

    def score(completions):
        return [Kept(VALUE).value for _ in completions]
    """
    assert of_file(source)(samples("a")).item() == 3


def test_changed_files_are_told_apart() -> None:
    before = {"a.py": "1", "b.py": "2", "c.py": "3"}
    assert changed_files(before, dict(before), override="x: true") is None
    told = changed_files(before, {"a.py": "1", "b.py": "9", "d.py": "4"}, override="grpo.accept: true")
    assert told is not None
    assert "b.py has changed; c.py is used no more; d.py is new" in told
    assert told.endswith("grpo.accept: true")


# What is refused at the start


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([], r"grpo.rewards: no reward is given. Name one \(.*exact_match.*\{file: reward.py, function: score\}"),
        ("exact_mach", r"grpo.rewards.0: Unknown reward 'exact_mach'. Did you mean 'exact_match'\?"),
        (["exact_match", {"weight": 2}], r"grpo.rewards.1: give one of name .*, file .* and model"),
        ([{"name": "length", "model": "rm"}], "give one of name"),
        ([{"file": "reward.py"}], "file and function belong together"),
        ([{"name": "numeric", "function": "f"}], "file and function belong together"),
        ([{"file": "nowhere.py", "function": "f"}], r"the reward file nowhere.py cannot be read: No such file"),
        ([{"file": ".", "function": "f"}], r"the reward file \. cannot be read: Is a directory"),
        ([{"name": "numeric", "weight": "high"}], "weight: expected a number, got \"high\""),
        ([{"name": "numeric", "weight": math.inf}], "weight: expected a finite number"),
        ([{"name": "numeric", "timeout": 0}], "timeout: expected a number above 0"),
        ([{"name": "numeric", "on_error": "ignore"}], "on_error: expected 'stop' or 'drop'"),
        ([{"name": "numeric", "colum": "a"}], r"\(numeric\): colum: unknown key. Did you mean column\?"),
        ([{"name": "format"}], r"\(format\): pattern: required"),
        ([{"name": "format", "pattern": "("}], r"\(format\): pattern: '\(' is no regular expression"),
        ([{"name": "length"}], "give max_tokens or target_tokens"),
        ([{"name": "length", "target_tokens": 5, "buffer_tokens": 2}], "buffer_tokens"),
        ([{"model": "rm", "timeout": 5, "column": "a"}], "a reward model does not use column, timeout"),
    ],
)  # fmt: skip
def test_a_bad_specification_says_where_and_what(specs: Any, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        Rewards(specs, section="grpo")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import nowhere", r"raised ModuleNotFoundError: No module named 'nowhere' \(reward.py, line 1\)"),
        ("def score(:", r"raised SyntaxError: .*reward.py, line 1"),
        ("def scores(c): ...\ndef other(c): ...", r"has no function 'score'. Did you mean 'scores'\? .* scores, other"),
        ("x = 1", "has no function 'score'. In .*reward.py, it has no function at all"),
        ("score = 1", "is no function but 1"),
        ("raise SystemExit(2)", "raised SystemExit: 2"),
    ],
)
def test_a_bad_file_says_where_and_what(of_file: MakeRewards, source: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^grpo.rewards.0 \(.*reward.py:score\): {words}"):
        of_file(source)


def test_a_function_has_no_options(of_file: MakeRewards) -> None:
    with pytest.raises(ConfigurationError, match=r"wieght: unknown key. It has no options; every reward has weight"):
        of_file("def score(completions): return []", wieght=2)


def test_options_of_a_stage_take_every_form() -> None:
    assert RewardOptions().rewards == []
    assert RewardOptions(rewards="numeric").on_reward_error == "stop"
    assert RewardOptions(rewards=["numeric", {"name": "format", "pattern": "a"}]).rewards[0] == "numeric"
    with pytest.raises(ValidationError):
        RewardOptions(rewards=[3])


# Published rewards


def publish(folder: Path, module: str, source: str, *names: str) -> None:
    """Put a distribution into a folder as an installation does: its module, and its entry points."""
    (folder / f"{module}.py").write_text(dedent(source))
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\nSummary: s\n")
    entries = "".join(f"{name} = {module}:{name}\n" for name in names)
    (info / "entry_points.txt").write_text(f"[llmtk.rewards]\n{entries}")


def test_a_published_function_and_a_class_with_options_are_used_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: MakeSamples
) -> None:
    source = """
    from llmtk import Section

    def brevity(completions):
        return [-len(c) for c in completions]

    class Contains:
        class Options(Section):
            text: str
        columns = ["times"]

        def __init__(self, options):
            self.text = options.text

        def __call__(self, completions, **columns):
            assert list(columns) == ["times"]
            return [c.count(self.text) == times for c, times in zip(completions, columns["times"])]
    """
    publish(tmp_path, "rewards_for_a_test", source, "brevity", "Contains")
    monkeypatch.syspath_prepend(tmp_path)
    rewards = Rewards(["brevity", {"name": "Contains", "text": "a"}], section="grpo")
    assert rewards(samples("aa", "b", times=2, other=1)).tolist() == [[-2, 1], [-1, 0]]
    with pytest.raises(DatasetError, match="'times'"):
        rewards(samples("a"))
    rewards.close()
    with pytest.raises(ConfigurationError, match=r"\(brevity\): text: unknown key"):
        Rewards([{"name": "brevity", "text": "a"}], section="grpo")


def test_a_published_reward_that_is_broken_names_its_distribution(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, "broken_for_a_test", "import nowhere", "broken")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigurationError, match=r"reward 'broken' \(broken_for_a_test 1.0\) cannot be imported"):
        Rewards("broken", section="grpo")
