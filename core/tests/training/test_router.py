"""The router loss of a mixture-of-experts model is trained on, whatever the stage does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llmtk import Group, LossOutput, Mean, Round, Sequence, Term, TrainingError, hookimpl

from .kit import EVAL, Lm, lines, make
from .test_objective import KeepsGradients

COEFFICIENT = 0.5
FIELDS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
    "output_router_logits": True,
    "router_aux_loss_coef": COEFFICIENT,
}
WAYS = ("auto", "padded")


def moe(path, stage=KeepsGradients, *, kind="mixtral", fields=FIELDS, **train):
    model = {"from_config": {"model_type": kind, **fields}, "tokenizer": {"kind": "byte"}}
    settings = {"max_steps": 1, "max_grad_norm": 1e9, "logging_steps": 1} | train
    return make(path, stage, model=model, eval=EVAL, **settings)


def by_hand(run, parts):
    """Return loss, router loss and gradients of micro-batches (lists of rows), by the model's own forward, row by row.

    Router loss: E sum_e f_e P_e over all tokens of a micro-batch that are fed, weighted by all its tokens.
    """
    config = AutoConfig.for_model("mixtral", **model_fields(run))
    exact = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    exact.load_state_dict(run.start)
    total = sum(len(ids) for part in parts for ids in part)
    targets = sum(len(ids) - 1 for part in parts for ids in part)
    loss, router_loss = 0.0, 0.0
    for part in parts:
        routers = [[], []]
        for ids in part:
            output = exact(input_ids=torch.tensor([ids[:-1]]), output_router_logits=True)
            loss = loss - output.logits[0].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum() / targets
            for layer, logits in enumerate(output.router_logits):
                routers[layer].append(logits)
        p = torch.cat([torch.cat(layer) for layer in routers]).softmax(-1)
        f = torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0).mean(0)
        router_loss = router_loss + 4 * (f * p.mean(0)).sum() * sum(map(len, part)) / total
    (loss + COEFFICIENT * router_loss).backward()
    return float(loss), float(router_loss), {name: p.grad for name, p in exact.named_parameters()}


def model_fields(run):
    config = run.model.config.to_dict()
    return {name: value for name, value in config.items() if name != "model_type"}


def started(run):
    """Set a run up, and keep its weights and its first rows."""
    run.evaluate()
    run.start = {name: value.detach().double().clone() for name, value in run.model.state_dict().items()}
    taken = []
    prepare = run.hooks.prepare_batch
    run.hooks.prepare_batch = lambda rows: taken.append(rows) or prepare(rows)
    return taken


def assert_gradients(run, expected):
    parameters = {id(p): name for name, p in run.model.named_parameters()}
    optimizer = getattr(run.optimizer, "optimizer", run.optimizer)
    order = [parameters[id(p)] for group in optimizer.param_groups for p in group["params"]]
    for name, found in zip(order, optimizer.given, strict=True):
        assert float((found.double() - expected[name]).norm()) <= 1e-5 * float(expected[name].norm()), name


@pytest.mark.parametrize("scoring", WAYS)
@pytest.mark.parametrize("size", [1, 3, 6])
def test_each_micro_batch_counts_by_its_tokens(tmp_path, scoring, size):
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 6 // size}
    run = moe(tmp_path / "run", scoring=scoring, learning_rate=1e-3, **cut)
    taken = started(run)
    run.train()
    assert run.forward.scorers[None].packed == (scoring == "auto")
    ids = [list(row["input_ids"]) for row in taken[0]]
    assert len({len(row) for row in ids}) > 2
    loss, router_loss, gradients = by_hand(run, [ids[i : i + size] for i in range(0, 6, size)])
    line = next(line for line in lines(run) if "loss" in line)
    assert line["loss"] == pytest.approx(loss + COEFFICIENT * router_loss, rel=1e-5)
    assert line["router_loss"] == line["loss/router_loss"] == pytest.approx(router_loss, rel=1e-5)
    assert line["loss/loss"] == pytest.approx(loss, rel=1e-5)
    assert_gradients(run, gradients)


def test_both_ways_evaluate_to_the_same(tmp_path):
    found = [moe(tmp_path / scoring, scoring=scoring).evaluate() for scoring in WAYS]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0]["loss"] == pytest.approx(found[0]["loss/loss"] + COEFFICIENT * found[0]["router_loss"])


class Busy(KeepsGradients):
    """Scores its batch twice, maps its logits, and looks at another one without gradient."""

    def compute_loss(self, run, batch):
        with torch.no_grad():
            run.score(batch.select([0]))
        first, second = run.score(batch), run.score(batch)
        third = run.map_logits(batch, lambda logits: logits.logsumexp(-1))
        nll = -(first.logps + second.logps).sum() / 2 + 0 * third.sum()
        return LossOutput({"loss": Term(nll, per="tokens")})


class OnlyMaps(KeepsGradients):
    """Never asks for a score."""

    def compute_loss(self, run, batch):
        def nll(logits, targets):
            return -logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

        return LossOutput({"loss": Term(run.map_logits(batch, nll, [batch.target_tokens]).sum(), per="tokens")})


class Twice:
    """A plugin that computes the loss twice."""

    name = "twice"

    @hookimpl
    def around_compute_loss(self, run, batch, inner):
        outputs = [inner(batch), inner(batch)]
        summed = sum(output.terms["loss"].sum for output in outputs) / 2
        return LossOutput({"loss": Term(summed, per="tokens")})


@pytest.mark.parametrize("scoring", WAYS)
@pytest.mark.parametrize("what", ["busy", "only maps", "twice"])
def test_it_counts_once_however_often_the_policy_is_asked(tmp_path, scoring, what):
    stage = {"busy": Busy, "only maps": OnlyMaps, "twice": KeepsGradients}[what]
    plain, other = (
        moe(tmp_path / name, stage, scoring=scoring, learning_rate=1e-3)
        for name, stage in (("plain", KeepsGradients), ("other", stage))
    )
    if what == "twice":
        model = {"from_config": {"model_type": "mixtral", **FIELDS}, "tokenizer": {"kind": "byte"}}
        settings = {"max_steps": 1, "max_grad_norm": 1e9, "learning_rate": 1e-3, "scoring": scoring}
        other = make(tmp_path / "twice", model=model, eval=EVAL, plugins=[Twice()], stage=KeepsGradients, **settings)
    for run in (plain, other):
        run.train()
    first, second = (next(line for line in lines(run) if "loss" in line) for run in (plain, other))
    for name in ("loss", "loss/loss", "router_loss", "grad_norm"):
        assert second[name] == pytest.approx(first[name], rel=1e-5)


def test_a_model_that_is_not_asked_for_it_has_none(tmp_path):
    run = moe(tmp_path / "run", Lm, fields=FIELDS | {"output_router_logits": False})
    run.train()
    assert not any("router" in name for line in lines(run) for name in line)


def test_a_model_that_has_none_says_so(tmp_path, capsys):
    fields = {
        name: value for name, value in FIELDS.items() if name not in ("num_local_experts", "router_aux_loss_coef")
    }
    run = moe(tmp_path / "run", Lm, kind="glm4_moe", fields=fields | {"n_routed_experts": 4})
    run.train()
    assert "the model has no router loss: none added" in " ".join(capsys.readouterr().out.split())
    assert not any("router" in name for line in lines(run) for name in line)


def test_a_term_of_that_name_is_refused(tmp_path):
    class Own(Lm):
        def compute_loss(self, run, batch):
            inner = super().compute_loss(run, batch)
            return LossOutput({**inner.terms, "router_loss": Term(inner.terms["loss"].sum, "tokens")})

    with pytest.raises(TrainingError, match="a term 'router_loss' of its own"):
        moe(tmp_path / "run", Own).train()


def test_rows_without_a_target_are_not_trained_on(tmp_path):
    class Nothing(Lm):
        def prepare_batch(self, run, rows):
            return Round.of(
                [Group([Sequence(r["input_ids"], [False] * len(r["input_ids"]))], {"tokens": 0}) for r in rows]
            )

        def compute_loss(self, run, batch):
            return LossOutput({"loss": Term(-run.score(batch).logps.sum(), "tokens")}, {"rows": Mean(len(batch), 1)})

    run = moe(tmp_path / "run", Nothing, eval_strategy="no")
    run.train()
    assert run.state.skipped == 1
