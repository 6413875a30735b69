"""The update: the same however the global batch is cut, and that of a loop written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from llmtk import Batch, Group, LossOutput, Mean, Round, Sequence, Term, TrainingError
from llmtk.training.micro_batches import MicroBatch
from llmtk.training.order import RowOrder
from llmtk.training.tally import Tally, WindowTally, objective

from .kit import ROWS, Lm, assert_near, group_of, lines, make, series, weights


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        self.given = [p.grad.clone() for p in params]
        return super().step(closure)


class KeepsGradients(Lm):
    def build_optimizer(self, run):
        return Keeping(run.hooks.parameter_groups(), lr=run.config.train.learning_rate)


class TwoDenominators(KeepsGradients):
    """Log-likelihood by the token, and the sequences' mean by the sequence: both unequal over micro-batches."""

    def prepare_batch(self, run, rows):
        groups = [group_of(row) for row in rows]
        return Round.of(
            [Group(g.sequences, {**g.weights, "rows": 1 + i % 3}, place=g.place) for i, g in enumerate(groups)]
        )

    def compute_loss(self, run, batch):
        scores = run.score(batch)
        by_row = (scores.mean() * batch.weights["rows"].float()).sum()
        terms = {"nll": Term(-scores.logps.sum(), "tokens"), "mean": Term(-by_row, "rows", coefficient=0.3)}
        return LossOutput(terms, {}, scores)


CUTS = {
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "8x1": {"per_device_train_batch_size": 8},
    "tokens": {"per_device_train_batch_size": 8, "micro_batch_tokens": 30},
}


@pytest.mark.parametrize("stage", [KeepsGradients, TwoDenominators])
def test_gradients_do_not_depend_on_the_cut(tmp_path, stage):
    found = {}
    for name, cut in CUTS.items():
        run = make(tmp_path / name, stage, max_steps=1, max_grad_norm=0, logging_steps=1, **cut)
        run.train()
        names = {id(p): n for n, p in run.model.named_parameters()}
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        found[name] = {names[id(p)]: g for p, g in zip(params, run.optimizer.given, strict=True)}
        found[name]["loss"] = torch.tensor(series(run, "loss"), dtype=torch.float64)
    for name in ("1x8", "4x2", "tokens"):
        assert_near(found[name], found["8x1"], 1e-6)


@pytest.mark.parametrize("optimizer", [{"optim": "sgd"}, {"optim": "adamw_torch", "adam_epsilon": 1e-5}])
def test_parameters_after_20_steps_do_not_depend_on_the_cut(tmp_path, optimizer):
    found = {}
    for name in ("1x8", "8x1"):
        run = make(tmp_path / name, max_steps=20, **{"learning_rate": 1e-3} | optimizer | CUTS[name])
        run.train()
        found[name] = weights(run)
    assert_near(found["1x8"], found["8x1"], 1e-6)


def test_the_update_is_that_of_a_loop_written_by_hand(tmp_path):
    """Clipping that bites, AdamW with decay on matrices alone, a linear schedule; three steps."""
    settings = {"learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "adam_beta2": 0.95}
    run = make(tmp_path / "run", optim="adamw_torch", max_steps=3, warmup_steps=2, logging_steps=1, **settings)
    run._set_up()
    model = copy.deepcopy(run.model)
    rows = [[run.train_rows[i] for i in RowOrder(12, seed=42).take(12)[at : at + 4]] for at in (0, 4, 8)]
    run.train()

    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    norms, losses = [], []
    for step, batch in enumerate(rows):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (0, 0.5, 1)[step]
        total = sum(len(row["input_ids"]) - 1 for row in batch)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones(len(row["input_ids"])) for row in batch], batch_first=True)
        logits = model(input_ids=ids[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (loss * real[:, 1:].flatten()).sum() / total
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()

    assert min(norms) > 0.5
    assert series(run, "grad_norm") == pytest.approx(norms, rel=1e-5)
    assert series(run, "loss") == pytest.approx(losses, rel=1e-6)
    assert series(run, "learning_rate") == pytest.approx([0, 1.5e-3, 3e-3])
    assert_near(weights(run), dict(model.state_dict()), 1e-7)


def test_no_clipping_at_norm_zero(tmp_path):
    class Loud(KeepsGradients):
        def compute_loss(self, run, batch):
            output = super().compute_loss(run, batch)
            return LossOutput({"loss": Term(output.terms["loss"].sum, "tokens", coefficient=1000)})

    norms = {}
    for bound in (0, 1.0):
        run = make(tmp_path / str(bound), Loud, max_steps=1, max_grad_norm=bound, logging_steps=1)
        run.train()
        given = torch.stack([g.norm() for g in run.optimizer.given]).norm()
        norms[bound] = (float(given), series(run, "grad_norm")[0])
    assert norms[0][0] == pytest.approx(norms[0][1], rel=1e-5)
    assert norms[0][1] == pytest.approx(norms[1][1], rel=1e-5)
    assert norms[0][0] > 1000
    assert norms[1][0] == pytest.approx(1, rel=1e-5)


def terms(**values: tuple[float, str, float]) -> dict[str, Term]:
    return {name: Term(torch.tensor(s, requires_grad=True), per, c) for name, (s, per, c) in values.items()}


def test_each_term_is_divided_by_its_own_total():
    found = objective(terms(a=(6.0, "tokens", 1.0), b=(5.0, "pairs", 0.5)), {"tokens": 12, "pairs": 2}, world_size=3)
    assert found.item() == pytest.approx(3 * (6 / 12 + 0.5 * 5 / 2))


def test_a_weight_that_totals_zero_drops_its_term():
    given = terms(a=(6.0, "tokens", 1.0), b=(math.nan, "pairs", 1.0))
    found = objective(given, {"tokens": 12, "pairs": 0}, 1)
    found.backward()
    assert found.item() == 0.5
    assert given["a"].sum.grad.item() == pytest.approx(1 / 12)


def test_a_batch_whose_terms_are_all_dropped_still_has_a_backward_pass():
    given = terms(a=(6.0, "pairs", 1.0))
    found = objective(given, {"pairs": 0}, 1)
    found.backward()
    assert found.item() == given["a"].sum.grad.item() == 0


def test_a_term_without_a_declared_weight_is_refused():
    with pytest.raises(TrainingError, match=r"'a' is divided by the weight 'token', .*Declared: pairs, tokens"):
        objective(terms(a=(1.0, "token", 1.0)), {"tokens": 1, "pairs": 1}, 1)


def test_a_term_that_is_no_sum_is_refused():
    with pytest.raises(TrainingError, match=r"'a' has shape \(2,\)"):
        objective({"a": Term(torch.ones(2), "tokens")}, {"tokens": 2}, 1)


class Alone:
    def gather(self, value):
        return [value]


def output(loss: float, **metrics: Mean) -> LossOutput:
    return LossOutput({"a": Term(torch.tensor(loss), "tokens", 2.0)}, metrics)


def micro_batch(*tokens: int, counts: bool = True) -> MicroBatch:
    groups = [Group([Sequence([1], [False])], {"tokens": n}, place=f"row {n}") for n in tokens]
    return MicroBatch(Batch.collate(groups), range(len(groups)), counts)


def test_a_window_adds_up_metrics_that_only_some_micro_batches_have():
    window = WindowTally({"tokens": 10})
    window.add(micro_batch(1), output(3.0, kl=Mean(torch.tensor(6.0), 2), nll=Mean(4.0, 2, then="exp")))
    window.add(micro_batch(2), output(4.0, nll=Mean(torch.tensor(2.0), torch.tensor(1))))
    window.add(micro_batch(3), output(1.0, kl=Mean(1.0, 5)))
    window.add(micro_batch(4, counts=False), output(1e9, kl=Mean(1e9, 1)))
    tally, bad = window.finish(Alone())
    assert bad == []
    assert tally.values() == {"loss": 2 * 8 / 10, "kl": 1.0, "nll": pytest.approx(math.exp(2))}


def test_means_over_several_windows_are_of_all_that_they_hold():
    """Of windows with 2 and 8 tokens: the mean over 10 tokens, not the mean of two means."""
    whole = Tally()
    for tokens, loss in ((2, 8.0), (8, 2.0)):
        window = WindowTally({"tokens": tokens})
        window.add(micro_batch(tokens), output(loss, ppl=Mean(loss, tokens, then="exp")))
        whole.add(window.finish(Alone())[0])
    assert whole.values() == {"loss": 2.0, "ppl": pytest.approx(math.e)}


def test_several_terms_are_logged_apart_before_their_coefficients():
    tally = Tally(terms={"a": [6.0, 3.0, 2.0], "b": [1.0, 4.0, 4.0], "c": [0.0, 0.0, 0.0]})
    assert tally.values() == {"loss": 2.5, "loss/a": 3.0, "loss/b": 0.25, "loss/c": 0.0}


def test_a_metric_without_counts_is_left_out_and_a_huge_one_is_infinite():
    tally = Tally(metrics={"none": [0.0, 0.0, "identity"], "huge": [1e5, 1.0, "exp"]})
    assert tally.values() == {"huge": math.inf}, "nor is there a loss where no step counted"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_of_a_micro_batch_whose_loss_is_not_finite_are_named(bad):
    window = WindowTally({"tokens": 10})
    for part, loss in ((micro_batch(1, 2), 1.0), (micro_batch(3, 4), bad), (micro_batch(5), 1.0)):
        window.add(part, output(loss))
    assert window.finish(Alone())[1] == ["row 3", "row 4"]


def test_a_dropped_terms_sum_is_no_reason_to_refuse_a_step():
    window = WindowTally({"tokens": 10, "pairs": 0})
    loss = {"a": Term(torch.tensor(1.0), "tokens"), "b": Term(torch.tensor(math.nan), "pairs")}
    window.add(micro_batch(1), LossOutput(loss))
    tally, bad = window.finish(Alone())
    assert bad == []
    assert tally.values()["loss"] == pytest.approx(0.1)


def test_a_term_whose_weight_totals_zero_trains_as_if_it_were_absent(tmp_path):
    class Dropped(KeepsGradients):
        def prepare_batch(self, run, rows):
            return Round.of([Group(g.sequences, {**g.weights, "pairs": 0}) for g in map(group_of, rows)])

        def compute_loss(self, run, batch):
            inner = super().compute_loss(run, batch)
            return LossOutput({**inner.terms, "pairs": Term(inner.terms["loss"].sum * 7, "pairs")})

    runs = [make(tmp_path / stage.__name__, stage, max_steps=3) for stage in (KeepsGradients, Dropped)]
    for run in runs:
        run.train()
    assert_near(weights(runs[0]), weights(runs[1]), 1e-6)
    assert lines(runs[1])[-1]["loss/pairs"] == 0


def test_an_undeclared_weight_stops_the_run(tmp_path):
    class Misspelt(Lm):
        def compute_loss(self, run, batch):
            return LossOutput({"loss": Term(-run.score(batch).logps.sum(), per="token")})

    with pytest.raises(TrainingError, match="Declared: tokens"):
        make(tmp_path / "run", Misspelt, rows=ROWS[:4]).train()


class AnswersOtherwise(Lm):
    """Answers with what `answer` makes of a sound output."""

    def compute_loss(self, run, batch):
        return self.answer(super().compute_loss(run, batch))


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (lambda out: LossOutput({"loss": out.terms["loss"].sum}), r"the loss term 'loss' is no Term of a tensor but"),
        (lambda out: LossOutput({"loss": Term(1.5, per="tokens")}), r"Write Term\(sum, per=WEIGHT\)"),
        (lambda out: LossOutput(out.terms, {"ppl": 1.5}), r"'ppl' is no Mean but 1.5. Write Mean\(sum, count\)"),
        (
            lambda out: LossOutput({"loss": Term(out.terms["loss"].sum.detach(), "tokens")}),
            r"does not depend on the model",
        ),
        (lambda out: LossOutput({}), r"does not depend on the model"),
    ],
    ids=["a tensor", "a number", "a metric", "detached", "no term"],
)
def test_what_is_no_loss_is_told_in_the_stage_s_words(tmp_path, answer, told):
    stage = AnswersOtherwise()
    stage.answer = answer
    with pytest.raises(TrainingError, match=told):
        make(tmp_path, stage, max_steps=1).train()
