"""Whole runs that train a part of a model, merge what they trained, or stand on quantised weights."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmtk import ConfigurationError, Run, load
from llmtk.run import Interrupted

from .kit import EVAL, ROWS, assert_near, assert_same_run, make, series
from .test_resume import StopAt
from .test_run import gradients

LORA = {"peft": {"r": 2, "lora_alpha": 64}}
with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def last_layer(folder):
    return {"name_or_path": folder, "train_only": 1}


def log_probs(model, rows):
    """Return the log-probs of all tokens but the first of each row, by transformers alone."""
    found = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])[None]
        logps = model(input_ids=ids).logits.float().log_softmax(-1)[0, :-1]
        found.append(logps.gather(-1, ids[0, 1:, None])[:, 0])
    return torch.cat(found).detach()


def test_what_is_trained_has_the_gradients_of_full_training(tmp_path, folder):
    part = gradients(tmp_path / "part", model=last_layer(folder))
    whole = gradients(tmp_path / "whole", model=folder)
    assert set(part) == {name for name in whole if ".layers.1." in name}
    assert_near(part, {name: whole[name] for name in part}, 1e-6)


def test_what_is_frozen_stays_and_the_whole_model_is_exported(tmp_path, folder):
    run = make(tmp_path / "run", model=last_layer(folder), weight_decay=0.1)
    run.train()
    before, after = load_file(f"{folder}/model.safetensors"), load_file(run.output_dir / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".layers.1." in name}

    kept = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert kept == {id(parameter) for name, parameter in run.model.named_parameters() if ".layers.1." in name}
    assert run.plan.trainable_parameters == sum(before[name].numel() for name in changed)
    assert run.plan.total_parameters == sum(tensor.numel() for tensor in before.values())


def test_a_run_that_trains_a_part_goes_on_bit_by_bit(tmp_path, folder):
    settings = {"model": last_layer(folder), "max_steps": 6, "logging_steps": 1}
    whole = make(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Interrupted):
        make(tmp_path / "run", plugins=[StopAt(3)], **settings).train()
    resumed = make(tmp_path / "run", resume="auto", **settings)
    resumed.train()
    assert_same_run(resumed, whole)


def test_gradient_checkpointing_beside_frozen_layers(tmp_path, folder):
    one, other = (gradients(tmp_path / str(on), model=last_layer(folder), gradient_checkpointing=on) for on in (0, 1))
    assert_near(one, other, 1e-6)


def test_a_merged_adapter_is_a_model_by_itself(tmp_path, folder, capsys):
    settings = {"eval": EVAL, "merge_and_save": True, "learning_rate": 0.05}
    run = make(tmp_path / "run", "pt", model=folder, sections=LORA, **settings)
    result = run.train()
    assert "has the adapter merged into its base; " in capsys.readouterr().out
    assert sorted(file.name for file in (run.output_dir / "adapter").glob("adapter*")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not (run.output_dir / "adapter_config.json").exists()
    assert "library_name: transformers" in (run.output_dir / "README.md").read_text()

    rows = [run.eval_rows[index] for index in range(len(run.eval_rows))]
    expected = log_probs(run.model.eval(), rows)
    assert (log_probs(load(folder)[0], rows) - expected).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(log_probs(AutoModelForCausalLM.from_pretrained(run.output_dir), rows), expected)
    torch.testing.assert_close(log_probs(load(run.output_dir / "adapter")[0], rows), expected)
    assert Run.open(run.output_dir).evaluate(EVAL)["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-5)


def test_a_continued_adapter_is_merged_too(tmp_path, folder):
    make(tmp_path / "first", model=folder, sections=LORA).train()
    run = make(tmp_path / "second", model=str(tmp_path / "first"), merge_and_save=True)
    run.train()
    rows = [run.train_rows[index] for index in range(3)]
    plain = AutoModelForCausalLM.from_pretrained(run.output_dir)
    torch.testing.assert_close(log_probs(plain, rows), log_probs(run.model.eval(), rows))


def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("llmtk.models.loading.load_model", None)
    for settings, said in (
        ({"model": folder, "merge_and_save": True}, "there is no adapter to merge"),
        ({"model": {"name_or_path": folder, "freeze": 1}, "sections": LORA}, "the whole model is frozen"),
        ({"model": folder, "sections": {"peft": {"lora_dropout": 0.1}}}, "all dropout is switched off"),
        ({"model": {"name_or_path": folder, "attn_implementation": "sdap"}}, "Did you mean 'sdpa'"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            make(tmp_path / "run", **settings).train()
    assert not (tmp_path / "run").exists()


def test_code_of_the_models_own_is_said_loudly(tmp_path, folder, capsys):
    make(tmp_path / "run", model={"name_or_path": folder, "trust_remote_code": True}, max_steps=1).train()
    assert "WARNING: model.trust_remote_code is on" in capsys.readouterr().out
    make(tmp_path / "other", model=folder, max_steps=1).train()
    assert "WARNING" not in capsys.readouterr().out


@with_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_an_adapter_on_quantised_weights_learns_and_goes_on_bit_by_bit(tmp_path, folder, bits):
    settings = {
        "model": {"name_or_path": folder, "quantization": bits},
        "sections": LORA,
        "eval": EVAL,
        "max_steps": 6,
        "logging_steps": 1,
        "learning_rate": 0.02,
    }
    whole = make(tmp_path / "whole", "pt", **settings)
    result = whole.train()
    losses = series(whole, "loss")
    assert losses[-1] < losses[0]
    with pytest.raises(Interrupted):
        make(tmp_path / "run", "pt", plugins=[StopAt(3)], **settings).train()
    resumed = make(tmp_path / "run", "pt", resume="auto", **settings)
    resumed.train()
    assert_same_run(resumed, whole)
    assert Run.open(whole.output_dir).evaluate(EVAL)["loss"] == pytest.approx(result.metrics["eval_loss"], rel=1e-6)


@with_bitsandbytes
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_quantised_weights_are_scored_as_transformers_does(tmp_path, folder, bits):
    run = make(tmp_path / "run", model={"name_or_path": folder, "quantization": bits}, sections=LORA)
    run.train()
    rows = [run.train_rows[index] for index in range(4)]
    loss = -log_probs(run.model.eval(), rows).mean().item()
    assert run.evaluate(ROWS[:4])["loss"] == pytest.approx(loss, rel=1e-5 if bits == "4bit" else 1e-3)
    assert run.forward.scorers[None].packed or run.forward.scorers[None].why_padded
