"""Advantages and losses against sums by hand; what it converges to; any cut, interruption and export of a run."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_rl.kl_control import KLControl
from llmtk_stage_ppo import ProximalPolicyOptimization, clipped_value_loss
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import llmtk
from llmtk import ConfigurationError, Run
from llmtk.scoring import Scores, value_head
from llmtk.training import checkpoints
from llmtk.training.tally import objective

PPO = ProximalPolicyOptimization
ADAPTIVE = {"kl_coef": 0.2, "kl_control": "adaptive", "kl_target": 0.01, "kl_horizon": 20}
ROWS = [{"prompt": f"{'why ' * (i % 3)}{i}?", "answer": str(i)} for i in range(8)]


def lines(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def some_critic(run: Run) -> Any:
    """Give a run's critic weights, as if it had learnt something, and return it."""
    head = value_head.head_of(value_head.find(run.model))
    torch.nn.init.normal_(head.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    torch.nn.init.constant_(head.bias, 0.2)
    return head


def set_up(run: Run) -> Any:
    """Set a run up, with a critic, and return the first window of a round of four prompts."""
    run.save(run.output_dir.with_name("start"))
    run.folder.path.mkdir()
    some_critic(run)
    return run.hooks.prepare_batch([run.train_rows[index] for index in range(4)]).windows[0]


def completions(window: Any, column: Tensor) -> list[list[float]]:
    return [part.tolist() for part in column.double().split(window.target_counts.tolist())]


def perturb_reference(run: Run) -> None:
    """Move the reference, so that there is a KL before the policy has moved."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in run.frozen["reference"].parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)


# Advantages


@pytest.mark.parametrize("whiten", [False, True])
def test_advantages_and_returns_have_their_closed_form(make: Any, whiten: bool) -> None:
    options = {"kl_coef": 0.3, "gamma": 0.9, "lam": 0.8, "missing_eos_penalty": 0.5, "whiten_advantages": whiten}
    run = make(PPO, options)
    run.save(run.output_dir.with_name("start"))
    run.folder.path.mkdir()
    some_critic(run)
    perturb_reference(run)
    window = run.hooks.prepare_batch([run.train_rows[index] for index in range(4)]).windows[0]
    old, reference, values, returns, advantages = (
        completions(window, window.per_target[name])
        for name in ("old_logps", "reference_logps", "old_values", "returns", "advantages")
    )
    scores = window.per_sequence["rewards"] - 0.5 * window.per_sequence["truncated"]
    assert window.per_sequence["truncated"].any()
    wanted, kls = [], []
    for index, score in enumerate(scores.tolist()):
        kl = [a - b for a, b in zip(old[index], reference[index], strict=True)]
        rewards = [-0.3 * k for k in kl]
        rewards[-1] += score
        later = [*values[index][1:], 0.0]
        deltas = [r + 0.9 * v1 - v for r, v1, v in zip(rewards, later, values[index], strict=True)]
        tokens = len(deltas)
        wanted.append([sum(0.72 ** (k - t) * deltas[k] for k in range(t, tokens)) for t in range(tokens)])
        kls.append(sum(kl))
        assert returns[index] == pytest.approx(
            [a + v for a, v in zip(wanted[-1], values[index], strict=True)], abs=1e-6
        )
    assert max(map(abs, kls)) > 0.01
    everything = torch.cat([torch.tensor(part, dtype=torch.float64) for part in wanted])
    if whiten:
        everything = (everything - everything.mean()) / (everything.var() + 1e-8).sqrt()
        assert float(window.per_target["advantages"].mean()) == pytest.approx(0, abs=1e-6)
    assert [a for part in advantages for a in part] == pytest.approx(everything.tolist(), abs=1e-5)


def test_the_critic_begins_at_0_and_the_reference_where_the_policy_is(make: Any) -> None:
    run = make(PPO, {"lam": 1.0, "whiten_advantages": False}, max_steps=1)
    run.train()
    first = lines(run)[0]
    assert (first["values/mean"], first["kl"], first["kl_coef"]) == (0.0, 0.0, 0.05)
    assert first["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert first["advantages/mean"] == pytest.approx(first["returns/mean"])
    assert (first["approx_kl"], first["clip_ratio/region_mean"]) == (pytest.approx(0, abs=1e-9), 0.0)
    named = {"reward", "reward_std", "rewards/score/mean", "rewards/score/std", "entropy", "loss/policy", "loss/value"}
    named |= {"completions/mean_length", "completions/clipped_ratio", "advantages/std", "clip_ratio/value_mean"}
    assert named <= first.keys()


def test_whitened_rewards_keep_their_mean_and_have_variance_1(make: Any) -> None:
    runs = [make(PPO, {"whiten_rewards": on, "whiten_advantages": False}, folder=str(on)) for on in (False, True)]
    plain, scaled = (completions(w, w.per_target["returns"]) for w in map(set_up, runs))
    # The return of a last token is its reward: lam and gamma have nothing behind it to look at.
    last = [torch.tensor([returns[-1] for returns in found]) for found in (plain, scaled)]
    rewards = torch.cat([torch.tensor([0.0] * (len(r) - 1) + [r[-1]]) for r in plain])
    torch.testing.assert_close(last[1], last[0] / rewards.std())


# Losses


def test_the_value_loss_is_the_larger_of_two() -> None:
    """Old value 1, clipped at 0.2: within; above, where the return is beyond; above, where it is short of it; below."""
    values, returns = torch.tensor([[1.1, 1.6, 1.6, 0.5], [2.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    found = clipped_value_loss(values, torch.ones(4, dtype=torch.float64), returns, 0.2)
    # halves of 0.9^2; of max(0.4^2, 0.8^2); of max(0.6^2, 0.2^2); of max(0.5^2, 0.8^2)
    assert found.tolist() == pytest.approx([0.405, 0.32, 0.18, 0.32], rel=1e-12)


def test_both_losses_are_their_sums_by_hand(make: Any) -> None:
    """After a step, so that ratios and values have moved, some of them beyond their limits."""
    run = make(PPO, {"cliprange": 0.01, "cliprange_value": 0.05, "vf_coef": 0.3, "entropy_coef": 0.1})
    window = set_up(run)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    output = run.hooks.compute_loss(window)
    columns = {name: column.tolist() for name, column in window.per_target.items()}
    now, values = output.scores.logps.tolist(), output.scores.values.tolist()
    policy = value = below = above = far = 0.0
    for t in range(len(now)):
        ratio, a = math.exp(now[t] - columns["old_logps"][t]), columns["advantages"][t]
        policy -= min(ratio * a, min(max(ratio, 0.99), 1.01) * a)
        below += ratio < 0.99 and a < 0
        above += ratio > 1.01 and a > 0
        old, goal = columns["old_values"][t], columns["returns"][t]
        within = min(max(values[t], old - 0.05), old + 0.05)
        value += max((values[t] - goal) ** 2, (within - goal) ** 2) / 2
        far += abs(values[t] - old) > 0.05
    assert 0 < below + above < len(now)
    assert 0 < far < len(now)
    terms, metrics = output.terms, output.metrics
    assert {name: float(term.sum.detach()) for name, term in terms.items()} == pytest.approx(
        {"policy": policy, "value": value, "entropy": float(output.scores.entropy.detach().sum())}, rel=1e-5
    )
    assert [(term.per, term.coefficient) for term in terms.values()] == [("tokens", c) for c in (1.0, 0.3, -0.1)]
    found = [
        float(metrics[f"clip_ratio/{name}"].sum) for name in ("low_mean", "high_mean", "region_mean", "value_mean")
    ]
    assert found == [below, above, below + above, far]


def test_in_the_first_pass_the_gradient_is_reinforces_with_the_critics_baseline(make: Any) -> None:
    """1/T sum_t A_t grad log pi(y_t), by transformers alone in float64: the ratio is 1."""
    run = make(PPO, {"whiten_advantages": False, "lam": 1.0, "kl_coef": 0.0})
    window = set_up(run)
    output = run.hooks.compute_loss(window)
    totals = {name: float(w.sum()) for name, w in window.weights.items()}
    objective({"policy": output.terms["policy"]}, totals, 1).backward()

    plain: Any = llmtk.load(str(run.output_dir.with_name("start")))[0].double().eval()
    tokens = window.target_tokens.split(window.target_counts.tolist())
    total = torch.zeros((), dtype=torch.float64)
    for index, answer in enumerate(tokens):
        prompt = torch.tensor(run.train_rows[index // 4]["prompt_ids"])
        logits = plain(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
        values = torch.tensor(completions(window, window.per_target["old_values"])[index], dtype=torch.float64)
        a = float(window.per_sequence["rewards"][index]) - values
        total = total - (a * logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]).sum()
    (total / len(window.target_tokens)).backward()
    found, wanted = gradient(run.model), gradient(plain)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


# What it converges to


@pytest.fixture
def actor_critic(table: Any) -> Any:
    """A table of logits with one value beside it, for the one state that a language of single tokens has."""

    class ActorCritic(table):  # type: ignore[misc]  # a class made of a parameter
        def train(self, rounds: int, learning_rate: float) -> Tensor:
            self.value = torch.zeros((), requires_grad=True)
            row = {"prompt": '"q"', "prompt_ids": [0], "columns": "{}", "place": "row 1"}
            for number in range(rounds):
                for window in self.stage.prepare_batch(self, [row]).windows:
                    terms = self.stage.compute_loss(self, window).terms.values()
                    loss = sum(term.coefficient * term.sum / window.weights[term.per].sum() for term in terms)
                    gradients = torch.autograd.grad(loss, (self.logits, self.value))
                    with torch.no_grad():
                        for parameter, part in zip((self.logits, self.value), gradients, strict=True):
                            parameter -= learning_rate * (1 - number / rounds) * part
            return self.policy

        def score(self, batch: Any, **given: Any) -> Scores:
            found = super().score(batch, **given)
            return Scores(batch, found.logps, found.entropy, values=self.value + torch.zeros_like(found.logps))

    return ActorCritic


@pytest.mark.parametrize("whiten", [False, True])
def test_with_its_kl_it_converges_to_the_reference_tilted_by_the_reward(actor_critic: Any, whiten: bool) -> None:
    """pi = pi_ref exp(r / kl_coef) / Z maximises E r - kl_coef KL(pi || pi_ref), over three tokens."""
    reference, rewards = torch.tensor([0.2, -0.5, 0.3]), torch.tensor([1.0, 0.4, 0.0])
    options = {"rewards": ["exact_match"], "num_generations": 400, "kl_coef": 0.5, "vf_coef": 1.0}
    stage = PPO(PPO.Options(**options, whiten_advantages=whiten, num_iterations=2))
    policy = actor_critic(stage, reference, rewards).train(120, 0.3 if whiten else 1.0)
    wanted = (reference.double() + rewards.double() / 0.5).softmax(0)
    assert (policy - wanted).abs().sum() / 2 < 0.02
    assert (reference.double().softmax(0) - wanted).abs().sum() / 2 > 0.2, "it had a way to go"


def test_the_kl_goes_to_its_target(actor_critic: Any) -> None:
    reference, rewards = torch.tensor([0.2, -0.5, 0.3]), torch.tensor([1.0, 0.4, 0.0])
    options = {"num_generations": 400, "kl_coef": 0.5, "kl_control": "adaptive", "kl_target": 0.1}
    stage = PPO(PPO.Options(rewards=["exact_match"], **options, kl_horizon=2000, num_iterations=2, vf_coef=1.0))
    run = actor_critic(stage, reference, rewards)
    policy = run.train(150, 0.3)
    kl = float((policy * (policy / reference.double().softmax(0)).log()).sum())
    assert kl == pytest.approx(0.1, rel=0.1)
    assert stage.control.coefficient > 0.6


def test_the_coefficient_moves_by_a_fifth_of_its_gain_at_most() -> None:
    control = KLControl(1.0, target=6.0, horizon=1000)
    found = []
    for kl in (6.0, 6.6, 60.0, 0.0):
        control.update(kl, 100)
        found.append(control.coefficient)
    assert found == pytest.approx([1.0, 1.01, 1.01 * 1.02, 1.01 * 1.02 * 0.98])
    fixed = KLControl(0.3)
    fixed.update(100.0, 100)
    assert fixed.coefficient == 0.3


# Runs


def test_the_critic_learns_what_is_to_be_expected(make: Any, tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def score(completions):\n    return [1.0] * len(completions)\n")
    rewards = [{"file": str(tmp_path / "one.py"), "function": "score"}]
    run = make(PPO, {"rewards": rewards, "kl_coef": 0.0, "vf_coef": 1.0}, max_steps=60, learning_rate=0.02)
    run.train()
    values = [line["values/mean"] for line in lines(run) if "values/mean" in line]
    assert values[0] == 0
    assert values[-1] == pytest.approx(1, abs=0.1)


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure: Any = None) -> Any:
        self.given = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


class Kept(PPO):
    name = "kept"

    def build_optimizer(self, run: Any) -> Any:
        return Keeping(run.hooks.parameter_groups(), lr=run.config.train.learning_rate)


CUTS: dict[str, dict[str, Any]] = {
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "tokens": {"per_device_train_batch_size": 8, "micro_batch_tokens": 80},
    "padded": {"per_device_train_batch_size": 8, "scoring": "padded"},
    "checkpointing": {"per_device_train_batch_size": 8, "gradient_checkpointing": True},
}


def test_a_round_is_the_same_however_it_is_cut(make: Any) -> None:
    def trained(name: str, cut: dict[str, Any]) -> tuple[list[float], Tensor]:
        options = {**ADAPTIVE, "num_iterations": 2, "num_generations": 2}
        run = make(Kept, options, folder=name, max_steps=4, learning_rate=0.1, max_grad_norm=0, **cut)
        run.train()
        return [line["loss"] for line in lines(run)], run.optimizer.given

    losses, gradients = trained("8x1", {"per_device_train_batch_size": 8})
    assert len({*losses}) == 4
    for name, cut in CUTS.items():
        other, others = trained(name, cut)
        assert other == pytest.approx(losses, rel=1e-5, abs=1e-6), name
        assert (others - gradients).norm() < 1e-4 * gradients.norm(), name


@pytest.fixture
def file(tmp_path: Path) -> str:
    """The rows in a file, which a run that is resumed reads again."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("peft", [False, True])
def test_a_run_goes_on_from_anywhere_in_a_round_bit_by_bit(make: Any, file: str, peft: bool) -> None:
    options = {**ADAPTIVE, "num_iterations": 2, "mini_batches": 2}
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    whole = make(PPO, options, rows=file, folder="whole", **settings)
    if peft:
        whole = adapted(whole, options, file, settings)
    whole.train()
    coefficients = [line["kl_coef"] for line in lines(whole) if "kl_coef" in line]
    assert len({*coefficients}) == 3, "it changes from round to round"
    for step in (2, 4, 5):
        folder = whole.output_dir.with_name(f"from-{step}")
        shutil.copytree(whole.output_dir, folder)
        for number, path in checkpoints.list_checkpoints(folder / "checkpoints"):
            if number > step:
                shutil.rmtree(path)
        run = Run(PPO, resume="auto", output_dir=str(folder))
        run.train()
        kept = "adapter_model.safetensors" if peft else "model.safetensors"
        for name in ("metrics.jsonl", "samples.jsonl", kept):
            assert (folder / name).read_bytes() == (whole.output_dir / name).read_bytes(), (step, name)
        last = [checkpoints.list_checkpoints(one / "checkpoints")[-1][1] for one in (folder, whole.output_dir)]
        for name in ("weights.safetensors", "optimizer.safetensors", "rank-0.safetensors", "rank-0.json"):
            assert (last[0] / name).read_bytes() == (last[1] / name).read_bytes(), (step, name)


def adapted(run: Run, options: dict[str, Any], rows: str, settings: dict[str, Any]) -> Run:
    """Return a run that trains an adapter on what another run begins from."""
    run.save(run.output_dir.with_name("base"))
    stage = {"rewards": run.stage.options.rewards, "num_generations": 4, "max_completion_length": 6, **options}
    return Run(
        PPO,
        model={"name_or_path": str(run.output_dir.with_name("base"))},
        data={"train": rows, "max_length": 64},
        peft={"r": 4},
        train={"bf16": False, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.01, **settings},
        ppo=stage,
        output_dir=str(run.output_dir.with_name("adapted")),
    )


def test_an_export_is_the_policy_alone(make: Any) -> None:
    run = make(PPO, save_strategy="steps", save_steps=2)
    run.train()
    with safe_open(run.output_dir / "model.safetensors", "pt") as saved:
        assert not any("value" in name for name in saved.keys())  # noqa: SIM118  # it is no mapping
    policy = AutoModelForCausalLM.from_pretrained(run.output_dir).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)
    (_, checkpoint), *_ = checkpoints.list_checkpoints(run.output_dir / "checkpoints")
    with safe_open(checkpoint / "weights.safetensors", "pt") as saved:
        assert saved.get_tensor("value_head.weight").any()
    assert run.model.value_head.weight.any(), "the run keeps its critic"
    again = Run.open(run.output_dir)
    assert set(again.evaluate(ROWS)) >= {"reward", "kl", "entropy"}
    assert isinstance(again.predict("1?", max_new_tokens=2), str)


def test_an_adapter_is_trained_with_the_head_in_full(make: Any, file: str) -> None:
    run = adapted(
        make(PPO), {"kl_coef": 0.1}, file, {"max_steps": 8, "save_strategy": "no", "gradient_checkpointing": True}
    )
    run.train()
    trained = {name.rpartition(".")[0] for name, p in run.model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained if "lora" not in name} == {"value_head"}
    assert run.model.base_model.model.value_head.weight.any()
    assert lines(run)[0]["kl"] == 0
    assert lines(run)[4]["kl"] > 0
    with safe_open(run.output_dir / "adapter_model.safetensors", "pt") as saved:
        assert all("lora" in name for name in saved.keys())  # noqa: SIM118  # it is no mapping
    policy, _ = llmtk.load(run.output_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(policy(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


def test_bfloat16_trains_with_values_in_float32(make: Any) -> None:
    run = make(PPO, bf16=True, max_steps=4)
    run.train()
    assert lines(run)[0]["kl"] == 0, "policy and reference compute the same numbers"
    assert run.forward.scorers[None].packed, run.forward.scorers[None].why_padded


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_a_mixture_of_experts_has_its_router_loss_once(
    make: Any, scoring: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where values take a forward of their own."""
    experts = {"model_type": "mixtral", "num_key_value_heads": 1, "num_local_experts": 2, "output_router_logits": True}
    given = make(PPO).config.model
    run = Run(
        PPO,
        model={"from_config": given.from_config | experts, "tokenizer": {"kind": "byte"}},
        data={"train": ROWS, "max_length": 64},
        train={"bf16": False, "max_steps": 1, "per_device_train_batch_size": 4, "scoring": scoring},
        ppo={"rewards": ["exact_match"], "max_completion_length": 4},
        output_dir=str(make(PPO).output_dir.with_name("experts")),
    )
    run.train()
    assert lines(run)[0]["router_loss"] >= 1
    assert "no router loss" not in capsys.readouterr().out


def test_an_evaluation_changes_nothing_of_training(make: Any) -> None:
    more = {"evaluation": ROWS[:3], "eval_strategy": "steps", "eval_steps": 1}
    with_ = make(PPO, ADAPTIVE, folder="with", max_steps=6, **more)
    without = make(PPO, ADAPTIVE, folder="without", max_steps=6)
    for run in (with_, without):
        run.train()
    evaluated = [line for line in lines(with_) if "eval_reward" in line]
    assert {"eval_loss", "eval_kl", "eval_entropy", "eval_loss/value", "eval_explained_variance"} <= evaluated[0].keys()
    assert [line for line in lines(with_) if "eval_reward" not in line] == lines(without)


def test_completions_that_are_masked_take_no_part(make: Any) -> None:
    options = {"mask_truncated_completions": True, "max_completion_length": 1}
    run = make(PPO, options)
    run.train()
    assert lines(run)[-1]["skipped_steps"] == 2, "none of them ended"


def test_a_reward_model_judges(make: Any, tmp_path: Path) -> None:
    stage_rm = pytest.importorskip("llmtk_stage_rm")
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(8)]
    judge = Run(
        stage_rm.RewardModeling,
        model=make(PPO).config.model.model_dump(exclude_unset=True),
        data={"train": pairs, "max_length": 64},
        train={"bf16": False, "max_steps": 1, "per_device_train_batch_size": 8},
        output_dir=str(tmp_path / "rm"),
    )
    judge.train()
    run = make(PPO, {"rewards": [{"model": str(tmp_path / "rm")}]}, folder="judged")
    run.train()
    assert math.isfinite(lines(run)[0]["rewards/rm/mean"])


# What is refused


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kl_target": 3.0}, r"ppo\.kl_target is used with ppo\.kl_control: adaptive alone"),
        ({"kl_horizon": 3}, r"ppo\.kl_horizon is used with ppo\.kl_control: adaptive alone"),
        (
            {"kl_control": "adaptive", "kl_coef": 0.0},
            r"ppo\.kl_control: adaptive multiplies ppo\.kl_coef, and 0 stays 0",
        ),
        (
            {"missing_eos_penalty": 1.0, "mask_truncated_completions": True},
            r"ppo\.missing_eos_penalty: .* take no part",
        ),
        ({"beta": 0.1}, r"ppo\.beta"),
        ({"vf_coef": 0.0}, r"ppo\.vf_coef"),
    ],
    ids=str,
)
def test_options_that_would_do_nothing_are_refused(make: Any, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make(PPO, options).train()


# The demo


def test_the_demo_learns(tmp_path: Path) -> None:
    run = Run(PPO, train={"max_steps": 8}, output_dir=str(tmp_path / "run"))
    figures = run.train().metrics
    assert figures["figure_after"] > figures["figure_before"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_whole_demo_reaches_nine_of_ten(tmp_path: Path, seed: int) -> None:
    figures = Run(PPO, train={"seed": seed}, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_before"] < 0.7
    assert figures["figure_after"] >= 0.9
