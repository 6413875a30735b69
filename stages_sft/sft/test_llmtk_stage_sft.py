"""The losses against closed forms in float64, what is a target, and that it learns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llmtk
from llmtk import ConfigurationError, Run
from llmtk.demo import addition

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Two."},
]
REAL = Path(__file__).parents[3] / "shared" / "data" / "alpaca_en_demo.json"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(folder: Path, rows: Any, options: dict[str, Any] | None = None, *, data: Any = None, **train: Any) -> Run:
    """Make a run of a tiny model, whose distributions are far from uniform."""
    return Run(
        "sft",
        model={"from_config": TINY, "tokenizer": {"kind": "byte"}},
        data={"train": rows, "eval": rows if isinstance(rows, list) else 0.1, **(data or {})},
        sft=options or {},
        train={"bf16": False, "per_device_train_batch_size": 8, "logging_steps": 1, **train},
        output_dir=str(folder),
    )


def one_batch(run: Run) -> tuple[Any, list[dict[str, Any]]]:
    """Set the run up, and return its first rows as a micro-batch, and as they are."""
    run.evaluate()
    rows = [run.train_rows[index] for index in range(8)]
    return run.hooks.prepare_batch(rows).windows[0], rows


def exact_model(run: Run) -> torch.nn.Module:
    """Return the run's model in float64, as anybody would load it."""
    run.save(run.output_dir.with_name("exact"))
    model: torch.nn.Module = llmtk.load(str(run.output_dir.with_name("exact")))[0]
    return model.double().eval()


def exact_logits(model: torch.nn.Module, rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (targets, vocabulary) and targets (targets,), each row by itself and in the model's own type."""
    logits, targets = [], []
    for row in rows:
        ids, wanted = torch.tensor(row["input_ids"]), torch.tensor(row["targets"])
        logits.append(model(input_ids=ids[None]).logits[0][:-1][wanted[1:]])
        targets.append(ids[wanted])
    return torch.cat(logits), torch.cat(targets)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """Return the whole gradient (parameters,) in float64."""
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


def closed_form(loss: str, smoothing: float, logits: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Return the sum over the targets, and by hand its derivative by the logits (targets, vocabulary)."""
    p = logits.detach().softmax(-1)
    logp = p.log()
    vocabulary = logits.shape[-1]
    onehot = F.one_hot(targets, vocabulary).double()
    weight = (p * onehot).sum(-1, keepdim=True) if loss == "dft" else torch.ones(len(targets), 1).double()
    wanted = (1 - smoothing) * onehot + smoothing / vocabulary
    return float(-(weight * wanted * logp).sum()), weight * (p - wanted)


@pytest.mark.parametrize(("loss", "smoothing"), [("nll", 0.0), ("dft", 0.0), ("nll", 0.1), ("nll", 0.9)])
def test_loss_and_gradient_have_their_closed_form(tmp_path: Path, loss: str, smoothing: float) -> None:
    run = make(tmp_path / "run", addition.rows("train", 8), {"loss": loss}, label_smoothing_factor=smoothing)
    batch, rows = one_batch(run)
    exact = exact_model(run)
    output = run.hooks.compute_loss(batch)
    term = output.terms["loss"]
    run.model.zero_grad()
    term.sum.backward()

    logits, targets = exact_logits(exact, rows)
    value, by_logits = closed_form(loss, smoothing, logits, targets)
    logits.backward(by_logits)

    assert (term.per, term.coefficient) == ("tokens", 1.0)
    assert float(batch.weights["tokens"].sum()) == len(targets)
    assert float(term.sum.detach()) == pytest.approx(value, rel=1e-6)
    difference = (gradient(run.model) - gradient(exact)).norm() / gradient(exact).norm()
    assert difference < 1e-6


def test_label_smoothing_is_that_of_torch(tmp_path: Path) -> None:
    run = make(tmp_path / "run", addition.rows("train", 8), label_smoothing_factor=0.25)
    batch, rows = one_batch(run)
    logits, targets = exact_logits(exact_model(run), rows)
    wanted = F.cross_entropy(logits, targets, label_smoothing=0.25, reduction="sum")
    assert float(run.hooks.compute_loss(batch).terms["loss"].sum.detach()) == pytest.approx(float(wanted), rel=1e-6)
    assert float(wanted) != pytest.approx(float(F.cross_entropy(logits, targets, reduction="sum")), rel=1e-3)


def test_dft_pulls_unlikely_tokens_less(tmp_path: Path) -> None:
    """Its gradient by a target's log-prob is that target's probability."""
    run = make(tmp_path / "run", addition.rows("train", 8), {"loss": "dft"})
    batch, _ = one_batch(run)
    output = run.hooks.compute_loss(batch)
    (by_logps,) = torch.autograd.grad(output.terms["loss"].sum, output.scores.logps)
    assert torch.equal(-by_logps, output.scores.logps.detach().exp())


def test_evaluation_gives_loss_perplexity_and_accuracy_per_token(tmp_path: Path) -> None:
    run = make(tmp_path / "run", addition.rows("train", 8))
    values = run.evaluate()
    _, rows = one_batch(run)
    logits, targets = exact_logits(exact_model(run), rows)
    loss = float(F.cross_entropy(logits, targets))
    assert values["loss"] == pytest.approx(loss, rel=1e-6)
    assert values["perplexity"] == pytest.approx(np.exp(loss), rel=1e-6)
    assert values["token_accuracy"] == float((logits.argmax(-1) == targets).double().mean())


def test_dft_and_label_smoothing_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    run = make(tmp_path / "run", "absent.jsonl", {"loss": "dft"}, label_smoothing_factor=0.1)
    with pytest.raises(ConfigurationError, match=r"label_smoothing_factor is used by sft\.loss: nll alone"):
        run.train()
    assert not (tmp_path / "run").exists()


# Targets


def learnt(run: Run, index: int = 0) -> str:
    """Return the text of a row's targets."""
    row = run.train_rows[index]
    assert len(row["input_ids"]) == len(row["targets"])
    return run.tokenizer.decode([t for t, is_target in zip(row["input_ids"], row["targets"], strict=True) if is_target])


def test_what_the_assistant_says_is_learnt_and_where_it_stops(tmp_path: Path) -> None:
    run = make(tmp_path / "run", [{"messages": DIALOGUE}])
    run.evaluate()
    assert learnt(run) == "Yes, one.<|im_end|>Two.<|im_end|>"
    whole = run.tokenizer.decode(run.train_rows[0]["input_ids"])
    assert whole.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n")


def test_of_prompt_and_completion_the_completion_is_learnt(tmp_path: Path) -> None:
    rows = [{"prompt": "2+3=", "completion": "5"}, {"prompt": DIALOGUE[:4], "completion": DIALOGUE[4:]}]
    run = make(tmp_path / "run", rows)
    run.evaluate()
    end = run.tokenizer.eos_token
    assert learnt(run, 0) == f"5{end}"
    assert learnt(run, 1) == "Two.<|im_end|>"


def test_a_row_cut_at_max_length_keeps_its_targets_before_the_cut(tmp_path: Path) -> None:
    run = make(tmp_path / "run", [{"prompt": "ab", "completion": "cdefgh"}], data={"max_length": 5})
    run.evaluate()
    assert learnt(run) == "cde"


# Training


def test_the_update_is_the_same_however_the_batch_is_cut(tmp_path: Path) -> None:
    weights = []
    rows = addition.rows("train", 24)
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 20, "max_grad_norm": 0, "eval_strategy": "no"}
    for name, cut in {
        "1x8": {},
        "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "by tokens": {"micro_batch_tokens": 100},
    }.items():
        run = make(tmp_path / name, rows, **sgd, **cut)
        run.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    for other in weights[1:]:
        assert (other - weights[0]).norm() / weights[0].norm() < 1e-6
    assert not torch.equal(weights[0], weights[1]), "they were cut differently, so they differ in the last bits"


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_it_learns_and_the_exported_model_loads(tmp_path: Path, loss: str) -> None:
    rows = [{"prompt": f"{i}:", "completion": str(i) * 3} for i in range(8)]
    train = {"max_steps": 120, "learning_rate": 1e-2, "warmup_steps": 5, "eval_strategy": "steps", "eval_steps": 120}
    run = make(tmp_path / "run", rows, {"loss": loss}, **train)
    before = run.evaluate()["token_accuracy"]
    result = run.train()
    assert before < 0.3
    assert result.metrics["eval_token_accuracy"] > 0.9
    model, _ = llmtk.load(str(tmp_path / "run"))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name


def test_the_demo_improves(tmp_path: Path) -> None:
    run = Run("sft", train={"max_steps": 40}, output_dir=str(tmp_path / "run"))
    figures = run.train().metrics
    assert figures["figure_after"] > figures["figure_before"] + 0.05


@pytest.mark.slow
def test_the_whole_demo_improves_visibly(tmp_path: Path) -> None:
    figures = Run("sft", output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] > figures["figure_before"] + 0.15


@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} beside the repository")
def test_it_trains_on_real_instructions(tmp_path: Path) -> None:
    run = make(tmp_path / "run", str(REAL), data={"max_length": 128, "eval": 0.02}, max_steps=3, warmup_steps=0)
    result = run.train()
    assert result.steps == 3
    assert np.isfinite(result.metrics["eval_loss"])
    row = run.train_rows[0]
    assert "<|im_start|>user" in run.tokenizer.decode(row["input_ids"])


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_a_mixture_of_experts_trains_with_its_router_loss(tmp_path: Path, scoring: str) -> None:
    """Loss and gradients of a step are those of transformers' own forward with labels, on the tokens that are fed."""
    coefficient = 0.3
    fields = TINY | {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": True,
        "router_aux_loss_coef": coefficient,
    }
    rows = [{"prompt": prompt, "completion": end} for prompt, end in (("1+1=", "2."), ("2+3=", "5!"), ("4+4=", "8?"))]
    run = Run(
        "sft",
        model={"from_config": fields, "tokenizer": {"kind": "byte"}},
        data={"train": rows},
        train={
            **{"bf16": False, "scoring": scoring, "per_device_train_batch_size": 3, "max_steps": 1},
            **{"optim": "sgd", "learning_rate": 1e3, "lr_scheduler_type": "constant", "max_grad_norm": 1e9},
        },
        output_dir=str(tmp_path / "run"),
    )
    run.save(tmp_path / "start")
    run.train()
    assert run.forward.scorers[None].packed == (scoring == "auto")

    model = llmtk.load(str(tmp_path / "start"))[0].float().train()
    ids = torch.tensor([run.train_rows[index]["input_ids"] for index in range(3)])
    wanted = torch.tensor([run.train_rows[index]["targets"] for index in range(3)])
    labels = ids.masked_fill(~wanted, -100)
    fed = {"input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    output = model(**fed, labels=labels[:, :-1], shift_labels=labels[:, 1:].contiguous())
    output.loss.backward()

    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(float(output.loss), rel=1e-6)
    assert line["router_loss"] == pytest.approx(float(output.aux_loss), rel=1e-6)
    assert line["loss/loss"] == pytest.approx(float(output.loss - coefficient * output.aux_loss), rel=1e-6)
    for (name, before), after in zip(model.named_parameters(), run.model.parameters(), strict=True):
        gradient = (before.detach().double() - after.detach().double()) / 1e3
        assert float((gradient - before.grad.double()).norm()) <= 1e-6 * float(before.grad.double().norm()), name
