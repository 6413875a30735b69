"""The loss and the window's KL against closed forms, the derangement, and that no cut of a window changes anything.

The file is also what each of two processes does: `python -m torch.distributed.run ... test_llmtk_stage_kto.py OUT`.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llmtk_stage_kto import KahnemanTverskyOptimization, _advice, _fitted, _group, losses, mismatch

import llmtk
from llmtk import Batch, ConfigurationError, Run, hookimpl
from llmtk.run import Interrupted
from llmtk.training import checkpoints

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
REAL = Path(__file__).parents[3] / "shared" / "data" / "kto_en_demo.json"
SGD = {"optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0}
CUTS: dict[str, dict[str, Any]] = {
    "1x8": {},
    "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    "by tokens": {"micro_batch_tokens": 40},
    "shuffled": {},
}


class Kto(KahnemanTverskyOptimization):
    """The stage, under its name though it is not found by its entry point; it keeps the first gradient."""

    name = "kto"

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self.gradient: list[float] = []

    def build_optimizer(self, run: Any) -> Any:
        optimizer = super().build_optimizer(run)

        def keep(*_: Any) -> None:
            if not self.gradient:
                self.gradient = torch.cat([p.grad.flatten() for p in run.model.parameters()]).tolist()

        optimizer.register_step_pre_hook(keep)
        return optimizer


class Moved:
    """Moves the policy away from its reference before the first step."""

    @hookimpl
    def run_started(self, run: Any, plan: Any) -> None:
        move(run)


class Shuffled:
    """Rows in the order of the data, or shuffled inside each window of 8."""

    def __init__(self, shuffled: bool) -> None:
        self.shuffled = shuffled

    @hookimpl
    def order_examples(self, run: Any, epoch: int) -> list[int]:
        inside = [5, 2, 7, 0, 3, 6, 1, 4] if self.shuffled else list(range(8))
        return [8 * window + place for window in range(3) for place in inside]


class StopAt:
    """Sends SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    @hookimpl
    def step_finished(self, run: Any, step: Any) -> None:
        if step.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def move(run: Any) -> None:
    """Make the letters of which answers consist likelier everywhere, so that the KL is well over zero."""
    end = run.tokenizer.eos_token
    ids = torch.tensor([run.tokenizer(f"pqpq3aabba{end}pq7bbaab{end}")["input_ids"]])
    parameters = list(run.model.parameters())
    for _ in range(5):
        logps = run.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        likelihood = logps.gather(-1, ids[0, 1:, None]).mean()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(likelihood, parameters), strict=True):
                parameter.add_(gradient, alpha=0.3)


def labelled(count: int) -> list[dict[str, Any]]:
    """Return rows of different lengths; prompts come twice."""
    return [
        {"prompt": f"{'pq' * (1 + i % 3)}{i // 2}", "completion": "ab"[i % 2] * (1 + i % 4) + "a", "label": i % 3 > 0}
        for i in range(count)
    ]


def make(folder: Path, rows: Any, options: dict[str, Any] | None = None, **sections: Any) -> Run:
    """Make a run of a tiny model, whose distributions are far from uniform."""
    train = {"bf16": False, "per_device_train_batch_size": 8, "logging_steps": 1, **sections.pop("train", {})}
    data = {"train": rows, "eval": rows if isinstance(rows, list) else 0.1, **sections.pop("data", {})}
    model = {"from_config": TINY, "tokenizer": {"kind": "byte"}, **sections.pop("model", {})}
    return Run(Kto, model=model, data=data, kto=options or {}, train=train, output_dir=str(folder), **sections)


def lines(run: Run) -> list[dict[str, float]]:
    """Return the training's lines of metrics."""
    return [line for line in run.records.read("metrics") if "loss" in line]


# The loss


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("kl", [0.0, 1.7])
def test_the_loss_and_its_gradient_have_their_closed_form(beta: float, desirable: bool, kl: float) -> None:
    for r in (-3.0, 0.0, 0.4, 5.0):
        ratio = torch.tensor([r], dtype=torch.float64, requires_grad=True)
        loss = losses(ratio, torch.tensor([desirable]), kl, beta)
        loss.sum().backward()
        z = beta * (r - kl) if desirable else beta * (kl - r)
        value = 1 - 1 / (1 + math.exp(-z))
        slope = -beta * value * (1 - value) * (1 if desirable else -1)
        assert float(loss.detach()) == pytest.approx(value, rel=1e-12)
        assert ratio.grad is not None
        assert float(ratio.grad) == pytest.approx(slope, rel=1e-12)


def test_the_gradient_is_that_of_finite_differences() -> None:
    ratios = torch.randn(6, dtype=torch.float64, requires_grad=True)
    desirable = torch.tensor([True, False] * 3)
    assert torch.autograd.gradcheck(lambda r: losses(r, desirable, 0.3, 0.5), [ratios])


def exact_logps(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return log pi(answer | prompt) in the model's own type, by itself."""
    ids = torch.tensor([prompt + answer])
    logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum((logps[len(prompt) + i - 1, token] for i, token in enumerate(answer)), torch.zeros(())).double()


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_a_window_of_two_rows_has_its_closed_form(tmp_path: Path, loss: str) -> None:
    """Two rows have one derangement, so that all can be written down: in float64, with plain models."""
    rows = [{"prompt": "12", "completion": "aba", "label": True}, {"prompt": "3", "completion": "aa", "label": False}]
    options = {"loss": loss, "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    run = make(tmp_path / "run", rows, options)
    run.evaluate()
    run.save(tmp_path / "reference")
    move(run)
    run.save(tmp_path / "policy")
    batch = run.hooks.prepare_batch([run.train_rows[0], run.train_rows[1]]).windows[0]
    output = run.hooks.compute_loss(batch)
    run.model.zero_grad()
    output.terms["loss"].sum.backward()

    policy, reference = (llmtk.load(str(tmp_path / name))[0].double().eval() for name in ("policy", "reference"))
    first, second = run.train_rows[0], run.train_rows[1]

    def ratio(prompt: Any, answer: Any) -> torch.Tensor:
        both = [exact_logps(model, prompt["prompt_ids"], answer["completion_ids"]) for model in (policy, reference)]
        return both[0] - both[1].detach()

    kl = max(0.0, float(ratio(first, second).detach() + ratio(second, first).detach()) / 2) if loss == "kto" else 0.0
    good, bad = 0.3 * (ratio(first, first) - kl), 0.3 * (kl - ratio(second, second))
    value = 1.5 * (1 - good.sigmoid()) + 0.5 * (1 - bad.sigmoid())
    value.backward()

    assert kl > 0.1 or loss != "kto", "a KL that is clamped would show nothing"
    assert batch.per_group["kl"].tolist() == pytest.approx([kl, kl], rel=1e-5)
    assert (output.terms["loss"].per, float(batch.weights["rows"].sum())) == ("rows", 2.0)
    assert float(output.terms["loss"].sum.detach()) == pytest.approx(float(value.detach()), rel=1e-6)
    found, wanted = (torch.cat([p.grad.double().flatten() for p in m.parameters()]) for m in (run.model, policy))
    assert (found - wanted).norm() / wanted.norm() < 1e-5


@pytest.mark.parametrize("scoring", ["packed", "padded"])
@pytest.mark.parametrize("bf16", [False, True])
def test_an_untrained_policy_has_no_rewards_and_half_of_each_weight(tmp_path: Path, bf16: bool, scoring: str) -> None:
    settings = {"bf16": bf16, "max_steps": 1, "scoring": "auto" if scoring == "packed" else scoring}
    run = make(tmp_path / "run", labelled(8), {"desirable_weight": 1.5, "undesirable_weight": 0.5}, train=settings)
    run.train()
    (line,) = lines(run)
    desirable = sum(row["label"] for row in labelled(8))
    assert line["loss"] == pytest.approx((1.5 * desirable + 0.5 * (8 - desirable)) / 8 / 2, rel=1e-7)
    assert [line[name] for name in ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins")] == [0, 0, 0, 0]


def test_metrics_are_means_over_the_rows_of_each_label(tmp_path: Path) -> None:
    run = make(tmp_path / "run", labelled(8), {"beta": 0.5}, train={"per_device_eval_batch_size": 3})
    run.evaluate()
    move(run)
    values = run.evaluate()
    batch = run.hooks.prepare_batch([run.eval_rows[index] for index in range(8)]).windows[0]
    logps, reference = run.score(batch).sum().detach(), batch.sum_by_sequence(batch.per_target["reference_logps"])
    good = batch.per_group["desirable"]
    for name, each in {"logps": logps, "rewards": 0.5 * (logps - reference)}.items():
        assert values[f"{name}/chosen"] == pytest.approx(float(each[good].mean()), rel=1e-5)
        assert values[f"{name}/rejected"] == pytest.approx(float(each[~good].mean()), rel=1e-5)
    margin = values["rewards/chosen"] - values["rewards/rejected"]
    assert values["rewards/margins"] == pytest.approx(margin, rel=1e-5)
    assert values["kl"] > 0
    assert values["kl_own_prompt"] == 0


# The derangement


@given(st.lists(st.integers(0, 5), min_size=2, max_size=20), st.integers(0, 99))
def test_no_row_gets_its_own_answer_and_as_few_as_can_be_one_of_their_prompt(prompts: list[int], seed: int) -> None:
    names = [str(prompt) for prompt in prompts]
    partner = mismatch(names, torch.Generator().manual_seed(seed))
    assert sorted(partner) == list(range(len(names)))
    assert all(row != other for row, other in enumerate(partner))
    most = max(Counter(names).values())
    shared = sum(names[row] == names[other] for row, other in enumerate(partner))
    assert shared == max(0, 2 * most - len(names))


def test_the_derangement_is_drawn_evenly_and_anew() -> None:
    generator = torch.Generator().manual_seed(0)
    singles = Counter((row, other) for _ in range(3000) for row, other in enumerate(mismatch(list("abcde"), generator)))
    assert len(singles) == 20
    assert all(abs(count / 3000 - 1 / 4) < 0.05 for count in singles.values())
    pairs = Counter((row, other) for _ in range(3000) for row, other in enumerate(mismatch(list("aabbcc"), generator)))
    assert len(pairs) == 24
    assert all(abs(count / 3000 - 1 / 4) < 0.05 for count in pairs.values())


def test_an_answer_is_cut_to_what_fits_and_nothing_is_a_target_without_something_before_it() -> None:
    ids, targets = [1, 2, 3], [True, True, False]
    assert _fitted({"prompt_ids": [7, 7]}, ids, targets, 4) == ([1, 2], [True, True])
    assert _fitted({"prompt_ids": []}, ids, targets, 9) == ([1, 2, 3], [False, True, False])


def test_rows_of_one_prompt_are_told_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "one", "completion": f"a{i}", "label": i % 2 == 0} for i in range(4)]
    assert make(tmp_path / "all", rows).evaluate()["kl_own_prompt"] == 1
    assert "More than half of a window's rows have one prompt" in capsys.readouterr().out
    others = [{"prompt": f"other {i}", "completion": "b", "label": True} for i in range(2)]
    assert make(tmp_path / "most", rows + others).evaluate()["kl_own_prompt"] == pytest.approx(2 / 6)
    run = make(tmp_path / "half", rows + others * 2)
    capsys.readouterr()
    assert run.evaluate()["kl_own_prompt"] == 0
    assert "one prompt" not in capsys.readouterr().out


# The same however it is cut


def trained(folder: Path, cut: str, rows: int = 24) -> dict[str, Any]:
    """Train three steps away from the reference, and return what came of it."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    settings = SGD | {"max_steps": 3, "eval_strategy": "no", "per_device_train_batch_size": 8 // ranks} | CUTS[cut]
    plugins = [Moved(), *([Shuffled(cut == "shuffled")] if rows == 24 else [])]
    run = make(folder, labelled(rows), plugins=plugins, train=settings)
    run.train()
    weights = torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]).tolist()
    evaluation = run.evaluate()
    return {"lines": lines(run), "gradient": run.stage.gradient, "weights": weights, "evaluation": evaluation}


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare losses, metrics, the first gradient and the weights."""
    for name in ("gradient", "weights"):
        first, second = (torch.tensor(found[name], dtype=torch.float64) for found in (one, other))
        assert (first - second).norm() / first.norm() < 1e-6, name
    for first, second in zip([*one["lines"], one["evaluation"]], [*other["lines"], other["evaluation"]], strict=True):
        assert second == pytest.approx(first, rel=2e-5, abs=1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = trained(tmp_path_factory.mktemp("whole") / "run", "1x8")
    assert all(line["kl"] > 0.1 for line in found["lines"]), "a KL that is clamped would show nothing"
    return found


@pytest.mark.parametrize("cut", ["4x2", "by tokens", "shuffled"])
def test_a_window_is_the_same_however_it_is_cut(tmp_path: Path, whole: dict[str, Any], cut: str) -> None:
    found = trained(tmp_path / "run", cut)
    assert_same(whole, found)
    assert found["gradient"] != whole["gradient"], "it was cut differently, so it differs in the last bits"


def test_two_ranks_do_as_one_does(tmp_path: Path, whole: dict[str, Any]) -> None:
    """Also where one of them has no row, and where a window has one row alone."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, "--master-port", port, __file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert_same(whole, found["whole"])
        assert_same(trained(tmp_path / f"tail-{rank}-alone", "1x8", rows=17), found["tail"])


def test_the_kl_is_one_for_the_window_where_shifted_micro_batches_have_one_each(tmp_path: Path) -> None:
    """A difference from TRL by choice: it pairs each row with the answer before it in its own micro-batch."""
    run = make(tmp_path / "run", labelled(8))
    run.evaluate()
    move(run)
    rows = [run.train_rows[index] for index in range(8)]

    def shifted(cut: list[dict[str, Any]]) -> float:
        before = [cut[-1], *cut[:-1]]
        groups = [
            _group(row, other["completion_ids"], other["completion_targets"])
            for row, other in zip(cut, before, strict=True)
        ]
        batch = Batch.collate(groups)
        logps, reference = run.score_window(batch).logps, run.score_window(batch, model="reference").logps
        return max(0.0, float((logps - reference).sum()) / len(cut))

    drawn = run.generator("mismatch").get_state()
    kls = []
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        run.generator("mismatch").set_state(drawn)
        kls += run.hooks.prepare_batch(order).windows[0].per_group["kl"].tolist()
    assert kls == pytest.approx([kls[0]] * 24, rel=1e-6)
    by_cut = [shifted(rows), shifted(rows[:4]), shifted(rows[4:]), shifted(rows[::-1])]
    assert len({round(kl, 3) for kl in by_cut}) == 4


def test_evaluation_leaves_the_run_as_it_was_and_carries_a_kl_of_its_own(tmp_path: Path) -> None:
    run = make(tmp_path / "run", labelled(9))
    run.evaluate()
    move(run)
    run.hooks.prepare_batch([run.train_rows[index] for index in range(8)])
    state, carried = run.generator("mismatch").get_state(), run.stage.extra_checkpoint_state(run)
    first, second = run.evaluate(), run.evaluate()
    assert first == second
    assert torch.equal(run.generator("mismatch").get_state(), state)
    assert run.stage.extra_checkpoint_state(run) == carried


# Windows of one row, and resuming


def test_a_window_of_one_row_keeps_the_last_kl_also_across_a_stop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = labelled(9)
    settings = {"train": {"max_steps": 5, "per_device_train_batch_size": 4, "save_steps": 1, "learning_rate": 1e-2}}
    never = make(tmp_path / "never", rows, plugins=[StopAt(-1)], **settings)
    never.train()
    assert capsys.readouterr().out.count("A window of one row") == 1
    kl = [line["kl"] for line in lines(never)]
    assert kl[1] == kl[2] > 0
    assert kl[3] != kl[2]

    with pytest.raises(Interrupted):
        make(tmp_path / "stopped", rows, plugins=[StopAt(2)], **settings).train()
    again = make(tmp_path / "stopped", rows, plugins=[StopAt(-1)], resume="auto", **settings)
    again.train()
    assert again.records.read("metrics") == never.records.read("metrics")
    for (name, one), other in zip(never.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    states = [checkpoints.load_rank(checkpoints.path_of(run.checkpoints, 5), 0) for run in (never, again)]
    assert states[0][1]["plugins"] == states[1][1]["plugins"]
    assert states[0][1]["plugins"]["kto"]["kl"] == pytest.approx(kl[4], rel=1e-6)


def test_windows_of_one_row_alone_have_no_kl(tmp_path: Path) -> None:
    run = make(tmp_path / "run", labelled(3), train={"max_steps": 3, "per_device_train_batch_size": 1})
    run.train()
    assert [line["kl"] for line in lines(run)] == [0, 0, 0]


# Labels and options


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone_is_allowed_and_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], label: bool
) -> None:
    rows = [row | {"label": label} for row in labelled(8)]
    run = make(tmp_path / "run", rows, train={"max_steps": 3, "learning_rate": 1e-3})
    result = run.train()
    counts = "8 rows are desirable and 0 are not" if label else "0 rows are desirable and 8 are not"
    assert f"Warning. Labels: {counts}" in capsys.readouterr().out
    assert result.steps == 3
    there, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert {f"rewards/{there}", f"logps/{there}"} <= lines(run)[-1].keys()
    assert not {f"rewards/{absent}", f"logps/{absent}", "rewards/margins"} & lines(run)[-1].keys()


def test_weights_are_recommended_from_the_counts() -> None:
    plain = KahnemanTverskyOptimization.Options()
    assert "1.20 to 1, recommended is 1 to 4/3" in _advice(1200, 1000, plain)
    told = _advice(100, 1000, plain)
    assert "kto.desirable_weight from 10 to 13.3, or kto.undesirable_weight from 0.075 to 0.1" in told
    for weights in ({"desirable_weight": 10.0}, {"desirable_weight": 13.3}, {"undesirable_weight": 0.0751}):
        assert "suit" in _advice(100, 1000, KahnemanTverskyOptimization.Options(**weights))


def test_pairs_become_two_labelled_rows(tmp_path: Path) -> None:
    run = make(tmp_path / "run", [{"prompt": "one", "chosen": "a", "rejected": "b"}] * 2)
    run.evaluate()
    assert [run.train_rows[index]["label"] for index in range(4)] == [True, False] * 2


def test_precomputed_references_are_for_the_loss_without_a_kl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTK_CACHE", str(tmp_path / "cache"))
    once = {"precompute_reference": True, "max_steps": 3}
    with pytest.raises(ConfigurationError, match=r"mismatched prompts and answers.*apo_zero_unpaired"):
        make(tmp_path / "refused", "absent.jsonl", train=once).train()
    apo = {"loss": "apo_zero_unpaired"}
    runs = [
        make(tmp_path / name, labelled(8), apo, train={**once, "precompute_reference": name == "once"})
        for name in ("once", "each")
    ]
    for run in runs:
        run.train()
    assert lines(runs[0]) == lines(runs[1])
    assert runs[0].generator("mismatch").get_state().equal(runs[1].generator("mismatch").get_state())


# Training


@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_it_learns_which_answers_are_desirable(tmp_path: Path, loss: str) -> None:
    rows = [{"prompt": f"{i}:", "completion": "ab"[i % 2] * 3, "label": i % 2 == 0} for i in range(16)]
    train = {"max_steps": 60, "learning_rate": 1e-2, "warmup_steps": 5, "per_device_eval_batch_size": 16}
    run = make(tmp_path / "run", rows, {"loss": loss}, train=train)
    result = run.train()
    assert result.metrics["eval_loss"] < 0.35
    assert result.metrics["eval_rewards/chosen"] > 0 > result.metrics["eval_rewards/rejected"]
    assert result.metrics["eval_rewards/margins"] > 1


@pytest.mark.slow
def test_the_demo_improves(tmp_path: Path) -> None:
    figures = Run(Kto, output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"] + 0.02
    assert figures["exact match_after"] >= figures["exact match_before"]


@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} beside the repository")
def test_it_trains_on_real_labels(tmp_path: Path) -> None:
    settings = {"max_steps": 3, "eval_strategy": "no"}
    run = make(tmp_path / "run", str(REAL), data={"max_length": 256, "eval": None}, train=settings)
    assert run.train().steps == 3
    assert lines(run)[0]["loss"] == 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    out, rank = Path(sys.argv[1]), os.environ["RANK"]
    answers = {"whole": trained(out / "whole", "1x8"), "tail": trained(out / "tail", "1x8", rows=17)}
    (out / f"{rank}.json").write_text(json.dumps(answers))
