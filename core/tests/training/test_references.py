"""The reference is the policy as it was at the start, however it is kept, and costs no more than it must."""

from __future__ import annotations

import json

import numpy
import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from llmtk import ConfigurationError, LossOutput, Mean, ModelLoadError, Round, Run, Term, hookimpl
from llmtk.batch import Batch
from llmtk.errors import PluginError
from llmtk.run import Interrupted
from llmtk.training import precompute

from .kit import EVAL, LLAMA, ROWS, Lm, assert_equal, assert_near, assert_same_run, group_of, lines, make, weights
from .test_resume import StopAt

UNTIED = {"from_config": LLAMA | {"tie_word_embeddings": False}, "tokenizer": {"kind": "byte"}}
TIED = {"from_config": LLAMA | {"tie_word_embeddings": True}, "tokenizer": {"kind": "byte"}}
LORA = {"peft": {"r": 2, "lora_alpha": 64}}


class Held(Lm):
    """Next tokens, held to the reference by the square of the log-ratio."""

    name = "held"
    needs = frozenset({"reference"})
    honours = frozenset({"precompute_reference"})

    def prepare_batch(self, run, rows):
        batch = Batch.collate([group_of(row) for row in rows])
        kept = run.score_window(batch, model="reference").logps
        return Round([batch.with_columns(per_target={"kept": kept})])

    def compute_loss(self, run, batch):
        logps = run.score(batch).logps
        ratio = logps - batch.per_target["kept"]
        apart = Mean(ratio.detach().abs().sum(), len(ratio))
        return LossOutput({"loss": Term((0.1 * ratio.square() - logps).sum(), per="tokens")}, {"apart": apart})


class Moving(Held):
    """Its reference goes half of the way to the policy at every step."""

    reference = "changing"

    @hookimpl
    def after_update(self, run):
        with torch.no_grad():
            for kept, trained in zip(run.frozen["reference"].parameters(), run.model.parameters(), strict=True):
                kept.lerp_(trained, 0.5)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMTK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, folder):
    """An adapter that was trained."""
    run = make(tmp_path_factory.mktemp("adapter") / "run", model=folder, sections=LORA, learning_rate=0.05)
    run.train()
    return str(run.output_dir)


KINDS = {
    "copy": {},
    "tied": {"model": TIED},
    "untied": {"model": UNTIED},
    "adapter off": {"sections": LORA},
    "adapter kept": {"model": "adapter"},
    "precomputed": {"precompute_reference": True},
}


def held(path, kind, folder, adapter, stage=Held, **settings):
    keys = {"model": folder} | KINDS[kind] | settings
    if keys["model"] == "adapter":
        keys["model"] = adapter
    return make(path, stage, eval=EVAL, **keys)


def log_probs(model, rows):
    """Return the log-probs of all tokens but the first of each row, by transformers alone."""
    found = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        logps = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
        found.append(logps.gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found).detach()


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_policy_is_its_reference_to_the_bit(tmp_path, folder, adapter, kind, bf16):
    run = held(tmp_path / "run", kind, folder, adapter, bf16=bf16)
    assert run.evaluate()["apart"] == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_stays_while_the_policy_moves(tmp_path, folder, adapter, kind):
    run = held(tmp_path / "run", kind, folder, adapter)
    run.evaluate()
    run.save(tmp_path / "start")
    loader = AutoPeftModelForCausalLM if "adapter" in kind else AutoModelForCausalLM
    start = loader.from_pretrained(tmp_path / "start").eval()
    run.train()
    rows = [run.train_rows[index] for index in range(6)]
    batch = Batch.collate([group_of(row) for row in rows])
    kept, now = (run.score_window(batch, model=model).logps for model in ("reference", None))
    exact = log_probs(start, rows)
    assert float((kept - exact).abs().max()) < 1e-5
    assert float((now - exact).abs().max()) > 1e-2


def test_an_adapter_that_was_trained_is_no_reference_when_switched_off(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "adapter kept", folder, adapter)
    run.evaluate()
    rows = [run.train_rows[index] for index in range(6)]
    kept = run.score_window(Batch.collate([group_of(row) for row in rows]), model="reference").logps
    base = log_probs(AutoModelForCausalLM.from_pretrained(folder).eval(), rows)
    assert float((kept - base).abs().max()) > 1e-2


def test_only_the_trained_adapter_is_exported(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "adapter kept", folder, adapter)
    run.train()
    exported = AutoPeftModelForCausalLM.from_pretrained(run.output_dir)
    assert list(exported.peft_config) == ["default"]
    assert not (run.output_dir / "reference").exists()
    trained = {name: tensor for name, tensor in weights(run).items() if "reference" not in name}
    assert_equal(
        {name: tensor for name, tensor in exported.state_dict().items() if "lora" in name},
        {name: tensor for name, tensor in trained.items() if "lora" in name},
    )


def test_a_copy_holds_its_matrices_in_the_dtype_that_they_compute_in(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "untied", folder, adapter, bf16=True)
    run.evaluate()
    kept = run.frozen["reference"]
    dtypes = {name: parameter.dtype for name, parameter in kept.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "proj" in name or "lm_head" in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name or "embed" in name} == {torch.float32}
    mine = {parameter.data_ptr() for parameter in run.model.parameters()}
    assert not mine & {parameter.data_ptr() for parameter in kept.parameters()}


@pytest.mark.parametrize("kind", ["adapter off", "adapter kept", "precomputed"])
def test_there_is_no_second_model(tmp_path, folder, adapter, kind):
    run = held(tmp_path / "run", kind, folder, adapter)
    run.evaluate()
    assert run.frozen == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_reference(tmp_path, folder, adapter, kind):
    settings = {"max_steps": 6, "logging_steps": 1}
    whole = held(tmp_path / "whole", kind, folder, adapter, **settings)
    whole.train()
    with pytest.raises(Interrupted, match="stopped the run after step 3"):
        held(tmp_path / "parts", kind, folder, adapter, plugins=[StopAt(3)], **settings).train()
    parts = held(tmp_path / "parts", kind, folder, adapter, resume="auto", **settings)
    parts.train()
    assert_same_run(whole, parts)


# Two models' logits


def kl_of_logits(student, teacher):
    """Return KL(teacher || student) (tile,)."""
    teacher, student = teacher.log_softmax(-1), student.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


@pytest.mark.parametrize(("scoring", "bf16"), [("auto", False), ("padded", False), ("auto", True)])
@pytest.mark.parametrize("kind", ["copy", "adapter off"])
def test_the_logits_of_two_models_meet_by_a_column(tmp_path, folder, adapter, monkeypatch, kind, scoring, bf16):
    run = held(tmp_path / "run", kind, folder, adapter, scoring=scoring, bf16=bf16)
    run.prepare()
    monkeypatch.setattr("llmtk.scoring.packed.TILE_ELEMENTS", 3 * len(run.tokenizer))
    trained = {name: parameter for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    rows = [run.train_rows[index]["input_ids"] for index in range(6)]
    batch = Batch.collate([group_of(run.train_rows[index]) for index in range(6)])

    teacher = run.map_logits(batch, lambda logits: logits, model="reference")
    assert not teacher.requires_grad
    assert teacher.dtype == torch.float32
    constant = run.map_logits(batch, kl_of_logits, [teacher.clone().requires_grad_()], model="reference")
    assert not constant.requires_grad
    assert not constant.any()
    kl = run.map_logits(batch, kl_of_logits, [teacher])
    kl.sum().backward()
    found = torch.cat([parameter.grad.flatten() for parameter in trained.values()])

    run.model.zero_grad()
    start = AutoModelForCausalLM.from_pretrained(folder).eval()
    by_hand = []
    for ids in rows:
        told = [model(input_ids=torch.tensor(ids[:-1])[None]).logits[0] for model in (run.model, start)]
        by_hand.append(kl_of_logits(told[0], told[1].detach()))
    torch.cat(by_hand).sum().backward()
    whole = torch.cat([parameter.grad.flatten() for parameter in trained.values()])
    wanted = {"kl": torch.cat(by_hand).detach(), "gradient": whole}
    assert_near({"kl": kl.detach(), "gradient": found}, wanted, 0.1 if bf16 else 1e-5)


def test_a_reference_that_was_precomputed_has_no_logits(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "precomputed", folder, adapter)
    run.evaluate()
    batch = Batch.collate([group_of(run.train_rows[0])])
    with pytest.raises(PluginError, match="precompute_reference keeps its log-probs alone"):
        run.map_logits(batch, lambda logits: logits, model="reference")
    with pytest.raises(PluginError, match="asks for the model 'teacher'"):
        run.map_logits(batch, lambda logits: logits, model="teacher")


# A reference of one's own


def test_another_model_may_be_the_reference(tmp_path, folder, adapter):
    other = make(tmp_path / "other", model=folder)
    other.train()
    run = held(
        tmp_path / "run", "copy", folder, adapter, model={"name_or_path": folder, "reference": str(tmp_path / "other")}
    )
    assert run.evaluate()["apart"] > 1e-2
    rows = [run.train_rows[index] for index in range(6)]
    kept = run.score_window(Batch.collate([group_of(row) for row in rows]), model="reference").logps
    exact = log_probs(AutoModelForCausalLM.from_pretrained(tmp_path / "other").eval(), rows)
    assert float((kept - exact).abs().max()) < 1e-5


def test_a_reference_of_another_vocabulary_is_refused(tmp_path, folder, adapter):
    other = make(tmp_path / "other", model=TIED | {"tokenizer": {"kind": "char"}}, max_steps=1)
    other.train()
    model = {"name_or_path": folder, "reference": str(other.output_dir)}
    with pytest.raises(ConfigurationError, match=r"model\.reference: .*other has another vocabulary than the policy"):
        held(tmp_path / "run", "copy", folder, adapter, model=model).evaluate()


def test_a_reference_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path, folder, adapter):
    model = {"name_or_path": folder, "reference": "/nowhere/adapter"}
    with pytest.raises(ModelLoadError, match=r"model\.reference: there is no folder /nowhere/adapter"):
        held(tmp_path / "run", "copy", folder, adapter, model=model).train()


def test_a_stage_without_a_reference_refuses_one(tmp_path, folder):
    with pytest.raises(ConfigurationError, match=r"model\.reference: lm uses no reference"):
        make(tmp_path / "run", model={"name_or_path": folder, "reference": folder}).train()
    with pytest.raises(ConfigurationError, match=r"train\.precompute_reference: the stage lm does not use it"):
        make(tmp_path / "run", model=folder, precompute_reference=True)


def test_an_adapter_takes_no_second_one(tmp_path, adapter):
    with pytest.raises(ConfigurationError, match=r"model\.name_or_path is an adapter"):
        make(tmp_path / "run", model=adapter, sections=LORA).train()


# Computed once


def test_precomputed_log_probs_train_the_same(tmp_path, folder, adapter):
    live, once = (held(tmp_path / kind, kind, folder, adapter) for kind in ("copy", "precomputed"))
    live.train()
    once.train()
    assert_near(weights(once), weights(live), 1e-6)


def test_log_probs_are_computed_once_for_the_same_model_and_rows(tmp_path, folder, adapter, monkeypatch):
    held(tmp_path / "first", "precomputed", folder, adapter).train()
    files = list((tmp_path / "cache").rglob("*.safetensors"))
    assert len(files) == 1
    asked = []
    monkeypatch.setattr(precompute, "_compute", lambda run: asked.append(run) or {})
    again = held(tmp_path / "second", "precomputed", folder, adapter, learning_rate=3e-3)
    again.evaluate()
    assert not asked
    with pytest.raises(ConfigurationError, match="was not asked about"):
        held(tmp_path / "third", "precomputed", folder, adapter, rows=ROWS[:-1]).train()
    assert asked


def test_another_configuration_of_the_same_weights_is_another_reference(tmp_path, folder, adapter, capsys):
    for base in (10_000.0, 3.0):
        model = {"from_config": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": base}}}
        model["tokenizer"] = {"kind": "byte"}
        run = held(tmp_path / str(base), "precomputed", folder, adapter, model=model)
        assert run.evaluate()["apart"] == 0.0
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 2


def test_the_first_of_two_runs_that_compute_the_same_is_kept(tmp_path):
    file = tmp_path / "reference" / "key.safetensors"
    for value in (1.0, 2.0):
        known = {bytes(16): numpy.full(3, value, dtype=numpy.float32)}
        precompute._write(file, precompute._packed(known))
    (found,) = precompute._unpacked(precompute._read(file, print))
    assert found[1].tolist() == [1.0] * 3
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_damaged_file_of_log_probs_is_made_anew(tmp_path, folder, adapter, capsys):
    held(tmp_path / "first", "precomputed", folder, adapter).train()
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    held(tmp_path / "second", "precomputed", folder, adapter).train()
    assert "computed anew" in capsys.readouterr().out
    assert file.read_bytes() == whole


def test_what_was_not_precomputed_cannot_be_asked(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "precomputed", folder, adapter)
    run.evaluate()
    with pytest.raises(ConfigurationError, match="row 1 before training"):
        run.evaluate([{"text": "nobody knows this row"}])
    batch = Batch.collate([group_of(run.train_rows[0])])
    with pytest.raises(ConfigurationError, match="keeps log-probs alone"):
        run.score(batch, model="reference", also=["entropy"])


def test_a_group_is_known_by_all_that_it_is(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "copy", folder, adapter)
    run.evaluate()
    group = group_of(run.train_rows[0])
    (sequence,) = group.sequences
    tokens = list(sequence.tokens)
    fewer = [False, False, *sequence.targets[2:]]
    split = type(group)([type(sequence)(tokens[2:], [True] * (len(tokens) - 2), 0)], {"tokens": 1}, [tokens[:2]])
    others = [group, type(group)([type(sequence)(tokens, fewer)], {"tokens": 1}), split]
    digests = [next(precompute.digests_of(Batch.collate([other]))) for other in others]
    assert len(set(digests)) == 3
    assert list(precompute.digests_of(Batch.collate([others[2], group]))) == [digests[2], digests[0]]


# One that moves


def test_a_reference_that_moves_is_in_the_checkpoint(tmp_path, folder):
    settings = {"model": folder, "max_steps": 6, "logging_steps": 1}
    whole = make(tmp_path / "whole", Moving, **settings)
    whole.train()
    with pytest.raises(Interrupted, match="stopped the run after step 3"):
        make(tmp_path / "parts", Moving, plugins=[StopAt(3)], **settings).train()
    parts = make(tmp_path / "parts", Moving, resume="auto", **settings)
    parts.train()
    assert_same_run(whole, parts)
    assert_equal(whole.frozen["reference"].state_dict(), parts.frozen["reference"].state_dict())
    start = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert not torch.equal(whole.frozen["reference"].state_dict()["lm_head.weight"], start["lm_head.weight"])


def test_a_reference_that_moves_needs_a_model_of_its_own(tmp_path, folder):
    with pytest.raises(ConfigurationError, match="Train in full, without peft"):
        make(tmp_path / "run", Moving, model=folder, sections=LORA).train()


# A finished run


@pytest.mark.parametrize("kind", ["copy", "tied", "adapter off", "adapter kept"])
def test_a_finished_run_is_evaluated_against_the_same_reference(tmp_path, folder, adapter, kind, monkeypatch):
    monkeypatch.setattr("llmtk.host.discovery.get_stage", lambda name: Held)
    run = held(tmp_path / "run", kind, folder, adapter)
    metrics = run.train().metrics
    again = Run.open(run.output_dir).evaluate(EVAL)
    assert metrics["eval_apart"] > 1e-3
    for name in ("loss", "apart"):
        assert again[name] == pytest.approx(metrics[f"eval_{name}"], rel=1e-5)


def test_a_finished_run_whose_reference_moved_says_so(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("llmtk.host.discovery.get_stage", lambda name: Moving)
    make(tmp_path / "run", Moving, model=folder, eval=EVAL).train()
    with pytest.raises(ConfigurationError, match="moved with the policy"):
        Run.open(tmp_path / "run").evaluate()


def test_the_log_tells_how_far_the_policy_went(tmp_path, folder, adapter):
    run = held(tmp_path / "run", "copy", folder, adapter, logging_steps=1)
    run.train()
    apart = [line["apart"] for line in lines(run) if "apart" in line]
    assert apart[0] == 0.0
    assert apart[-1] > 0
    assert json.loads((run.output_dir / "results.json").read_text())["steps"] == 4


class Undeclared(Lm):
    """Asks a reference that it does not declare."""

    def compute_loss(self, run, batch):
        run.score(batch, model="reference")
        return super().compute_loss(run, batch)


def test_a_reference_that_is_not_declared_is_told_with_how_to(tmp_path):
    with pytest.raises(PluginError, match=r"'reference', and the run's frozen models are: none.*needs = frozenset"):
        make(tmp_path, Undeclared, max_steps=1).train()
