"""Optimizers by name: the updates of transformers' Trainer, runs that go on to the bit, and what is refused and why."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from llmtk import CheckpointError, ConfigurationError, LossOutput, Models, Round, Term, hookimpl
from llmtk.config.sections import TrainConfig
from llmtk.run import Interrupted
from llmtk.training import checkpoints
from llmtk.training.optimizers import OPTIMIZERS, REFUSED, build_optimizer, check_optimizer

from .kit import Lm, assert_same_run, group_of, make

TARGET = torch.tensor([[0.3, -0.7, 1.1], [0.2, 0.9, -0.4]])
STEPS = 4


def matrices() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return torch.nn.Linear(3, 2)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    return ((model.weight - TARGET) ** 4).sum() + (model.bias**2).sum()


class Bowl(Lm):
    """A matrix and a vector that run down into a bowl."""

    def build_models(self, run):
        return Models(matrices())

    def prepare_batch(self, run, rows):
        return Round.of([group_of(row) for row in rows])

    def compute_loss(self, run, batch):
        return LossOutput({"loss": Term(loss_of(run.model) * batch.weights["tokens"].sum(), "tokens")})

    def export_model(self, run, path):
        """Write nothing."""


class Matrix(Bowl):
    """A matrix alone, as an adapter is."""

    def build_models(self, run):
        model = matrices()
        model.bias.requires_grad_(False)
        return Models(model)


class Stop:
    name = "stop"

    @hookimpl
    def step_finished(self, run, step):
        if step.step == 2:
            run.ask_to_stop(15)


SETTINGS = {
    "adamw_torch_fused": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "weight_decay": 0.1},
    "adamw_torch": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-3, "weight_decay": 0.1},
    "sgd": {"optim_args": {"momentum": 0.9, "nesterov": True}, "weight_decay": 0.1},
    "rmsprop": {"optim_args": {"momentum": 0.5, "alpha": 0.9, "centered": True}},
    "adagrad": {"optim_args": {"lr_decay": 0.1, "eps": 1e-4}},
    "adafactor": {"weight_decay": 0.1},
    "stable_adamw": {"adam_beta2": 0.95, "weight_decay": 0.1},
    "adadelta": {"optim_args": {"rho": 0.8}},
    "adam": {"optim_args": {"amsgrad": True}, "adam_epsilon": 1e-3},
    "adamax": {"adam_beta2": 0.9},
    "asgd": {"optim_args": {"t0": 1, "lambd": 0.1}},
    "muon": {"optim_args": {"momentum": 0.8, "nesterov": False}},
    "nadam": {"optim_args": {"momentum_decay": 0.1}},
    "radam": {"weight_decay": 0.1},
    "rprop": {"optim_args": {"etas": [0.4, 1.3]}},
}
"""For each optimizer that can be had here, settings that are not its own."""
TORCHS = {
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.02, rho=0.8),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02, amsgrad=True, eps=1e-3),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.02, betas=(0.9, 0.9)),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.02, t0=1, lambd=0.1),
    "muon": lambda groups: torch.optim.Muon(groups, lr=0.02, momentum=0.8, nesterov=False),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.02, momentum_decay=0.1),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.02, weight_decay=0.1),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.02, etas=(0.4, 1.3)),
}


def bowl(path, name, **more):
    settings = {"optim": name, "learning_rate": 0.02, "lr_scheduler_type": "constant", "max_grad_norm": 0}
    stage = Matrix if name == "muon" else Bowl
    return make(path, stage, **settings | {"max_steps": STEPS} | SETTINGS[name] | more)


def transformers_own(name, groups, folder):
    """Return the optimizer as transformers' Trainer makes it."""
    settings = dict(SETTINGS[name])
    own = settings.pop("optim_args", {})
    written = ",".join(f"{key}={str(value).lower()}" for key, value in own.items()) or None
    arguments = TrainingArguments(
        str(folder), optim=name, optim_args=written, learning_rate=0.02, use_cpu=True, report_to=[], **settings
    )
    kind, keywords = Trainer.get_optimizer_cls_and_kwargs(arguments)
    return kind(groups, **keywords)


def by_hand(name, folder):
    """Return the weights after as many steps in a loop of this file's own."""
    model, decay = matrices(), SETTINGS[name].get("weight_decay", 0.0)
    model.bias.requires_grad_(name != "muon")
    groups = [{"params": [model.weight], "weight_decay": decay}]
    groups += [{"params": [model.bias], "weight_decay": 0.0}] if model.bias.requires_grad else []
    optimizer = TORCHS[name](groups) if name in TORCHS else transformers_own(name, groups, folder)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    return model


def skip_without(name):
    if name == "stable_adamw":
        pytest.importorskip("optimi", reason="torch-optimi is not installed")


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizer_makes_the_updates_that_its_name_stands_for_elsewhere(tmp_path, name):
    skip_without(name)
    run = bowl(tmp_path / "run", name)
    run.train()
    expected, before = by_hand(name, tmp_path / "trainer"), matrices()
    torch.testing.assert_close(run.model.weight, expected.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(run.model.bias, expected.bias, rtol=1e-5, atol=1e-7)
    assert not torch.equal(run.model.weight, before.weight)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_optimizers_state_goes_on_to_the_bit(tmp_path, name):
    skip_without(name)
    whole = bowl(tmp_path / "whole", name)
    whole.train()
    with pytest.raises(Interrupted):
        bowl(tmp_path / "parts", name, plugins=[Stop()]).train()
    parts = bowl(tmp_path / "parts", name, resume="auto")
    parts.train()
    assert_same_run(whole, parts)


def test_every_optimizer_of_transformers_is_known():
    assert {name.value for name in OptimizerNames} <= OPTIMIZERS.keys() | REFUSED.keys()


def test_every_optimizer_of_torch_is_known():
    kinds = {k for k, v in vars(torch.optim).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)}
    known = {place.rpartition(".")[2] for place, _ in OPTIMIZERS.values()} | {"LBFGS", "SparseAdam"}
    assert kinds - {"Optimizer"} <= known


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lomo", "middle of the backward pass"),
        ("galore_adamw_layerwise", "middle of the backward pass"),
        ("apollo_adamw_layerwise", "middle of the backward pass"),
        ("galore_adamw", "Python objects"),
        ("adamw_torch_4bit", "Python objects"),
        ("schedule_free_adamw", "other weights than those to evaluate"),
        ("lbfgs", "several times in a step"),
    ],
)
def test_what_a_run_cannot_use_is_refused_by_name_with_the_reason(tmp_path, name, why):
    with pytest.raises(ConfigurationError, match=rf"train\.optim: {name} cannot be used: .*{why}"):
        make(tmp_path / "run", optim=name)


def test_an_optimizer_whose_package_is_absent_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigurationError, match=r"paged_adamw_8bit needs bitsandbytes.*pip install bitsandbytes"):
        check_optimizer(TrainConfig(optim="paged_adamw_8bit"))


def test_what_bitsandbytes_is_asked_for(monkeypatch):
    """Its names against a class of its signature: it is not installed everywhere."""
    asked = {}

    class AdamW(torch.optim.SGD):
        def __init__(
            self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0, optim_bits=32, is_paged=False
        ):
            asked.update(betas=betas, eps=eps, optim_bits=optim_bits, is_paged=is_paged)
            super().__init__(params, lr=lr)

    module = ModuleType("bitsandbytes.optim")
    module.AdamW = AdamW
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", module)
    check_optimizer(TrainConfig(optim="paged_adamw_8bit", adam_beta2=0.95))
    assert asked == {"betas": (0.9, 0.95), "eps": 1e-8, "optim_bits": 8, "is_paged": True}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optim": "sgd", "optim_args": {"momentun": 0.9}}, r"optim_args\.momentun: sgd takes no .*mean 'momentum'"),
        ({"optim": "sgd", "optim_args": {"lr": 1}}, r"optim_args\.lr: sgd takes no such argument"),
        ({"optim": "sgd", "optim_args": {"fused": True}}, r"It takes: momentum, dampening, nesterov"),
        ({"optim": "adamw_torch", "optim_args": {"eps": 1}}, r"It takes: amsgrad"),
        ({"optim": "sgd", "optim_args": {"momentum": -1}}, r"sgd cannot be set up: Invalid momentum"),
        ({"optim": "sgd", "optim_args": {"momentum": "much"}}, r"sgd cannot be set up"),
        ({"optim": "rprop", "weight_decay": 0.1}, r"train\.weight_decay is not used by optim: rprop"),
        ({"optim": "rmsprop", "adam_epsilon": 0.1}, r"train\.adam_epsilon is not used by optim: rmsprop"),
    ],
)
def test_arguments_that_an_optimizer_does_not_take_are_refused(tmp_path, settings, said):
    with pytest.raises(ConfigurationError, match=said):
        make(tmp_path / "run", **settings)


def test_arguments_may_be_written_as_for_transformers():
    config = TrainConfig(optim="sgd", optim_args="momentum=0.9, nesterov=true")
    assert config.optim_args == {"momentum": 0.9, "nesterov": True}
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], config)
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, True)
    with pytest.raises(ValueError, match="name=value"):
        TrainConfig(optim="sgd", optim_args="momentum")


def test_muon_on_a_vector_is_refused_in_its_own_words(tmp_path):
    with pytest.raises(ConfigurationError, match=r"muon cannot be set up: .*2D"):
        bowl(tmp_path / "run", "sgd", optim="muon", optim_args={}, weight_decay=0.0).train()


class Shares(torch.optim.SGD):
    """Keeps one table for all its parameters, as 8-bit optimizers do."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        table = torch.arange(4.0)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["table"] = table


def test_state_that_shares_memory_is_kept(tmp_path):
    model = matrices()
    saved = checkpoints.save_optimizer(tmp_path / "o", model, Shares(model.parameters()))
    again = torch.optim.SGD(model.parameters(), lr=0.2)
    checkpoints.load_optimizer(tmp_path / "o", model, again, saved)
    assert [again.state[p]["table"].tolist() for p in model.parameters()] == [[0, 1, 2, 3]] * 2


def test_state_that_no_checkpoint_can_hold_is_named(tmp_path):
    model = matrices()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model.weight]["projector"] = object()
    with pytest.raises(CheckpointError, match="SGD keeps what no checkpoint can hold"):
        checkpoints.save_optimizer(tmp_path / "o", model, optimizer)
