"""The losses against closed forms in float64, the fixed points of theory, any cut of a window, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmtk_dpo_losses import LOSSES, Pairs, divergence_score
from llmtk_pref import demo_rows
from llmtk_stage_dpo import _of_rank
from transformers import AutoModelForCausalLM

from llmtk import ConfigurationError, DatasetError, Run
from llmtk.training.tally import objective

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
ROWS = [
    *demo_rows("train", 5),
    {"prompt": "A longer prompt, ", "chosen": "and an answer.", "rejected": "and one that is a good deal longer."},
    {"prompt": "", "chosen": "nothing before it", "rejected": "either"},
    {"prompt": "q", "chosen": "the longer one here", "rejected": "x"},
]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTK_CACHE", str(tmp_path / "cache"))


def make(folder: Path, options: dict[str, Any] | None = None, *, rows: Any = ROWS, **train: Any) -> Run:
    """Make a run of a tiny model, whose distributions are far from uniform."""
    return Run(
        "dpo",
        model={"from_config": TINY, "tokenizer": {"kind": "byte"}},
        data={"train": rows, "eval": rows},
        dpo=options or {},
        train={"bf16": False, "per_device_train_batch_size": 8, "logging_steps": 1, "learning_rate": 0.1, **train},
        output_dir=str(folder),
    )


# Losses


def options(**values: Any) -> Any:
    return SimpleNamespace(**{"beta": 0.3, "label_smoothing": 0.0, "discopop_tau": 0.05, **values})


def pairs(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(6, generator=generator).to(dtype).requires_grad_(requires_grad) for _ in range(2))


def as_pairs(chosen: Any, rejected: Any, **columns: Any) -> Pairs:
    lengths = torch.tensor([3, 1, 4, 1, 5, 9]), torch.tensor([2, 6, 5, 3, 5, 8])
    return Pairs(chosen, rejected, chosen, rejected, *lengths, **columns)


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


B, E, TAU = 0.3, 0.1, 0.05
CLOSED = {
    "sigmoid": (0.0, lambda c, j, n, m: math.log(1 + math.exp(-B * (c - j)))),
    "sigmoid ": (E, lambda c, j, n, m: -0.9 * math.log(s(B * (c - j))) - 0.1 * math.log(s(B * (j - c)))),
    "sigmoid_norm": (0.0, lambda c, j, n, m: math.log(1 + math.exp(-B * (c / n - j / m)))),
    "hinge": (0.0, lambda c, j, n, m: max(0.0, 1 - B * (c - j))),
    "robust": (E, lambda c, j, n, m: (-0.9 * math.log(s(B * (c - j))) + 0.1 * math.log(s(B * (j - c)))) / 0.8),
    "exo_pair": (E, lambda c, j, n, m: sum(
        p * math.log(p / q) for p, q in ((s(B * (c - j)), 0.9), (s(B * (j - c)), 0.1)))),
    "nca_pair": (0.0, lambda c, j, n, m: -math.log(s(B * c)) - (math.log(s(-B * c)) + math.log(s(-B * j))) / 2),
    "bco_pair": (0.0, lambda c, j, n, m: -math.log(s(B * c)) - math.log(1 - s(B * j))),
    "sppo_hard": (0.0, lambda c, j, n, m: (c - 1 / (2 * B)) ** 2 + (j + 1 / (2 * B)) ** 2),
    "apo_zero": (0.0, lambda c, j, n, m: s(-B * c) + s(B * j)),
    "apo_down": (0.0, lambda c, j, n, m: s(B * c) + s(-B * (c - j))),
    "discopop": (0.0, lambda c, j, n, m: -math.log(s(B * (c - j))) * (1 - s(B * (c - j) / TAU))
                 + math.exp(-B * (c - j)) * s(B * (c - j) / TAU)),
}  # fmt: skip


@pytest.mark.parametrize("name", CLOSED)
def test_a_loss_has_its_closed_form(name: str) -> None:
    smoothing, formula = CLOSED[name]
    p = as_pairs(*pairs())
    found = LOSSES[name.strip()](p, options(label_smoothing=smoothing))
    lengths = zip(p.chosen_length.tolist(), p.rejected_length.tolist(), strict=True)
    numbers = zip(p.chosen.tolist(), p.rejected.tolist(), lengths, strict=True)
    assert found.tolist() == pytest.approx([formula(c, j, n, m) for c, j, (n, m) in numbers], rel=1e-12)


def test_every_loss_has_a_closed_form_here() -> None:
    assert {name.strip() for name in CLOSED} | {"aot", "aot_unpaired"} == set(LOSSES)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"aot_unpaired"}))
def test_gradients_are_those_of_the_values(name: str) -> None:
    shift = torch.randn(6, dtype=torch.float64)

    def loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return LOSSES[name](as_pairs(chosen, rejected, aot_shift=shift), options(label_smoothing=E)).sum()

    assert torch.autograd.gradcheck(loss, pairs(requires_grad=True))


def test_paired_transport_compares_equal_ranks() -> None:
    chosen, rejected = pairs(requires_grad=True)
    reference = torch.randn(6, dtype=torch.float64)  # log pi_ref(c) - log pi_ref(j), so that log pi's is r + this
    policy = chosen - rejected + reference
    wanted = -torch.nn.functional.logsigmoid(B * (policy.sort().values - reference.sort().values)).sum()
    shift = (reference - _of_rank(policy, reference)).detach()
    found = LOSSES["aot"](as_pairs(chosen, rejected, aot_shift=shift), options()).sum()
    assert_same(found, wanted, (chosen, rejected))


def test_unpaired_transport_compares_equal_ranks() -> None:
    chosen, rejected = pairs(requires_grad=True)
    wanted = -torch.nn.functional.logsigmoid(B * (chosen.sort().values - rejected.sort().values)).sum()
    partner = torch.stack([_of_rank(chosen, rejected), _of_rank(rejected, chosen)], dim=1).detach()
    found = LOSSES["aot_unpaired"](as_pairs(chosen, rejected, aot_partner=partner), options()).sum()
    assert_same(found, wanted, (chosen, rejected))


def assert_same(found: torch.Tensor, wanted: torch.Tensor, leaves: tuple[torch.Tensor, ...]) -> None:
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    gradients = [torch.autograd.grad(value, leaves) for value in (found, wanted)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_a_divergences_score_is_the_derivative_of_its_generator(divergence: str) -> None:
    """f'(t) by differences, up to the constant that cancels between the two answers."""
    alpha = 0.3
    generators = {
        "reverse_kl": lambda t: t * math.log(t),
        "forward_kl": lambda t: -math.log(t),
        "js": lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
        "alpha": lambda t: (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1)),
    }
    f, h = generators[divergence], 1e-6
    ratios = [0.05, 0.7, 1.0, 2.5, 30.0]
    derivative = [(f(t * (1 + h)) - f(t * (1 - h))) / (2 * h * t) for t in ratios]
    score = divergence_score(torch.tensor(ratios, dtype=torch.float64).log(), divergence, alpha).tolist()
    at_one = score[2] - derivative[2]
    assert [value - at_one for value in score] == pytest.approx(derivative, rel=1e-6, abs=1e-8)


def test_the_alpha_divergence_of_order_1_is_the_reverse_kl_and_none_overflows() -> None:
    ratios = torch.tensor([-200.0, 0.0, 200.0])
    assert torch.equal(divergence_score(ratios, "alpha", 1.0), ratios)
    assert torch.isfinite(divergence_score(ratios, "alpha", 2.0)).all()


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_an_answer_that_the_policy_has_unlearnt_leaves_numbers(divergence: str) -> None:
    ratios = torch.tensor([0.0, -300.0], requires_grad=True)
    score = divergence_score(ratios, divergence, 0.5)
    p = Pairs(ratios[:1], ratios[1:], score[:1], score[1:], torch.ones(1), torch.ones(1))
    loss = LOSSES["sigmoid"](p, options()).sum()
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(ratios.grad).all()


def test_references_that_move_are_of_the_policys_shape(tmp_path: Path) -> None:
    other = make(tmp_path / "other", max_steps=1)
    other.train()
    settings = {
        "data": {"train": ROWS},
        "dpo": {"sync_ref_model": True},
        "output_dir": str(tmp_path / "run"),
        "train": {"max_steps": 1, "bf16": False},
    }
    model = {"tokenizer": {"kind": "byte"}, "reference": str(other.output_dir)}
    with pytest.raises(ConfigurationError, match="is of another shape than the policy"):
        Run("dpo", model=model | {"from_config": TINY | {"intermediate_size": 48}}, **settings).train()
    adapter = {"name_or_path": str(other.output_dir), "reference": str(other.output_dir)}
    with pytest.raises(ConfigurationError, match="Train in full, without peft"):
        Run("dpo", model=adapter, peft={"r": 2}, **settings).train()


def test_dpo_converges_to_the_preferences_log_odds() -> None:
    """A table of two answers of which the first is preferred with probability p: beta x gap = logit(p)."""
    p, beta = 0.8, 0.3
    table = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([table], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)
    reference = torch.tensor([0.3, 0.7], dtype=torch.float64).log()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        r = table.log_softmax(0) - reference
        both = as_pairs(r.repeat(3), r.flip(0).repeat(3))  # the pair, and the pair the other way round
        weights = torch.tensor([p, 1 - p] * 3)
        loss = (weights * LOSSES["sigmoid"](both, options(beta=beta))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    gap = (table.log_softmax(0) - reference)[0] - (table.log_softmax(0) - reference)[1]
    assert beta * float(gap.detach()) == pytest.approx(math.log(p / (1 - p)), rel=1e-5)


# The stage


def window(run: Run, order: list[int], rows_each: int) -> tuple[float, torch.Tensor]:
    """Return loss and gradient of one window of these rows, cut into micro-batches."""
    batch = run.hooks.prepare_batch([run.train_rows[index] for index in order]).windows[0]
    totals = {name: float(weight.sum()) for name, weight in batch.weights.items()}
    run.model.zero_grad()
    loss = 0.0
    for start in range(0, len(order), rows_each):
        part = objective(run.hooks.compute_loss(batch.select(range(start, start + rows_each))).terms, totals, 1)
        part.backward()
        loss += float(part.detach())
    return loss, torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])


def moved(folder: Path, **settings: Any) -> Run:
    """Return a run whose policy has left its reference."""
    run = make(folder, **settings)
    run.evaluate()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return run


WINDOWS = [{"loss": name, **({"label_smoothing": 0.1} if name == "exo_pair" else {})} for name in [*LOSSES, "sft"]] + [
    {"loss": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]},
    {"f_divergence": "js"},
    {"ld_alpha": 0.25, "loss": ["sigmoid", "aot"]},
    {"use_weighting": True, "rpo_alpha": 0.5},
    {"reference_free": True},
]


@pytest.mark.parametrize("settings", WINDOWS, ids=str)
def test_a_window_is_the_same_however_it_is_cut_and_shuffled(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = moved(tmp_path / "run", options=settings)
    loss, gradient = window(run, list(range(8)), 8)
    assert float(gradient.norm()) > 1e-3
    for order, rows_each in ((list(range(8)), 2), ([5, 2, 7, 0, 4, 1, 6, 3], 4)):
        again, other = window(run, order, rows_each)
        assert again == pytest.approx(loss, rel=1e-6)
        assert float((other - gradient).norm() / gradient.norm()) < 2e-6


def test_an_untrained_policy_has_zero_rewards_and_the_gradient_of_theory(tmp_path: Path) -> None:
    """Loss ln 2, gradient -(beta/2) (grad log pi(c) - grad log pi(j)), by transformers alone."""
    run = make(tmp_path / "run", {"beta": 0.4})
    metrics = run.evaluate()
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-7)
    zero = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "kl")
    assert [metrics[name] for name in zero] == [0.0] * 5
    loss, gradient = window(run, list(range(8)), 8)
    run.save(tmp_path / "start")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "start").double().eval()
    total = 0.0
    for index in range(8):
        row = run.train_rows[index]
        for name, sign in (("chosen", 1), ("rejected", -1)):
            total = total + sign * log_prob(plain, row, name)
    (-(0.4 / 2) / 8 * total).backward()
    wanted = torch.cat([parameter.grad.flatten() for parameter in plain.parameters()])
    assert loss == pytest.approx(math.log(2), abs=1e-7)
    assert float((gradient.double() - wanted).norm() / wanted.norm()) < 1e-5


def test_a_continued_adapters_reference_is_the_adapter_as_it_was(tmp_path: Path) -> None:
    """Not its base, from which it has gone far; so the first loss is ln 2."""
    start = make(tmp_path / "start")
    start.evaluate()
    start.save(tmp_path / "base")

    def on(model: Path, folder: str, **sections: Any) -> Run:
        train = {"bf16": False, "max_steps": 4, "learning_rate": 0.05, "logging_steps": 1}
        return Run(
            "dpo",
            model={"name_or_path": str(model)},
            data={"train": ROWS, "eval": ROWS},
            train=train,
            output_dir=str(tmp_path / folder),
            **sections,
        )

    first = on(tmp_path / "base", "first", peft={"r": 4})
    first.train()
    assert first.evaluate()["loss"] < math.log(2) - 0.1
    again = on(tmp_path / "first", "again")
    untrained = again.evaluate()
    assert untrained["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert untrained["rewards/margins"] == untrained["kl"] == 0
    again.train()
    assert again.evaluate()["loss"] != untrained["loss"]


def log_prob(model: Any, row: dict[str, Any], name: str) -> Any:
    ids = torch.tensor(row["prompt_ids"] + row[f"{name}_ids"])
    targets = torch.tensor([False] * len(row["prompt_ids"]) + row[f"{name}_targets"])
    logps = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    return logps[targets[1:]].sum()


def test_metrics_are_what_they_are_called(tmp_path: Path) -> None:
    run = moved(tmp_path / "run", options={"beta": 0.4})
    run.save(tmp_path / "moved")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "moved").double().eval()
    chosen, rejected = ([float(log_prob(plain, row, name).detach()) for row in run.eval_rows]
                        for name in ("chosen", "rejected"))  # fmt: skip
    metrics = run.evaluate()
    assert metrics["logps/chosen"] == pytest.approx(sum(chosen) / 8, rel=1e-5)
    assert metrics["logps/rejected"] == pytest.approx(sum(rejected) / 8, rel=1e-5)
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-5
    )
    assert metrics["kl"] > 0


def test_length_desensitisation_weighs_what_lies_beyond_the_shorter_answer(tmp_path: Path) -> None:
    runs = {alpha: moved(tmp_path / str(alpha), options={"ld_alpha": alpha}) for alpha in (None, 1.0, 0.0)}
    found = {alpha: window(run, [7], 1)[0] for alpha, run in runs.items()}
    assert found[None] == pytest.approx(found[1.0], rel=1e-6)
    run = runs[0.0]
    batch = run.hooks.prepare_batch([run.train_rows[7]]).windows[0]
    with torch.no_grad():
        r = run.score(batch).logps - batch.per_target["reference_logps"]
    longer, shorter = batch.target_counts.tolist()
    assert longer > shorter
    delta = float(r[:shorter].sum() - r[longer:].sum())
    assert found[0.0] == pytest.approx(math.log1p(math.exp(-0.1 * delta)), rel=1e-6)


def test_policy_weights_are_those_of_the_paper(tmp_path: Path) -> None:
    run = moved(tmp_path / "run", options={"use_weighting": True})
    batch = run.hooks.prepare_batch([run.train_rows[5]]).windows[0]
    found = float(run.hooks.compute_loss(batch).terms["sigmoid"].sum.detach())
    logits = run.map_logits(batch, lambda logits: logits).detach().log_softmax(-1)
    logps = logits.gather(-1, batch.target_tokens[:, None])[:, 0]
    aligned = logps - logits.exp().square().sum(-1).log()
    n = int(batch.target_counts[0])
    weight = math.exp(float(aligned[:n].mean())) * math.exp(float(aligned[n:].mean()))
    r = logps - batch.per_target["reference_logps"]
    plain = math.log1p(math.exp(-0.1 * float(r[:n].sum() - r[n:].sum())))
    assert found == pytest.approx(weight * plain, rel=1e-5)


def test_the_reference_moves_every_so_many_steps(tmp_path: Path) -> None:
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}
    run = make(tmp_path / "run", settings, max_steps=2)
    run.evaluate()
    start = {name: tensor.clone() for name, tensor in run.frozen["reference"].state_dict().items()}
    run.train()
    for name, tensor in run.frozen["reference"].state_dict().items():
        torch.testing.assert_close(tensor, 0.75 * start[name] + 0.25 * run.model.state_dict()[name])
    assert not torch.equal(run.frozen["reference"].state_dict()["lm_head.weight"], start["lm_head.weight"])


def test_a_precomputed_reference_trains_the_same(tmp_path: Path) -> None:
    live, once = (make(tmp_path / str(flag), max_steps=3, precompute_reference=flag) for flag in (False, True))
    losses = [run.train().final_loss for run in (live, once)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert not once.frozen


# What is refused


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"loss": "hinge", "label_smoothing": 0.1}, r"dpo\.label_smoothing: .*hinge does not use it; used by sigmoid"),
        ({"discopop_tau": 0.1}, r"dpo\.discopop_tau: .*used by discopop"),
        ({"loss": "sft", "beta": 0.2}, r"dpo\.beta"),
        ({"loss": "aot", "use_weighting": True}, r"dpo\.use_weighting"),
        ({"loss": ["sigmoid", "aot"], "use_weighting": True}, "aot compares answers of different pairs"),
        ({"loss": "apo_zero", "f_divergence": "js"}, r"dpo\.f_divergence"),
        ({"loss": ["sigmoid", "apo_zero"], "f_divergence": "js"}, "apo_zero knows the reverse KL alone"),
        ({"f_alpha": 0.3}, r"dpo\.f_alpha is used by"),
        ({"loss": "exo_pair"}, "label_smoothing over 0"),
        ({"loss": ["sigmoid", "sigmoid"]}, "each once"),
        ({"loss": []}, "at least one loss"),
        ({"loss": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "1 weights for 2 losses"),
        ({"loss": ["sigmoid", "sft"], "rpo_alpha": 1.0}, r"dpo\.rpo_alpha adds what"),
        ({"ref_model_sync_steps": 3}, "used with dpo.sync_ref_model"),
        ({"sync_ref_model": True, "reference_free": True}, "there is none to move"),
        ({"loss": "ipo"}, r"dpo\.loss"),
        ({"beta": 0.0}, r"dpo\.beta"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make(tmp_path / "run", settings).train()


def test_references_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is none to move"):
        make(tmp_path / "a", {"sync_ref_model": True}, precompute_reference=True).train()
    with pytest.raises(ConfigurationError, match="there is no reference with these options"):
        make(tmp_path / "b", {"reference_free": True}, precompute_reference=True).train()


def test_equal_answers_are_left_out_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"prompt": "q", "chosen": "same", "rejected": "same"}]
    run = make(tmp_path / "run", rows=rows, max_steps=1)
    run.train()
    assert len(run.train_rows) == 8
    assert "1 of 9 pairs have equal answers (row 9) and are left out" in capsys.readouterr().out
    with pytest.raises(DatasetError, match=r"1 of 9 pairs have equal answers \(row 9\)"):
        make(tmp_path / "refused", {"identical_pairs": "refuse"}, rows=rows).train()
    with pytest.raises(DatasetError, match=r"^data\.train: 1 of 1 pairs have equal answers \(row 1\), and no row is"):
        make(tmp_path / "none", rows=rows[-1:]).train()


def test_it_learns_the_preferences(tmp_path: Path) -> None:
    run = Run(
        "dpo",
        model="builtin",
        data={"train": demo_rows("train", 96), "eval": demo_rows("held-out", 32)},
        train={"bf16": False, "per_device_train_batch_size": 16, "max_steps": 12, "learning_rate": 3e-4},
        output_dir=str(tmp_path / "run"),
    )
    metrics = run.train().metrics
    assert metrics["eval_loss"] < 0.66 < math.log(2)
    assert metrics["eval_rewards/accuracies"] > 0.6
