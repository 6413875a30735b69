"""Rounds that are written and rounds that are brought: what is laid out, counted and reported."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from llmtk_rl.rollouts import Rollout, batch_of
from llmtk_rl.stage import ReinforcementOptions

from llmtk import Completion, DatasetError, LlmtkError, Run
from llmtk.generation import Segment


def lines(run: Run, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / f"{name}.jsonl").read_text().splitlines()]


def written(tokens: list[int], stopped: Any = "stop") -> Completion:
    return Completion((Segment(tokens, [-0.5 - token / 100 for token in tokens]),), stopped)


def rollout(completions: list[Completion], rewards: list[float], **more: Any) -> Rollout:
    reward = torch.tensor(rewards, dtype=torch.float64)
    row = {"prompt_ids": [1, 2, 3], "place": "rows.jsonl:7"}
    return Rollout("rows.jsonl:7 0", row, completions, [""] * len(rewards), reward[:, None], reward, **more)


# Layout


def test_completions_share_their_prompt_and_bring_what_the_loss_needs() -> None:
    two = rollout([written([7, 8, 9]), written([7])], [1.0, 0.0])
    one = rollout([written([5, 5], "length")], [0.5])
    batch = batch_of([two, one], ReinforcementOptions(max_completion_length=4))
    assert batch.tokens.tolist() == [1, 2, 3, 7, 8, 9, 7, 1, 2, 3, 5, 5]
    assert batch.target_tokens.tolist() == [7, 8, 9, 7, 5, 5]
    assert batch.target_sequence.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.per_target["sampled_logps"].tolist() == pytest.approx([-0.57, -0.58, -0.59, -0.57, -0.55, -0.55])
    assert batch.per_sequence["rewards"].tolist() == [1.0, 0.0, 0.5]
    assert batch.per_sequence["truncated"].tolist() == [False, False, True]
    found = {name: weight.tolist() for name, weight in batch.weights.items()}
    assert found == {"sequences": [2, 1], "tokens": [4, 2], "room": [8, 4]}
    assert batch.places == ["rows.jsonl:7"] * 2


def test_completions_that_are_masked_have_no_targets_and_count_in_no_denominator() -> None:
    options = ReinforcementOptions(max_completion_length=4, mask_truncated_completions=True)
    some = rollout([written([7, 8, 9]), written([5, 5], "length")], [1.0, 0.0])
    none = rollout([written([5], "length")], [2.0])
    batch = batch_of([some, none], options)
    assert batch.target_tokens.tolist() == [7, 8, 9]
    assert batch.target_counts.tolist() == [3, 0, 0]
    assert batch.per_sequence["rewards"].tolist() == [1.0, 0.0, 2.0], "they count in their group's mean"
    found = {name: weight.tolist() for name, weight in batch.weights.items()}
    assert found == {"sequences": [1, 0], "tokens": [3, 0], "room": [4, 0]}


def test_tokens_that_were_not_sampled_are_no_targets() -> None:
    tools = Completion((Segment([7], [-1.0]), Segment([8, 9], sampled=False), Segment([4], [-2.0])), "stop")
    batch = batch_of([rollout([tools], [1.0])], ReinforcementOptions())
    assert batch.target_tokens.tolist() == [7, 4]
    assert batch.per_target["sampled_logps"].tolist() == [-1.0, -2.0]


def test_log_probs_of_another_policy_are_kept_apart() -> None:
    unknown = Completion((Segment([7, 8]),), "stop")
    batch = batch_of([rollout([written([6]), unknown], [0, 1], offline=True), rollout([written([5])], [1])], OPTIONS)
    sampled, brought = (batch.per_target[name].tolist() for name in ("sampled_logps", "brought_logps"))
    assert [math.isnan(value) for value in sampled] == [True, True, True, False]
    assert [math.isnan(value) for value in brought] == [False, True, True, True]


OPTIONS = ReinforcementOptions()


@pytest.mark.parametrize(
    ("rewards", "flat"), [([0.1 * 3, 0.3], True), ([0.0, 0.0, 0.1], False), ([1.0], True), ([], True)]
)
def test_a_rollout_is_flat_where_no_completion_is_better(rewards: list[float], flat: bool) -> None:
    assert rollout([written([7]) for _ in rewards], rewards).is_flat is flat


# Rounds of a run


def test_a_round_reports_what_was_written_and_rewarded(make: Any) -> None:
    run = make(options={"rewards": ["exact_match", {"name": "length", "target_tokens": 4, "weight": 0.5}]})
    run.train()
    first = lines(run)[0]
    assert first["reward"] == pytest.approx(first["rewards/exact_match/mean"] + first["rewards/length/mean"] / 2)
    assert 1 <= first["completions/mean_length"] <= first["completions/max_length"] <= 6
    assert first["completions/clipped_ratio"] > 0.5, "a model that knows nothing seldom stops"
    assert first["completions/left_out"] == 0
    assert first["entropy"] == pytest.approx(math.log(run.model.config.vocab_size), rel=0.2)
    assert first["sampling/logp_difference_max"] < 1e-5
    assert first["frac_reward_zero_std"] <= 1
    shown = [line for line in lines(run, "samples") if line["step"] == 0]
    assert len(shown) == 4
    assert shown[0].keys() == {"step", "prompt", "completion", "reward", "rewards", "stopped"}
    assert shown[0]["rewards"].keys() == {"exact_match", "length"}
    assert shown[0]["reward"] == shown[0]["rewards"]["exact_match"] + shown[0]["rewards"]["length"] / 2


def test_temperature_and_the_policys_own_log_probs_agree(make: Any) -> None:
    run = make(options={"temperature": 0.7, "num_iterations": 2})
    run.train()
    assert lines(run)[0]["sampling/logp_difference_max"] < 1e-5


def test_a_stop_string_that_never_comes_is_named_once(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    make(options={"stop": ["</answer>", "#!#"]}, max_steps=3).train()
    told = [line for line in capsys.readouterr().out.splitlines() if "stop string" in line]
    assert len(told) == 2
    assert "'</answer>' (grpo.stop) is in none of the first round's 16 completions" in told[0]
    assert "'#!#'" in told[1]


def test_a_stop_string_that_comes_is_not_named(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plain = make(folder="plain", max_steps=1)
    plain.train()
    character = next(c for line in lines(plain, "samples") for c in line["completion"] if c.isprintable())
    run = make(options={"stop": [character]})
    run.train()
    assert lines(run)[0]["completions/clipped_ratio"] < lines(plain)[0]["completions/clipped_ratio"]
    assert "stop string" not in capsys.readouterr().out


# Rounds that rows bring

BROUGHT = [
    {
        "prompt": f"{i}?",
        "completion_ids": [[65 + i, 66, 67], [70, 71], [72]],
        "rewards": [1.0, 0.0, i / 4],
        "old_logps": [[-5.0, -5.5, -6.0], [-5.2, -5.1], [-4.0]],
    }
    for i in range(4)
]


def test_a_round_that_rows_bring_needs_no_reward_and_writes_nothing(make: Any) -> None:
    run = make(options={"rewards": []}, rows=BROUGHT)
    asked = []
    run.evaluate(BROUGHT)
    run.generate = lambda prompts, *_, **__: asked.append(len(prompts)) or []
    run.train()
    assert asked == [0, 0]
    first = lines(run)[0]
    assert first["reward"] == pytest.approx((4 * 1.0 + (0 + 1 + 2 + 3) / 4) / 12)
    assert first["completions/mean_length"] == 2
    assert not [name for name in first if name.startswith("rewards/")]
    assert first["sampling/logp_difference_max"] == 0, "another policy's log-probs are not this one's"
    assert lines(run, "samples")[0]["rewards"] == {}


def test_the_ratio_is_to_the_log_probs_that_were_brought(make: Any) -> None:
    run = make(options={"rewards": []}, rows=BROUGHT, max_steps=1)
    run.train()
    rows = [run.train_rows[index] for index in range(4)]
    (window,) = run.hooks.prepare_batch(rows).windows
    assert window.per_target["old_logps"].tolist() == pytest.approx([-5.0, -5.5, -6.0, -5.2, -5.1, -4.0] * 4)
    metrics = run.hooks.compute_loss(window).metrics
    now = run.score(window).logps
    high = (now - window.per_target["old_logps"]).exp() > 1.2
    up = window.per_sequence["advantages"][window.target_sequence] > 0
    assert float(metrics["clip_ratio/high_mean"].sum) == int((high & up).sum()) > 0


def test_brought_and_written_prompts_share_a_round(make: Any) -> None:
    """Without log-probs of their own, completions are taken for the policy's as it is; texts get the stop token."""
    texts = [{"prompt": "5?", "completions": ["five", ""]}, {"prompt": "6?"}]
    run = make(rows=[*BROUGHT[:2], *texts], options={"mini_batches": 2})
    run.evaluate(BROUGHT)
    rows = [run.train_rows[index] for index in range(4)]
    batch = run.stage._scored(run, batch_of(_rollouts(run, rows), run.stage.options), {})
    counts = torch.bincount(batch.sequence_group).tolist()
    assert counts == [3, 3, 2, 4]
    eos = run.tokenizer.eos_token_id
    five = batch.target_tokens[batch.target_sequence == 6].tolist()
    assert five == [*run.tokenizer("five", add_special_tokens=False)["input_ids"], eos]
    assert batch.target_tokens[batch.target_sequence == 7].tolist() == [eos]
    now = run.score_window(batch).logps
    same = batch.target_sequence >= 6
    torch.testing.assert_close(batch.per_target["old_logps"][same], now[same])
    run.train()


def test_texts_behind_messages_end_as_a_turn_does(make: Any) -> None:
    run = make(rows=[{"prompt": [{"role": "user", "content": "5?"}], "completions": ["a", "b"], "rewards": [0, 1]}])
    run.evaluate(BROUGHT)
    batch = batch_of(_rollouts(run, [run.train_rows[0]]), run.stage.options)
    end = run.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert batch.target_tokens.tolist()[1::2] == [end, end] != [run.tokenizer.eos_token_id] * 2


def _rollouts(run: Run, rows: Any) -> list[Rollout]:
    from llmtk_rl.rollouts import Writer

    return Writer(run, run.stage.rewards, run.stage.options, 0, 4)(rows)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rewards": [1.0]}, "3 completion_ids, 1 rewards"),
        ({"rewards": 1.0}, "rewards must be a list"),
        ({"rewards": [1.0, None, 2.0]}, "rewards must be finite numbers"),
        ({"rewards": [1.0, float("nan"), 2.0]}, "rewards must be finite numbers"),
        ({"old_logps": [[-1.0], [-1.0]]}, "3 completion_ids, 3 rewards, 2 old_logps"),
        ({"old_logps": [[-5.0, -5.5], [-5.2, -5.1], [-4.0]]}, "completion 1 has 3 tokens and 2 old_logps"),
        ({"old_logps": [[-5.0, -5.5, 0.1], [-5.2, -5.1], [-4.0]]}, "old_logps must be lists of log-probs"),
        ({"old_logps": [-5.0, -5.5, -6.0]}, "old_logps must be lists of log-probs"),
        ({"completion_ids": []}, "completion_ids must be a list with one entry"),
        ({"completion_ids": [[65], [], [66]]}, "none of them empty"),
        ({"completion_ids": [[65], [99999], [66]]}, "token ids from 0 to"),
        ({"completion_ids": [["a"], [65], [66]]}, "token ids from 0 to"),
        ({"completion_ids": [[65], [66], [67] * 7], "old_logps": None}, "7 tokens, and max_completion_length allows 6"),
        ({"completions": ["a", "b"]}, "2 completions, 3 completion_ids"),
        ({"completions": ["a", 3, "b"]}, "completions must be text"),
    ],
    ids=str,
)
def test_what_a_row_brings_is_checked_before_a_model_is_loaded(make: Any, change: dict[str, Any], why: str) -> None:
    bad = {name: value for name, value in (BROUGHT[1] | change).items() if value is not None}
    run = make(options={"rewards": []}, rows=[BROUGHT[0], bad, *BROUGHT[2:]])
    with pytest.raises(DatasetError, match=f"row 2: .*{why}"):
        run.train()
    assert not hasattr(run, "model")


def test_rewards_without_completions_are_a_column_like_others(make: Any, graded: dict[str, str]) -> None:
    run = make(rows=[{"prompt": f"{i}?", "rewards": [i]} for i in range(4)])
    run.train()
    assert "rewards/score/mean" in lines(run)[0]


def test_without_a_reward_a_row_that_brings_none_is_refused(make: Any) -> None:
    run = make(options={"rewards": []}, rows=[*BROUGHT[:2], {"prompt": "q"}])
    with pytest.raises(LlmtkError, match=r"grpo\.rewards: no reward is given"):
        run.train()
    assert not hasattr(run, "model")
