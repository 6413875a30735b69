"""The terms against their definitions in float64; the same however a step is cut; and no second forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from llmtk_plugin_auxiliary_loss import WEIGHT, AuxiliaryLoss
from pydantic import ValidationError

import llmtk
from llmtk import ConfigurationError, PluginError, Run
from llmtk.scoring import Scores

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
ROWS = [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}" + " and more" * (n % 3)} for n in range(8)]
PAIRS = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " none"} for row in ROWS]


def make(folder: Path, stage: str = "sft", rows: Any = ROWS, options: Any = None, **train: Any) -> Run:
    options = {"entropy_bonus": 0.3, "z_loss": 0.02} if options is None else options
    keys = {"bf16": False, "per_device_train_batch_size": 8, "max_steps": 2, "warmup_steps": 0, "logging_steps": 1}
    return Run(
        stage,
        model={"from_config": TINY, "tokenizer": {"kind": "byte"}},
        data={"train": rows, "eval": rows, "max_length": 128},
        train=keys | {"learning_rate": 0.05, "save_strategy": "no"} | train,
        plugins={"auxiliary-loss": options} if options else {},
        output_dir=str(folder),
    )


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_loss_and_gradient_are_those_of_the_definition(tmp_path: Path, scoring: str) -> None:
    run = make(tmp_path / "run", scoring=scoring)
    run.evaluate()
    rows = [run.train_rows[index] for index in range(8)]
    batch = run.hooks.prepare_batch(rows).windows[0]
    assert batch.weights[WEIGHT].tolist() == [sum(row["targets"]) for row in rows]
    passes: list[int] = []
    run.model.register_forward_hook(lambda *_: passes.append(1))
    output = run.hooks.compute_loss(batch)
    assert len(passes) == 1
    assert list(output.terms) == ["loss", "aux_entropy", "aux_z_loss"]
    loss: Any = sum(term.coefficient * term.sum / batch.weights[term.per].sum() for term in output.terms.values())
    loss.backward()

    run.save(tmp_path / "saved")
    exact: Any = llmtk.load(str(tmp_path / "saved"))[0].double().eval()
    parts = []
    for row in rows:
        ids, targets = torch.tensor(row["input_ids"]), torch.tensor(row["targets"])
        logits = exact(input_ids=ids[None]).logits[0, :-1][targets[1:]]
        logps = logits.log_softmax(-1)
        nll, entropy = -logps.gather(1, ids[1:][targets[1:]][:, None])[:, 0], -(logps.exp() * logps).sum(-1)
        parts.append(nll - 0.3 * entropy + 0.02 * logits.exp().sum(-1).log().square())
    wanted = torch.cat(parts).mean()
    wanted.backward()
    assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    gradients = dict(exact.named_parameters())
    for name, parameter in run.model.named_parameters():
        apart = (parameter.grad.double() - gradients[name].grad).norm()  # type: ignore[union-attr, operator]
        assert apart < 1e-5 * gradients[name].grad.norm(), name


def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path) -> None:
    found = {}
    for rows, steps in ((8, 1), (1, 8), (4, 2)):
        folder = tmp_path / f"{rows}x{steps}"
        make(folder, per_device_train_batch_size=rows, gradient_accumulation_steps=steps, eval_strategy="no").train()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        names = ("loss", "loss/loss", "loss/aux_entropy", "loss/aux_z_loss", "grad_norm")
        found[folder.name] = [line[name] for line in lines for name in names]
    whole = found.pop("8x1")
    assert whole[0] == pytest.approx(whole[1] - 0.3 * whole[2] + 0.02 * whole[3])
    for cut in found.values():
        assert cut == pytest.approx(whole, rel=2e-5)


def test_a_preference_stage_has_it_too(tmp_path: Path) -> None:
    run = make(tmp_path, "dpo", PAIRS, {"entropy_bonus": 0.1}, max_steps=1)
    assert run.train().metrics["eval_loss/aux_entropy"] > 0


def test_a_plan_refuses_a_reward_model_which_has_no_logits(tmp_path: Path) -> None:
    run = make(tmp_path, "rm", PAIRS)
    with pytest.raises(ConfigurationError, match="a model of stage rm has a head of one value"):
        run.prepare()
    assert not hasattr(run, "model"), "it is refused before a model is loaded"


def test_scores_that_a_stage_made_itself_are_refused_where_they_lack_what_is_wanted() -> None:
    plugin, own = AuxiliaryLoss(AuxiliaryLoss.Options(entropy_bonus=0.1)), torch.zeros(3)
    batch: Any = None
    assert set(plugin._terms(Scores(batch, own, entropy=own))) == {"aux_entropy"}
    with pytest.raises(PluginError, match="the stage hands on no scores"):
        plugin._terms(Scores(batch, own))


def test_it_is_told_what_to_add() -> None:
    with pytest.raises(ValidationError, match="give entropy_bonus or z_loss"):
        AuxiliaryLoss.Options()
