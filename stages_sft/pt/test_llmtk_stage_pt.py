"""The loss against its closed form in float64, how text becomes blocks, and that it learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import llmtk
from llmtk import Run
from llmtk.demo import addition

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
REAL = Path(__file__).parents[3] / "shared" / "data" / "tinyshakespeare.txt"
TEXTS = ["To be, or not to be", "that is", "the question: whether", "'tis nobler", "x"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(folder: Path, rows: Any, *, kind: str = "char", data: Any = None, **train: Any) -> Run:
    """Make a run of a tiny model, whose distributions are far from uniform."""
    rows = [{"text": text} for text in rows] if isinstance(rows, list) else rows
    return Run(
        "pt",
        model={"from_config": TINY, "tokenizer": {"kind": kind}},
        data={"train": rows, "eval": rows if isinstance(rows, list) else 0.1, "max_length": 16, **(data or {})},
        train={"bf16": False, "per_device_train_batch_size": 8, "logging_steps": 1, **train},
        output_dir=str(folder),
    )


def blocks(run: Run) -> list[dict[str, Any]]:
    """Set the run up, and return its training rows."""
    run.evaluate()
    return [run.train_rows[index] for index in range(len(run.train_rows))]


def stream(run: Run, texts: list[str]) -> list[int]:
    """Return the tokens of all documents, an end-of-text token behind each, encoded one by one."""
    end = run.tokenizer.eos_token_id
    assert end is not None
    return [t for text in texts for t in [*run.tokenizer(text, add_special_tokens=False)["input_ids"], end]]


# Blocks


@pytest.mark.parametrize("length", [3, 7, 16, 63, 64])
def test_every_token_is_a_target_once(tmp_path: Path, length: int) -> None:
    run = make(tmp_path / "run", TEXTS, data={"max_length": length})
    rows = blocks(run)
    window = run.hooks.prepare_batch(rows).windows[0]
    tokens = stream(run, TEXTS)
    assert window.target_tokens.tolist() == tokens[1:], "all but the first, which nothing predicts"
    assert float(window.weights["tokens"].sum()) == len(tokens) - 1
    for row in rows:
        assert 2 <= len(row["input_ids"]) <= length + 1, "the last token is a target alone, so `length` are inputs"


def test_blocks_follow_each_other_with_one_token_in_common(tmp_path: Path) -> None:
    run = make(tmp_path / "run", TEXTS, data={"max_length": 7})
    for index, row in enumerate(blocks(run)):
        tokens = stream(run, TEXTS)
        assert row["input_ids"].tolist() == tokens[7 * index : 7 * index + 8]


def test_the_model_needs_no_more_than_max_length_positions(tmp_path: Path) -> None:
    """A gpt2 has a learnt vector for each position: one more, and the look-up fails."""
    fields = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
    run = Run(
        "pt",
        model={"from_config": fields, "tokenizer": {"kind": "char"}},
        data={"train": [{"text": text} for text in TEXTS * 5], "max_length": 64},
        train={"bf16": False, "max_steps": 2},
        output_dir=str(tmp_path / "run"),
    )
    assert run.train().steps == 2
    assert max(len(run.train_rows[index]["input_ids"]) for index in range(len(run.train_rows))) == 65


def test_places_name_the_document_and_the_token(tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "abcdefgh"}\n{"text": "ij"}\n{"text": "klm"}\n')
    run = make(tmp_path / "run", str(file), data={"max_length": 5, "eval": str(file)})
    places = [row["place"] for row in blocks(run)]
    # abcdefgh. ij. klm.: blocks begin at tokens 0, 5, 10 and so in the documents 1, 1 and 2.
    assert [place.rpartition("texts.jsonl")[2] for place in places] == [
        ":1 from token 0",
        ":1 from token 5",
        ":2 from token 1",
    ]


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradient_have_their_closed_form(tmp_path: Path, smoothing: float) -> None:
    run = make(tmp_path / "run", TEXTS, label_smoothing_factor=smoothing)
    rows = blocks(run)
    run.save(tmp_path / "exact")
    exact = llmtk.load(str(tmp_path / "exact"))[0].double()
    output = run.hooks.compute_loss(run.hooks.prepare_batch(rows).windows[0])
    run.model.zero_grad()
    output.terms["loss"].sum.backward()

    wanted = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids = torch.from_numpy(row["input_ids"]).long()
        logits = exact(input_ids=ids[None, :-1]).logits[0]
        wanted = wanted + F.cross_entropy(logits, ids[1:], label_smoothing=smoothing, reduction="sum")
    wanted.backward()

    assert float(output.terms["loss"].sum.detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    mine, theirs = (torch.cat([p.grad.double().flatten() for p in model.parameters()]) for model in (run.model, exact))
    assert (mine - theirs).norm() / theirs.norm() < 1e-6


def test_perplexity_is_of_the_plain_loss(tmp_path: Path) -> None:
    run = make(tmp_path / "run", TEXTS, label_smoothing_factor=0.5)
    plain = make(tmp_path / "plain", TEXTS)
    values, without = run.evaluate(), plain.evaluate()
    assert values["perplexity"] == pytest.approx(np.exp(without["loss"]), rel=1e-9)
    assert values["loss"] != pytest.approx(without["loss"], rel=1e-3)


# Training


def test_the_update_is_the_same_however_the_batch_is_cut(tmp_path: Path) -> None:
    weights = []
    sgd = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 20, "max_grad_norm": 0, "eval_strategy": "no"}
    for name, cut in {
        "1x8": {},
        "4x2": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "by tokens": {"micro_batch_tokens": 40},
    }.items():
        run = make(tmp_path / name, TEXTS * 8, **sgd, **cut)
        run.train()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]))
    for other in weights[1:]:
        assert (other - weights[0]).norm() / weights[0].norm() < 1e-6
    assert not torch.equal(weights[0], weights[1]), "they were cut differently, so they differ in the last bits"


def test_it_learns_and_goes_on_from_what_it_wrote(tmp_path: Path) -> None:
    run = make(tmp_path / "run", TEXTS, max_steps=80, learning_rate=1e-2, eval_strategy="steps", eval_steps=80)
    before = run.evaluate()["loss"]
    after = run.train().metrics["eval_loss"]
    assert after < before / 2
    continued = Run(
        "pt",
        model=str(tmp_path / "run"),
        data={"train": [{"text": text} for text in TEXTS], "eval": [{"text": t} for t in TEXTS], "max_length": 16},
        train={"bf16": False},
        output_dir=str(tmp_path / "more"),
    )
    assert continued.evaluate()["loss"] == pytest.approx(after, rel=1e-6)
    model, _ = llmtk.load(str(tmp_path / "run"))
    assert all(torch.equal(model.get_parameter(name), p) for name, p in run.model.named_parameters())


def test_the_demo_improves(tmp_path: Path) -> None:
    train = {"max_steps": 12, "per_device_train_batch_size": 8}
    data = {"train": addition.texts("train", 200), "eval": addition.texts("held-out", 8), "max_length": 64}
    run = Run(
        "pt",
        model="builtin",
        data=data,
        train={"bf16": False, "learning_rate": 1e-3, **train},
        output_dir=tmp_path / "r",
    )
    before = run.evaluate()["loss"]
    assert run.train().metrics["eval_loss"] < before - 0.5


@pytest.mark.slow
def test_the_whole_demo_improves_visibly(tmp_path: Path) -> None:
    figures = Run("pt", output_dir=str(tmp_path / "run")).train().metrics
    assert figures["figure_after"] < figures["figure_before"] - 1


@pytest.mark.skipif(not REAL.exists(), reason=f"no {REAL.name} beside the repository")
def test_it_trains_on_a_real_text(tmp_path: Path) -> None:
    run = make(tmp_path / "run", str(REAL), data={"max_length": 64, "eval": 0.01}, max_steps=3, eval_strategy="no")
    assert run.train().steps == 3
    text = REAL.read_text()
    assert len(run.tokenizer) >= len(set(text))
    assert run.tokenizer.decode(run.train_rows[0]["input_ids"]) == text[:65]
