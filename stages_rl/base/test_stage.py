"""What reinforcement stages share: rounds of passes and mini-batches, evaluation, resuming, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtk import ConfigurationError, DatasetError, Run, TrainingError
from llmtk.cli import call
from llmtk.training import checkpoints

PASSES = {"num_iterations": 2, "mini_batches": 2, "beta": 0.1}
ROWS = [{"prompt": f"{'why ' * (i % 3)}{i}?", "answer": str(i)} for i in range(8)]


def lines(run: Run, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The rows in a file, which a run that is resumed reads again."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


def weights(run: Run) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


# A stage of one's own


@pytest.mark.parametrize("name", ["Reinforce", "Taught"])
def test_the_stages_of_the_page_train(name: str, graded: dict[str, str], tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "writing-a-stage.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(block, found := {"__name__": "page"})
    stage = found[name]
    options = {stage.section: {"rewards": [graded], "num_generations": 4, "max_completion_length": 6}}
    train = {"bf16": False, "max_steps": 1, "per_device_train_batch_size": 4}
    run = Run(stage, model="builtin", data=ROWS, train=train, output_dir=str(tmp_path / "run"), **options)
    loss = run.train().final_loss
    if name == "Taught":
        assert loss == pytest.approx(0, abs=1e-3), "the policy begins as its teacher, which stays in bfloat16"
    else:
        assert loss is not None
        assert abs(loss) > 1e-3


# Rounds


def test_each_pass_takes_every_prompt_once_in_an_order_of_its_own(make: Any) -> None:
    run = make(options={"num_iterations": 3, "mini_batches": 2, "num_generations": 2}, per_device_train_batch_size=8)
    run.train()
    windows = run.hooks.prepare_batch([run.train_rows[index] for index in range(8)]).windows
    assert [len(window) for window in windows] == [4] * 6
    passes = [[*windows[2 * n].places, *windows[2 * n + 1].places] for n in range(3)]
    assert [sorted(places) for places in passes] == [[f"row {n}" for n in range(1, 9)]] * 3
    assert len({tuple(places) for places in passes}) == 3
    for window in windows:
        assert torch.bincount(window.sequence_group).tolist() == [2] * 4
        assert window.per_target.keys() == {"sampled_logps", "brought_logps", "old_logps"}


def test_the_policy_leaves_the_old_one_after_the_first_step_of_a_round(make: Any) -> None:
    """Measured before each step: nothing has moved at the first, and then it has."""
    run = make(options={"num_iterations": 2, "beta": 0.1, "epsilon": 0.0}, max_steps=4)
    run.train()
    share = [line["clip_ratio/region_mean"] for line in lines(run)]
    assert share[0] < 0.1 < share[1]  # with epsilon 0 only rounding is left at first
    assert [line["kl"] > 1e-9 for line in lines(run)] == [False, True, True, True]
    assert ["reward" in line for line in lines(run)] == [True, False, True, False], "told where a round begins"


def test_rounds_are_written_by_the_policy_of_the_moment(make: Any) -> None:
    """Else log-probs at sampling and at scoring would drift apart."""
    run = make(max_steps=6, learning_rate=0.05)
    run.train()
    assert all(line["sampling/logp_difference_max"] < 1e-4 for line in lines(run))


def test_what_is_written_follows_from_the_seed(make: Any) -> None:
    runs = [make(folder=name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    for run in runs:
        run.train()
    written = [(run.output_dir / "samples.jsonl").read_text() for run in runs]
    assert written[0] == written[1] != written[2]
    assert torch.equal(weights(runs[0]), weights(runs[1]))


# Evaluation


def test_an_evaluation_gives_a_reward_and_changes_nothing_of_training(make: Any) -> None:
    more = {"evaluation": ROWS[:3], "eval_strategy": "steps", "eval_steps": 1}
    with_, without = make(folder="with", options=PASSES, max_steps=5, **more), make(options=PASSES, max_steps=5)
    for run in (with_, without):
        run.train()
    evaluated = [line for line in lines(with_) if "eval_reward" in line]
    assert len(evaluated) == 5
    assert evaluated[0]["eval_reward"] != evaluated[2]["eval_reward"]
    assert {"eval_loss", "eval_reward_std", "eval_completions/mean_length", "eval_entropy"} <= evaluated[0].keys()
    assert [line for line in lines(with_) if "eval_reward" not in line] == lines(without)
    assert lines(with_, "samples") == lines(without, "samples")
    assert torch.equal(weights(with_), weights(without))


def test_the_best_model_is_the_one_with_the_highest_reward(make: Any) -> None:
    run = make(evaluation=ROWS[:3], eval_strategy="steps", eval_steps=1, max_steps=4, load_best_model_at_end=True)
    result = run.train()
    rewards = [line["eval_reward"] for line in lines(run) if "eval_reward" in line]
    assert result.best_metric == max(rewards)


# Resuming


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_a_run_goes_on_from_anywhere_in_a_round_bit_by_bit(make: Any, file: str, stage: str) -> None:
    """Between rounds and between the windows of one; what was written in the meantime is written again."""
    settings = {"options": PASSES, "max_steps": 10, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    whole = make(stage, rows=file, folder="whole", evaluation=0.25, **settings)
    whole.train()
    for step in (2, 4, 5):
        folder = whole.output_dir.with_name(f"from-{step}")
        shutil.copytree(whole.output_dir, folder)
        for number, path in checkpoints.list_checkpoints(folder / "checkpoints"):
            if number > step:
                shutil.rmtree(path)
        run = Run(stage, resume="auto", output_dir=str(folder))
        run.train()
        for name in ("metrics.jsonl", "samples.jsonl", "model.safetensors"):
            assert (folder / name).read_bytes() == (whole.output_dir / name).read_bytes(), (step, name)
        last = [checkpoints.list_checkpoints(one / "checkpoints")[-1][1] for one in (folder, whole.output_dir)]
        for name in ("optimizer.safetensors", "rank-0.safetensors", "rank-0.json"):
            assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), (step, name)


def test_a_reward_file_that_has_changed_is_refused_on_resume_unless_that_is_meant(
    make: Any, file: str, graded: dict[str, str]
) -> None:
    first = make(rows=file, max_steps=4, save_strategy="steps", save_steps=2)
    first.train()
    shutil.rmtree(checkpoints.list_checkpoints(first.output_dir / "checkpoints")[-1][1])
    Path(graded["file"]).write_text("def score(completions):\n    return [float(len(c)) for c in completions]\n")
    with pytest.raises(ConfigurationError, match=r"graded\.py has changed.*grpo\.reward_changed=true"):
        Run("grpo", resume="auto", output_dir=str(first.output_dir)).train()
    again = Run("grpo", resume="auto", output_dir=str(first.output_dir), grpo={"reward_changed": True})
    assert again.train().steps == 4
    assert "reward_changed" not in (first.output_dir / "config.yaml").read_text()
    Path(graded["file"]).write_text("def score(completions):\n    return [0.5 for c in completions]\n")
    with pytest.raises(ConfigurationError, match=r"graded\.py has changed"):  # the override was for one resume
        Run("grpo", resume="auto", output_dir=str(first.output_dir)).train()


def test_a_reward_file_that_changes_in_the_midst_of_a_run_changes_nothing(make: Any, graded: dict[str, str]) -> None:
    runs = [make(folder=name, max_steps=3) for name in ("left alone", "changed")]
    runs[0].train()
    runs[1].evaluate(ROWS)
    Path(graded["file"]).write_text("def score(completions):\n    return [1.0 for c in completions]\n")
    runs[1].train()
    assert torch.equal(weights(runs[0]), weights(runs[1]))


# Rewards that fail


def test_a_row_whose_reward_fails_is_left_out_and_counted(make: Any, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(
        "def score(prompts, completion_ids):\n"
        "    return [None if '5' in p else sum(ids) % 7 for p, ids in zip(prompts, completion_ids)]\n"
    )
    reward = {"file": str(tmp_path / "fails.py"), "function": "score"}
    run = make(options={"rewards": [reward], "on_reward_error": "drop"}, per_device_train_batch_size=8)
    run.train()
    assert [line["completions/left_out"] for line in lines(run)] == [4 / 32] * 2
    stopping = make(options={"rewards": [reward]}, folder="stopping", per_device_train_batch_size=8)
    with pytest.raises(TrainingError, match=r"row 6: the reward score \(grpo\.rewards\.0\) returned None"):
        stopping.train()


def test_a_round_of_which_nothing_is_left_is_survived(make: Any, tmp_path: Path) -> None:
    """No completion has a reward: the step is left out, no weight changes, and the run goes on."""
    (tmp_path / "never.py").write_text("def score(completions):\n    return [None for _ in completions]\n")
    never = {"file": str(tmp_path / "never.py"), "function": "score"}
    run = make(options={"rewards": [never], "on_reward_error": "drop", **PASSES}, evaluation=None)
    assert run.train().steps == 2
    assert lines(run)[-1]["skipped_steps"] == 2
    assert "reward" not in lines(run)[-1]


# What is refused


def test_prompts_over_the_limit_are_left_out_and_named(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = make(rows=[*ROWS[:4], {"prompt": "x" * 60, "answer": ""}])
    run.train()
    told = "Prompts left out, over 58 tokens (data.max_length less grpo.max_completion_length): 1 (row 5)."
    assert told in capsys.readouterr().out
    assert len(run.train_rows) == 4


def test_where_no_prompt_leaves_room_the_run_ends_before_a_model_is_loaded(make: Any) -> None:
    run = make(rows=[{"prompt": "x" * 60}] * 3)
    with pytest.raises(DatasetError, match=r"None of the 3 prompts leaves room for a completion.*data\.max_length"):
        run.train()
    assert not hasattr(run, "model")
    with pytest.raises(ConfigurationError, match=r"grpo\.max_completion_length: 64 leaves no room .* 64\."):
        make(options={"max_completion_length": 64}, folder="none").train()


def test_mini_batches_that_do_not_divide_a_round_are_refused_with_those_that_do(make: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"mini_batches: 3 does not divide the round's 4 .* 1, 2 and 4 do"):
        make(options={"mini_batches": 3}).train()


@pytest.mark.parametrize("stage", ["grpo", "rloo"])
def test_one_completion_alone_is_refused(make: Any, stage: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"{stage}\.num_generations: 1 leaves no.*give 2 or more"):
        make(stage, {"num_generations": 1}).train()


def test_a_row_without_the_column_of_a_reward_is_named(make: Any) -> None:
    with pytest.raises(DatasetError, match=r"row 2: the reward exact_match .* needs the column 'answer'"):
        make(options={"rewards": ["exact_match"]}, rows=[ROWS[0], {"prompt": "q"}]).train()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ((), "grpo.rewards: no reward is given. Name one (exact_match, "),
        (("grpo.rewards=nothing",), "'nothing'"),
        (("grpo.rewards=[{file: absent.py, function: score}]",), "the reward file absent.py cannot be read"),
        (("grpo.rewards=[{file: reward.py, function: scores}]",), "has no function 'scores'. Did you mean 'score'?"),
        (("grpo.rewards=numeric",), "rows.jsonl:1: the reward numeric (grpo.rewards.0) needs the column 'answer'"),
        (("grpo.rewards=exact_match", "grpo.num_generations=1"), "grpo.num_generations: 1 leaves nothing"),
        (("grpo.rewards=[{file: reward.py, function: score}]", "grpo.mini_batches=3"), "3 does not divide"),
        (
            ("grpo.rewards=[{file: reward.py, function: fails}]",),
            ": the reward fails (grpo.rewards.0) raised ZeroDivisionError: division by zero (reward.py, line 5)",
        ),
        (("grpo.rewards=exact_match", "grpo.temperature=0"), "grpo.temperature"),
        (("grpo.rewards=exact_match", "grpo.loss=grop"), "grpo.loss"),
    ],
    ids=str,
)
def test_the_command_ends_with_an_error_and_no_traceback(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: tuple[str, ...],
    why: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(4)))
    Path("reward.py").write_text(
        "def score(completions):\n    return [1.0] * len(completions)\n\n"
        "def fails(completions):\n    return [1 / 0 for _ in completions]\n"
    )
    words = ["run", "grpo", "model.name_or_path=builtin", "data.train=rows.jsonl", "train.bf16=false"]
    words += ["grpo.max_completion_length=4", "train.per_device_train_batch_size=4", "train.max_steps=1"]
    assert call([*words, "output_dir=run", *settings]) in (1, 2)
    told = capsys.readouterr()
    assert why in told.err
    assert "Traceback" not in told.err + told.out
