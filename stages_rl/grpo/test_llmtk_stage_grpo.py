"""The stage on a real model: its gradient, any cut of a round, which groups are trained on, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtk
from llmtk import ConfigurationError, Run, TrainingError
from llmtk.training.tally import objective

SHARED = Path(__file__).parents[3] / "shared" / "data"
PASSES = {"num_iterations": 2, "mini_batches": 2, "beta": 0.1}
RIGHT_IF_ASKED = """
def score(prompts, completion_ids):
    return [sum(ids) % 7 if "why" in prompt else 0 for prompt, ids in zip(prompts, completion_ids)]
"""
"""Half of the prompts have flat groups: nothing is ever right there."""


def lines(run: Run, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / f"{name}.jsonl").read_text().splitlines()]


def gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture
def half(tmp_path: Path) -> list[dict[str, str]]:
    (tmp_path / "half.py").write_text(RIGHT_IF_ASKED)
    return [{"file": str(tmp_path / "half.py"), "function": "score"}]


# The gradient


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_in_the_first_pass_the_gradient_is_reinforces_with_the_groups_baseline(make: Any, scale: str) -> None:
    """1/T sum_i A_i grad log pi(y_i | x_i), by transformers alone in float64; the ratio is 1 and the KL 0."""
    run = make(options={"scale_rewards": scale, "beta": 0.1})
    run.save(run.output_dir.with_name("start"))
    run.folder.path.mkdir()
    (window,) = run.hooks.prepare_batch([run.train_rows[index] for index in range(4)]).windows
    output = run.hooks.compute_loss(window)
    objective(output.terms, {name: float(w.sum()) for name, w in window.weights.items()}, 1).backward()
    assert all(float(output.metrics[name].sum) == 0 for name in output.metrics if name.startswith("clip_ratio"))
    assert float(output.metrics["kl"].sum) == pytest.approx(0, abs=1e-9)

    plain: Any = llmtk.load(str(run.output_dir.with_name("start")))[0].double().eval()
    rewards = window.per_sequence["rewards"].double().view(4, 4)
    advantages = rewards - rewards.mean(1, keepdim=True)
    spread = {"group": rewards.std(1, keepdim=True), "batch": rewards.std(), "none": torch.tensor(1 - 1e-4)}[scale]
    assert (rewards.std(1) > 0).all()
    total = torch.zeros((), dtype=torch.float64)
    tokens = window.target_tokens.split(window.target_counts.tolist())
    for index, (answer, a) in enumerate(zip(tokens, (advantages / (spread + 1e-4)).flatten(), strict=True)):
        prompt = torch.tensor(run.train_rows[index // 4]["prompt_ids"])
        logits = plain(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        total = total - a * logits.log_softmax(-1).gather(1, answer[:, None]).sum()
    (total / len(window.target_tokens)).backward()
    found, wanted = gradient(run.model), gradient(plain)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure: Any = None) -> Any:
        self.given = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


CUTS = {
    "8x1": {"per_device_train_batch_size": 8},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "tokens": {"per_device_train_batch_size": 8, "micro_batch_tokens": 60},
}
LOSSES = [
    {"loss": "grpo", **PASSES},
    {"loss": "bnpo", **PASSES, "scale_rewards": "batch"},
    {"loss": "dr_grpo", "scale_rewards": "none", "mask_truncated_completions": True},
    {"loss": "gspo", **PASSES, "kl_correction": True, "entropy_coef": 0.1},
    {"loss": "dapo", "num_iterations": 2, "mini_batches": 2, "drop_flat_groups": True},
]


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: options["loss"])
def test_a_round_trains_the_same_however_it_is_cut(make: Any, half: Any, options: dict[str, Any]) -> None:
    class Kept(llmtk.get_stage("grpo")):  # type: ignore[misc]  # a class made of an installed one
        name = "grpo"

        def build_optimizer(self, run: Any) -> Any:
            return Keeping(run.hooks.parameter_groups(), lr=run.config.train.learning_rate)

    found = {}
    for name, cut in CUTS.items():
        settings = {"max_steps": 4, "learning_rate": 0.05, "max_grad_norm": 0, **cut}
        run = make(Kept, {"rewards": half, **options}, folder=name, **settings)
        run.train()
        found[name] = [line.get("loss") for line in lines(run)], run.optimizer.given, lines(run, "samples")
    losses, given, samples = found.pop("8x1")
    assert float(given.norm()) > 0
    for name, (other, others, written) in found.items():
        assert [loss is None for loss in other] == [loss is None for loss in losses], name
        assert [loss or 0 for loss in other] == pytest.approx([loss or 0 for loss in losses], rel=1e-5, abs=1e-7), name
        assert (others - given).norm() < 1e-5 * given.norm(), name
        assert written == samples, name


# Groups


def test_flat_groups_give_no_gradient_and_are_counted(make: Any) -> None:
    run = make(options={"rewards": ["exact_match"]})
    run.evaluate([{"prompt": "q", "answer": "never"}])
    start = [parameter.clone() for parameter in run.model.parameters()]
    run.train()
    assert [line["frac_reward_zero_std"] for line in lines(run)] == [1.0, 1.0]
    assert [line["loss"] for line in lines(run)] == [0.0, 0.0]
    assert [line["advantages/abs"] for line in lines(run)] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(start, run.model.parameters(), strict=True))


def test_without_anything_right_a_run_that_drops_flat_groups_survives(make: Any) -> None:
    run = make(options={"rewards": ["exact_match"], "drop_flat_groups": True, **PASSES}, max_steps=8)
    assert run.train().steps == 8
    assert lines(run)[-1]["skipped_steps"] == 8
    assert lines(run)[0]["reward"] == 0, "which is told all the same"
    assert "loss" not in lines(run)[0]


def test_flat_groups_leave_the_denominator_where_they_are_dropped(make: Any, half: Any) -> None:
    runs = {drop: make(options={"rewards": half, "drop_flat_groups": drop}, folder=str(drop)) for drop in (0, 1)}
    windows = {}
    for drop, run in runs.items():
        run.evaluate([{"prompt": "q"}])
        run.folder.path.mkdir(exist_ok=True)
        (windows[drop],) = run.hooks.prepare_batch([run.train_rows[index] for index in range(4)]).windows
    assert [len(window) for window in windows.values()] == [4, 2], "of 0?, why 1?, why why 2? and 3? two can be right"
    assert windows[1].places == ["row 2", "row 3"]
    assert windows[0].per_sequence["advantages"][:4].tolist() == [0.0] * 4


def test_dynamic_sampling_draws_until_the_round_is_full(make: Any, half: Any) -> None:
    """Half of the prompts are flat: the round of four has four that are not, and the next goes on behind them."""
    sizes: list[int] = []
    drawn: list[int] = []
    draw = Run.draw

    class Watch:
        @llmtk.hookimpl
        def around_prepare_batch(self, run: Any, rows: Any, inner: Any) -> Any:
            round = inner(rows)
            sizes.append(len(round.windows[0]))
            return round

    run = make(options={"rewards": half, "dynamic_sampling": True}, max_steps=4, plugins=[Watch()])
    run.draw = lambda count: drawn.append(count) or draw(run, count)
    run.train()
    assert sizes == [4] * 4
    assert drawn
    assert all(1 <= count <= 4 for count in drawn)


def test_dynamic_sampling_gives_up_at_its_cap(make: Any) -> None:
    run = make(options={"rewards": ["exact_match"], "dynamic_sampling": True, "max_extra_draws": 3}, max_steps=1)
    drawn: list[int] = []
    draw = Run.draw
    run.draw = lambda count: drawn.append(count) or draw(run, count)
    assert run.train().steps == 1
    assert drawn == [4, 4, 4]
    assert lines(run)[-1]["skipped_steps"] == 1


def test_dynamic_sampling_draws_nothing_in_an_evaluation(make: Any, half: Any) -> None:
    run = make(options={"rewards": half, "dynamic_sampling": True})
    run.draw = lambda count: pytest.fail("an evaluation takes no training rows")
    metrics = run.evaluate([{"prompt": "never"}, {"prompt": "why?"}])
    assert metrics["frac_reward_zero_std"] == 0.5


def test_masked_completions_are_judged_but_not_learnt_from(make: Any) -> None:
    """A model that knows nothing seldom stops within two tokens: nearly everything is masked, and that is survived."""
    options = {"mask_truncated_completions": True, "max_completion_length": 2, "num_generations": 3, **PASSES}
    run = make(options=options, per_device_train_batch_size=2, max_steps=8)
    assert run.train().steps == 8
    first = lines(run)[0]
    assert first["completions/clipped_ratio"] == 1
    assert first["frac_reward_zero_std"] < 1
    assert lines(run)[-1]["skipped_steps"] >= 1


def test_prompts_over_the_models_positions_are_named(make: Any) -> None:
    rows = [{"prompt": "q"}, {"prompt": "x" * 200}]
    run = make(rows=rows, per_device_train_batch_size=2, max_length=512)
    with pytest.raises(TrainingError, match=r"cannot be answered: .*The longest .* row 2\. Lower data\.max_length"):
        run.train()


# Options


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"loss": "cispo", "epsilon": 0.1}, r"grpo\.epsilon: .*cispo does not use it"),
        ({"loss": "sapo", "epsilon_high": 0.3}, r"grpo\.epsilon_high: .*sapo does not use it"),
        ({"loss": "cispo", "delta": 2.0}, r"grpo\.delta"),
        ({"sapo_temperature_pos": 0.9}, r"grpo\.sapo_temperature_pos: .*used by sapo"),
        ({"kl_correction": True}, r"grpo\.kl_correction: there is no KL without grpo\.beta"),
        ({"max_extra_draws": 2}, r"grpo\.max_extra_draws is used with grpo\.dynamic_sampling: true alone"),
        ({"epsilon": 1.5}, r"grpo\.epsilon"),
        ({"num_generation": 4}, "num_generations"),
    ],
    ids=str,
)
def test_options_that_are_not_used_are_refused(make: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make(options=options).train()


def test_nothing_is_kept_of_a_reference_that_is_not_asked_for(make: Any) -> None:
    without, with_ = make(folder="without"), make(options={"beta": 0.1}, folder="with")
    for run in (without, with_):
        run.train()
    assert not without.frozen
    assert "kl" not in lines(without)[-1]
    assert "reference" in with_.frozen
    assert math.isfinite(lines(with_)[-1]["kl"])


# Real prompts


@pytest.mark.skipif(not (SHARED / "gsm8k_train_3000.jsonl").exists(), reason="the shared data are not here")
def test_gsm8k_by_a_model_that_knows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Questions through a chat template, marked answers by their number: nothing is right, and the run survives."""
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 512}
    run = Run(
        "grpo",
        model={"from_config": shape, "tokenizer": {"kind": "byte"}},
        data={"train": str(SHARED / "gsm8k_train_3000.jsonl"), "template": "chatml", "max_length": 512},
        grpo={"rewards": "numeric", "num_generations": 2, "max_completion_length": 8},
        train={"bf16": False, "per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1},
        output_dir=str(tmp_path / "gsm8k"),
    )
    assert run.train().steps == 2
    assert [line["rewards/numeric/mean"] for line in lines(run)] == [0.0, 0.0]
    assert len(lines(run, "samples")) == 4
    assert "completions before step 2" in capsys.readouterr().out
