"""What the tests of the training core share: a tiny language-model stage, tiny runs, and comparisons of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from llmtk import Group, LossOutput, Mean, Round, Run, Sequence, Stage, Term

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
WORDS = ("one", "three and", "fourteen tokens", "a much longer row of text", "x", "to be or not to be", "hm", "rows")
ROWS = [{"text": f"{WORDS[i % 8]} {i}"} for i in range(12)]
EVAL = [{"text": "held out"}, {"text": "also"}, {"text": "an unequal third"}]


class Lm(Stage):
    """Every token but the first is a target."""

    name = "lm"
    summary = "Next tokens"
    row_types = ("text",)

    def prepare_batch(self, run, rows):
        return Round.of([group_of(row) for row in rows])

    def compute_loss(self, run, batch):
        scores = run.score(batch)
        nll = -scores.logps.sum()
        metrics = {"perplexity": Mean(nll.detach(), len(scores.logps), then="exp")}
        return LossOutput({"loss": Term(nll, per="tokens")}, metrics, scores)


def group_of(row: dict[str, Any]) -> Group:
    ids = row["input_ids"]
    return Group([Sequence(ids, [False] + [True] * (len(ids) - 1))], {"tokens": len(ids) - 1}, place=row["place"])


def make(
    path: Path,
    stage: Any = Lm,
    *,
    rows: Any = ROWS,
    eval: Any = None,
    plugins: Any = (),
    resume: str | None = None,
    model: Any = None,
    sections: dict[str, Any] | None = None,
    **train: Any,
) -> Run:
    """Make a run with the tiny llama in float32, on one-line texts; keywords are keys under `train`."""
    return Run(
        stage,
        model=model or {"from_config": LLAMA, "tokenizer": {"kind": "byte"}},
        data={"train": rows, "max_length": 64} | ({"eval": eval} if eval else {}),
        train={"bf16": False, "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2} | train,
        output_dir=str(path),
        plugins=plugins,
        resume=resume,
        **(sections or {}),
    )


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()}


def lines(run: Run, file: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.output_dir / f"{file}.jsonl").read_text().splitlines()]


def series(run: Run, key: str) -> list[Any]:
    return [line[key] for line in lines(run) if key in line]


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Assert that tensors have the same names, types and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


def assert_near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float) -> None:
    """Assert that tensors differ by at most this share of their norm, each."""
    assert a.keys() == b.keys()
    for name in a:
        apart, size = float((a[name] - b[name]).norm()), float(b[name].norm())
        assert apart <= relative * size, f"{name}: {apart / size:.2e} of its norm apart"


def optimizer_state(run: Run) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in run.model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": value
        for parameter, state in run.optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def assert_same_run(a: Run, b: Run) -> None:
    """Assert that two runs are bit-identical: weights, optimizer, and all that they wrote."""
    assert_equal(weights(a), weights(b))
    assert_equal(optimizer_state(a), optimizer_state(b))
    for file in ("metrics.jsonl", "samples.jsonl"):
        written = [run.output_dir / file for run in (a, b)]
        assert [file.exists() for file in written] in ([True, True], [False, False])
        assert not written[0].exists() or written[0].read_bytes() == written[1].read_bytes()
