"""Two processes under torchrun against one: the same updates, figures and ends, and faults that all ranks share."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from llmtk.ports import free_port
from llmtk.training.zero import missing

WORKER = Path(__file__).with_name("worker.py")
LIMIT = 310
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port")
# Without --multi_gpu, which is no lie to it where there is no GPU, Accelerate starts one process.
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1")
ACCELERATE += ("--main_process_port",)

Answers = Callable[..., dict[str, Any]]


def launch(out: Path, *launcher: str, checks: tuple[str, ...] = ()) -> str:
    """Run the worker, alone or under a launcher that ends with the option for its port. Fails where it hangs.

    Returns what it said, on both streams.
    """
    launcher = (*launcher, str(free_port())) if launcher else ()
    # As torchrun sets it: with other threads, sums round otherwise.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, *launcher, str(WORKER), str(out), *checks]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired as error:
        told = b"".join(part for part in (error.stdout, error.stderr) if part).decode()
        pytest.fail(f"the processes hang; the end of what they said:\n{told[-6000:]}")
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all answers: those of one rank, then of two."""
    folder = tmp_path_factory.mktemp("distributed")
    launch(folder)
    (folder / "said").write_text(launch(folder, *TORCHRUN))
    sharded = ("sharded", "sharded_adamw", "sharded_goes_on", "sharded_by_difficulty", "sharded_average")
    launch(folder, checks=sharded)
    launch(folder, *TORCHRUN, checks=sharded)
    return folder


@pytest.fixture(scope="session")
def answer(out: Path) -> Answers:
    """Return what a rank of a world answered."""
    return reader(out)


def reader(out: Path) -> Answers:
    def read(check: str, size: int, rank: int = 0) -> dict[str, Any]:
        found = json.loads((out / str(size) / f"{check}.{rank}.json").read_text())
        assert "failed" not in found, f"{check} on rank {rank} of {size}: {found['failed']}"
        return found

    return read


@pytest.fixture(scope="session")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the answers of runs under DeepSpeed."""
    folder = tmp_path_factory.mktemp("deepspeed")
    launch(folder, checks=("sgd", "zero_1"))
    launch(folder, *TORCHRUN, checks=("sgd", "zero_1", "zero_2", "zero_3"))
    return folder


def distance(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the largest relative difference of two sets of tensors, tensor by tensor, by their norms."""
    assert first.keys() == second.keys()
    assert first
    return max(_distance(first[name], second[name]) for name in first)


def distance_of_gradients(first: dict[str, Any], second: dict[str, Any]) -> float:
    """Return the relative difference of two gradients, each as one vector."""
    assert first.keys() == second.keys()
    return _distance(*(np.concatenate([np.ravel(part[name]) for name in first]) for part in (first, second)))


def _distance(first: Any, second: Any) -> float:
    return float(np.linalg.norm(np.subtract(first, second)) / (np.linalg.norm(second) or 1))


def without(lines: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in names} for line in lines]


# The same training

TRAININGS = (
    "sgd",
    "adamw",
    "accumulated",
    "sharded",
    "sharded_adamw",
    "clipped",
    "unequal",
    "dealt",
    "tail",
    "tail_of_three",
    "experts",
    "lora",
    "zero_weight",
)


def by_kind(weights: dict[str, Any]) -> dict[str, Any]:
    """Join the adapters' A matrices to one vector and the B matrices to another; other weights stay as they are.

    A B matrix begins at zero, so it is its updates alone; that of a module which matters little is all rounding.
    """
    kinds: dict[str, list[Any]] = {}
    for name, values in weights.items():
        kind = next((kind for kind in ("lora_A", "lora_B") if kind in name), name)
        kinds.setdefault(kind, []).append(np.ravel(values))
    return {kind: np.concatenate(values) for kind, values in kinds.items()}


@pytest.mark.parametrize("check", TRAININGS)
def test_two_ranks_train_as_one_does(answer: Answers, check: str) -> None:
    one, two = answer(check, 1), answer(check, 2)
    assert one["steps"] == two["steps"] == 20
    assert distance_of_gradients(two["gradient"], one["gradient"]) < 1e-6
    assert distance(by_kind(two["weights"]), by_kind(one["weights"])) < 1e-6
    for mine, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_sharded_run_goes_on_to_the_bit_and_its_export_is_whole(answer: Answers, kind: str) -> None:
    for rank in (0, 1):
        found = answer("sharded_goes_on", 2, rank)[kind]
        assert found["same"]
        assert found["checkpoint"]
        assert found["exported"]


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=missing() or "")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_under_deepspeed_is_that_of_one_process(spread: Path, stage: int) -> None:
    answer = reader(spread)
    one, two, other = answer("zero_1", 1), answer(f"zero_{stage}", 2, 0), answer(f"zero_{stage}", 2, 1)
    assert distance(two["weights"], one["weights"]) < 1e-6
    assert two["weights"] == other["weights"]
    for name in ("loss", "grad_norm", "eval_loss"):
        found, wanted = ([line[name] for line in run["metrics"] if name in line] for run in (two, one))
        assert found == pytest.approx(wanted, rel=1e-6)
    loaded = AutoModelForCausalLM.from_pretrained(spread / f"zero_{stage}-2", dtype="auto")
    assert {name: parameter.tolist() for name, parameter in loaded.named_parameters()} == two["weights"]
    for found in (two, other):
        for kind in ("full", "lora"):
            assert found[kind] == {"same": True, "checkpoint": True, "exported": True}
        for fault in ("poisoned", "kinked", "infinite"):
            history = found[fault]["history"]
            why = "the gradient is not finite" if fault == "kinked" else "the loss is not finite"
            assert found[fault]["skipped"] == [None, why, None, why]
            assert history[1] == history[2]
            assert history[3] == history[4]
            assert history[0] != history[1]
            assert distance(found[fault]["weights"], one[fault]["weights"]) < 1e-6


def test_a_sharded_run_has_its_rows_in_the_order_of_their_losses(answer: Answers) -> None:
    one, two = answer("sharded_by_difficulty", 1), answer("sharded_by_difficulty", 2)
    assert two["steps"] == 12
    assert distance(two["weights"], one["weights"]) < 1e-6
    assert all(answer("sharded_by_difficulty", 2, rank)["same"] for rank in (0, 1))


def test_the_average_of_a_sharded_model_is_refused_on_all_ranks(answer: Answers) -> None:
    assert answer("sharded_average", 1)["error"] == "no error"
    for rank in (0, 1):
        found = answer("sharded_average", 2, rank)
        assert found["error"].startswith("ConfigurationError: plugins.ema averages and exports whole weights")
        assert not found["written"]


PREFERENCES = (
    "dpo",
    "dpo_transport",
    "dpo_moving",
    "ipo",
    "kto",
    "cpo",
    "simpo",
    "orpo",
    "rm",
    "tasks_together",
    "precomputed",
)


@pytest.mark.parametrize("check", PREFERENCES)
def test_two_ranks_learn_preferences_as_one_does(answer: Answers, check: str) -> None:
    one, two = answer(check, 1), answer(check, 2)
    assert one["steps"] == two["steps"] == 6
    assert distance(two["weights"], one["weights"]) < 1e-6
    for mine, theirs in zip(two["metrics"], one["metrics"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_two_ranks_tell_tasks_apart(answer: Answers) -> None:
    line = next(line for line in answer("tasks_together", 2)["metrics"] if "loss" in line)
    assert {"few/loss", "many/loss", "few/rewards/margins", "loss/multitask_nll"} <= line.keys()


def test_a_precomputed_reference_is_the_reference(answer: Answers) -> None:
    assert distance(answer("precomputed", 2)["weights"], answer("dpo", 2)["weights"]) < 1e-6


REINFORCEMENT = ("grpo", "grpo_batch", "grpo_dynamic", "grpo_dropped", "rloo", "ppo", "left_out")


@pytest.mark.parametrize("check", REINFORCEMENT)
def test_two_ranks_write_and_learn_as_one_does(answer: Answers, check: str) -> None:
    """The same completions in the same windows, on whichever rank, and the same updates."""
    one, two, other = answer(check, 1), answer(check, 2, 0), answer(check, 2, 1)
    assert one["steps"] == two["steps"]
    assert len(one["written"]) == len(two["written"])
    for whole, mine, theirs in zip(one["written"], two["written"], other["written"], strict=True):
        assert [sorted(a + b) for a, b in zip(mine, theirs, strict=True)] == whole
    assert distance(two["weights"], one["weights"]) < 1e-6
    for mine, theirs in zip(without(two["metrics"], ROUNDING), without(one["metrics"], ROUNDING), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert any("reward" in line for line in one["metrics"])


ROUNDING = "sampling/logp_difference_max"
"""What is nothing but rounding, which depends on what was scored side by side."""


def test_dynamic_sampling_and_flat_groups_made_rounds_of_other_sizes(answer: Answers) -> None:
    """Else their equality would say nothing."""
    sizes = {
        check: [sum(len(window) for window in round[:2]) for round in answer(check, 1)["written"]]
        for check in ("grpo", "grpo_dynamic", "grpo_dropped")
    }
    assert sizes["grpo"] == [8, 8, 3]
    assert max(sizes["grpo_dropped"]) < max(sizes["grpo_dynamic"]) == 8
    assert sizes["grpo_dynamic"][2] > 3, "an epoch's last rows are filled up too"


def test_a_rank_of_which_no_row_is_left_takes_part(answer: Answers) -> None:
    counts = [[len(round[0]) for round in answer("left_out", 2, rank)["written"]] for rank in (0, 1)]
    assert (0, 1) in zip(*counts, strict=True) or (1, 0) in zip(*counts, strict=True)
    assert answer("all_left_out", 1)["steps"] == answer("all_left_out", 2)["steps"] == 4
    assert answer("all_left_out", 2)["metrics"][-1]["skipped_steps"] == 4


def test_a_reward_that_fails_on_one_rank_ends_all(answer: Answers) -> None:
    alone = answer("failing_reward", 1)["error"]
    assert alone.startswith("TrainingError: row ")
    assert "the reward even (grpo.rewards.0) returned None" in alone
    errors = [answer("failing_reward", 2, rank)["error"] for rank in (0, 1)]
    told = [error.removeprefix("TrainingError: ") for error in errors]
    assert any(first == f"rank {rank}: {second}" for rank, first, second in ((1, *told), (0, *told[::-1])))


@pytest.mark.parametrize("check", [*TRAININGS, *PREFERENCES, *REINFORCEMENT])
def test_ranks_hold_the_same_weights(answer: Answers, check: str) -> None:
    assert answer(check, 2, 0)["weights"] == answer(check, 2, 1)["weights"]


def test_training_moves_the_weights(answer: Answers) -> None:
    """Else equal weights would say nothing."""
    for check in TRAININGS:
        losses = [line["loss"] for line in answer(check, 2)["metrics"] if "loss" in line]
        assert losses[-1] < losses[0] - 0.001, check
        assert all(np.any(values) for values in answer(check, 2)["gradient"].values() if check != "lora")


def test_a_token_budget_cuts_ranks_unequally_and_they_keep_step(answer: Answers) -> None:
    """Alone, the rank of the short rows needs fewer micro-batches than that of the long ones."""
    assert answer("unequal", 1)["forwards"] != answer("unequal", 2)["forwards"]
    first, second = (answer("unequal", 2, rank)["forwards"] for rank in (0, 1))
    assert first == second
    assert set(first[1:]) == {4}, "four long rows of 40 tokens stand alone; the four short ones fit into fewer"


def test_rows_are_dealt_by_length_and_ranks_have_equally_much_to_do(answer: Answers) -> None:
    """In turns, one rank has the long rows and the other the short ones."""
    for check, bounds in (("unequal", (0.2, 0.4)), ("dealt", (0.95, 1.05))):
        first, second = (answer(check, 2, rank) for rank in (0, 1))
        assert first["shares"] == second["shares"] == [4] * 20
        for long, short, whole in zip(first["tokens"], second["tokens"], answer(check, 1)["tokens"], strict=True):
            assert long + short == whole
            assert bounds[0] < short / long < bounds[1]
        assert first["forwards"] == second["forwards"]
    assert sum(answer("dealt", 2)["forwards"]) < sum(answer("unequal", 2)["forwards"])


def test_a_rank_without_rows_takes_part(answer: Answers) -> None:
    first, second = (answer("tail", 2, rank) for rank in (0, 1))
    assert [first["shares"][1], second["shares"][1]] == [1, 0]
    assert first["forwards"] == second["forwards"]


def test_a_rank_with_nothing_to_split_takes_part(answer: Answers) -> None:
    first, second = (answer("tail_of_three", 2, rank) for rank in (0, 1))
    assert [first["shares"][1], second["shares"][1]] == [2, 1]
    assert first["forwards"] == second["forwards"]


def test_ranks_with_unequal_rows_agree_on_the_router_loss(answer: Answers) -> None:
    one, two = ([line["router_loss"] for line in answer("experts", size)["metrics"]] for size in (1, 2))
    assert one == pytest.approx(two, rel=1e-5)
    assert len(set(one)) == 20


def test_a_weight_that_is_zero_drops_its_term_on_all_ranks(answer: Answers) -> None:
    bonus = [line["loss/bonus"] for line in answer("zero_weight", 2)["metrics"]]
    assert any(value == 0 for value in bonus)
    assert any(value > 0 for value in bonus)


# The same figures


def test_metrics_of_one_rank_are_exact(answer: Answers) -> None:
    one, two = answer("partial_metrics", 1), answer("partial_metrics", 2)
    shares = [rank["metrics"][0]["letters"] for rank in (one, two)]
    assert shares[0] == shares[1] > 0
    for step, line in enumerate(two["metrics"], start=1):
        assert line["last"] == 1.5 * step
        assert line["grown"] == math.exp(step)
    assert without(two["metrics"], "grad_norm", "loss", "perplexity") == without(
        one["metrics"], "grad_norm", "loss", "perplexity"
    )


def test_two_ranks_evaluate_exactly_as_one(answer: Answers) -> None:
    one, two, other = answer("evaluation", 1), answer("evaluation", 2, 0), answer("evaluation", 2, 1)
    assert two == other
    for kind, bound in (("alone", 1e-9), ("other data", 1e-6), ("together", 1e-6)):
        assert two[kind] == pytest.approx(one[kind], rel=bound)
        assert one[kind]["loss"] > 0
    assert one["alone"] != one["other data"]


# Stopping together


def test_one_rank_that_wants_to_stop_stops_all(answer: Answers) -> None:
    for rank in (0, 1):
        found = answer("stop", 2, rank)
        assert found["steps"] == 3
        assert found["by"] == "stoponlastrank"
        assert found["checkpoint"]["step"] == 3
        assert found["checkpoint"]["problem"] is None


@pytest.mark.parametrize(
    ("check", "step", "window", "pending"),
    [("signalled", 3, 0, False), ("signalled_in_a_round", 5, 2, False), ("signalled_in_evaluation", 4, 0, True)],
)
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_is_the_same(
    answer: Answers, check: str, size: int, step: int, window: int, pending: bool
) -> None:
    for rank in range(size):
        found = answer(check, size, rank)
        assert found["error"].startswith(f"Interrupted: SIGTERM stopped the run after step {step}")
        assert found["stopped"] == {"step": step, "problem": None}
        assert (found["window"], found["pending"]) == (window, pending)
        assert found["resumed"] == found["whole"]
        assert found["whole"]["step"] == 8
    assert [line["step"] for line in found["whole"]["metrics"] if "eval_loss" in line] == [4, 8]


# Faults that all share


@pytest.mark.parametrize(("check", "why"), [("poisoned", "the loss is not finite"), ("kinked", "the gradient")])
def test_a_fault_of_one_rank_refuses_the_step_on_all(answer: Answers, check: str, why: str) -> None:
    first, second = answer(check, 2, 0), answer(check, 2, 1)
    for found in (first, second):
        assert [skipped is not None for skipped in found["skipped"]] == [False, True, False, True]
        assert found["skipped"][1].startswith(why)
        history = found["history"]
        assert history[1] == history[2]
        assert history[3] == history[4]
        assert history[0] != history[1]
        assert history[2] != history[3]
    assert first["history"] == second["history"]
    assert all(np.isfinite(values).all() for values in first["weights"].values())
    told = next(line for line in first["said"] if "was left out, no weight changed" in line)
    assert first["places"] in told if check == "poisoned" else "Rows:" in told
    assert first["metrics"][-1]["skipped_steps"] == 2
    assert distance(first["weights"], answer(check, 1)["weights"]) < 1e-6


def test_a_run_given_up_names_the_rows_on_all_ranks(answer: Answers) -> None:
    first, second = answer("given_up", 2, 0), answer("given_up", 2, 1)
    for found in (first, second):
        assert found["error"].startswith("TrainingError: 1 steps in a row were refused")
        assert found["place"] in found["error"]
    assert first["weights"] == second["weights"]


def test_different_plugins_on_the_ranks_are_refused(answer: Answers) -> None:
    assert answer("other_plugins", 1)["error"] == "no error"
    for rank in (0, 1):
        found = answer("other_plugins", 2, rank)
        assert found["error"].startswith("ConfigurationError: the ranks have other plugins")
        assert not found["folder"]


def test_a_save_that_fails_on_one_rank_fails_on_all(answer: Answers) -> None:
    for rank in (0, 1):
        found = answer("broken_save", 2, rank)
        assert "the disk is full" in found["last"]
        assert "the disk is full" in found["first"]
        assert found["left"] == [], "no half-written checkpoint carries a checkpoint's name"
        assert found["afterwards"] == 4
    assert "failed on rank 1" in answer("broken_save", 2, 0)["last"]
    assert "failed on rank 0" in answer("broken_save", 2, 1)["first"]


def test_an_export_that_fails_on_one_rank_fails_on_all(answer: Answers) -> None:
    for rank in (0, 1):
        assert "the disk is full" in answer("broken_export", 2, rank)["error"]


# What a stage may ask


def test_what_stages_ask_is_collective_also_without_rows(answer: Answers) -> None:
    one, first, second = (answer("asking", size, rank)["asked"] for size, rank in ((1, 0), (2, 0), (2, 1)))
    assert len(one) == len(first) == len(second) == 4
    assert any(not round["rows"] for round in second), "a rank without rows was among them"
    for whole, left, right in zip(one, first, second, strict=True):
        for asked in ("rows", "drawn"):
            assert sorted(left[asked] + right[asked]) == sorted(whole[asked])
            assert len(left[asked]) - len(right[asked]) in (0, 1)
        assert len(whole["drawn"]) == 3
        assert left["sum"] == right["sum"] == {"rows": len(whole["rows"]), "rank 0": 1.5, "rank 1": 1.5}
        assert left["gathered"] == right["gathered"]
        assert [found["rows"] for found in left["gathered"]] == [len(left["rows"]), len(right["rows"])]
        assert sum(left["logps"] + right["logps"]) == pytest.approx(sum(whole["logps"]), rel=1e-6)
        for found in (whole, left, right):
            assert found["scored"] == [True, [len(found["rows"])]]
            assert found["training"], "scoring in eval mode leaves the model in training"


def test_a_rank_may_run_the_model_alone_without_gradient(answer: Answers) -> None:
    for rank in (0, 1):
        assert answer("a_forward_alone", 2, rank)["steps"] == 2


def test_two_ranks_write_what_one_does_whoever_has_which_prompts(answer: Answers) -> None:
    whole, left, right = (answer("generation", *at)["answers"] for at in ((1,), (2, 0), (2, 1)))
    assert [len(share) for share in whole] == [5, 5]
    assert [len(share) for share in left] == [2, 0]
    assert [mine | theirs for mine, theirs in zip(left, right, strict=True)] == whole


def test_two_processes_print_no_warning(out: Path, answer: Answers) -> None:
    assert "== sgd" in (out / "said").read_text()
    assert [line for line in (out / "said").read_text().splitlines() if "Warning" in line] == []


def test_a_checkpoint_of_another_number_of_ranks_is_refused(answer: Answers) -> None:
    for rank in (0, 1):
        error = answer("resume_of_other_world", 2, rank)["error"]
        assert error.startswith("CheckpointError: the checkpoint was written by 1 ranks and this run has 2")


@pytest.mark.skipif(sys.platform != "linux", reason="the names of the runtime's threads are read from /proc")
def test_no_thread_of_the_group_outlives_it(answer: Answers) -> None:
    """One that is left may ask the interpreter for its lock when that has ended, which aborts the process."""
    for rank in (0, 1):
        threads = answer("at_the_end", 2, rank)["threads"]
        assert threads
        assert not [name for name in threads if "gloo" in name]


def test_accelerate_launch_works_as_well(out: Path, answer: Answers, tmp_path: Path) -> None:
    launch(tmp_path, *ACCELERATE, checks=("sgd",))
    found = [json.loads((tmp_path / "2" / f"sgd.{rank}.json").read_text()) for rank in (0, 1)]
    for rank in (0, 1):
        same = answer("sgd", 2, rank)
        assert [found[rank][key] for key in ("weights", "metrics")] == [same[key] for key in ("weights", "metrics")]
