"""What the tests of the stages on pairs share: tiny runs, exact log-probs, and what one window gives."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtk
from llmtk import Run

TINY = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
ANSWERS = ("yes", "no, never", "it is so", "x", "perhaps not", "a longer answer", "so", "well then")
PAIRS = [{"prompt": f"{'why ' * (i % 3)}{i}?", "chosen": ANSWERS[i], "rejected": ANSWERS[i - 3]} for i in range(8)]
CUTS = {
    "8x1": {"per_device_train_batch_size": 8},
    "1x8": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "4x2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "tokens": {"per_device_train_batch_size": 8, "micro_batch_tokens": 60},
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Run]:
    """Make a run of a tiny model in float32, whose distributions are far from uniform; keywords stand under `train`."""

    def made(
        stage: Any, options: dict[str, Any] | None = None, rows: Any = PAIRS, folder: str = "run", **train: Any
    ) -> Run:
        return Run(
            stage,
            model={"from_config": TINY, "tokenizer": {"kind": "byte"}},
            data={"train": rows, "eval": rows, "max_length": 128},
            train={"bf16": False, "per_device_train_batch_size": 8, "logging_steps": 1, "warmup_steps": 0, **train},
            output_dir=str(tmp_path / folder),
            **{stage.name: options or {}},
        )

    return made


class Window:
    """A run's eight pairs as one micro-batch, and beside it each answer in float64 and by itself."""

    def __init__(self, run: Run) -> None:
        run.evaluate()
        self.run = run
        self.rows = [run.train_rows[index] for index in range(8)]
        self.batch = run.hooks.prepare_batch(self.rows).windows[0]
        run.save(run.output_dir.with_name("exact"))
        self.exact: Any = llmtk.load(str(run.output_dir.with_name("exact")))[0].double().eval()

    def output(self) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Return the loss as the loop makes it of the terms, its gradient (parameters,), and the stage's output."""
        self.run.model.zero_grad()
        output = self.run.hooks.compute_loss(self.batch)
        terms = output.terms.values()
        loss = sum(term.coefficient * term.sum / self.batch.weights[term.per].sum() for term in terms)
        loss.backward()
        return loss.detach(), gradient(self.run.model), output

    def exact_logps(self, side: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return of each answer the log-probs of all tokens but the first, prompt included, and which are targets."""
        found = []
        for row in self.rows:
            ids = torch.tensor([*row["prompt_ids"], *row[f"{side}_ids"]])
            targets = torch.tensor([*[False] * len(row["prompt_ids"]), *row[f"{side}_targets"]])
            logits = self.exact(input_ids=ids[None]).logits[0, :-1]
            found.append((logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0], targets[1:]))
        return found

    def exact_answers(self, side: str) -> list[torch.Tensor]:
        """Return the log-probs of each answer's tokens."""
        return [logps[targets] for logps, targets in self.exact_logps(side)]

    def assert_is(self, wanted: torch.Tensor) -> None:
        """Assert that loss and gradient are those of a loss made of exact log-probs."""
        loss, found, _ = self.output()
        self.exact.zero_grad()
        wanted.backward()
        by_hand = gradient(self.exact)
        assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-6)
        assert (found - by_hand).norm() < 2e-6 * by_hand.norm()


@pytest.fixture
def window() -> Callable[[Run], Window]:
    return Window


def gradient(model: torch.nn.Module) -> torch.Tensor:
    """Return the whole gradient (parameters,) in float64."""
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


class Keeping(torch.optim.SGD):
    """Keeps the gradients that it is given."""

    def step(self, closure: Any = None) -> Any:
        self.given = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
        return super().step(closure)


@pytest.fixture
def assert_same_however_cut(make: Any) -> Callable[..., None]:
    """Train two steps on one window of eight pairs, cut in several ways and shuffled: the same losses and gradients."""

    def check(stage: Any, options: dict[str, Any] | None = None) -> None:
        class Kept(stage):  # type: ignore[misc]  # a class made of a parameter
            name = stage.name

            def build_optimizer(self, run: Any) -> Any:
                return Keeping(run.hooks.parameter_groups(), lr=run.config.train.learning_rate)

        found = {}
        for name, cut in {**CUTS, "shuffled": CUTS["4x2"]}.items():
            rows = [PAIRS[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)] if name == "shuffled" else PAIRS
            settings = {"max_steps": 2, "learning_rate": 0.05, "max_grad_norm": 0, "eval_strategy": "no", **cut}
            run = make(Kept, options, rows, name, **settings)
            run.train()
            lines = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
            found[name] = [line["loss"] for line in lines if "loss" in line], run.optimizer.given
        losses, gradients = found.pop("8x1")
        assert len(losses) == 2
        assert losses[0] != losses[1]
        for name, (other, others) in found.items():
            assert other == pytest.approx(losses, rel=1e-6), name
            assert (others - gradients).norm() < 2e-6 * gradients.norm(), name

    return check
