"""What the tests of the reinforcement stages share: tiny runs, and a policy that is a table of logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtk import Completion, Run
from llmtk.generation import Segment
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
ROWS = [{"prompt": f"{'why ' * (i % 3)}{i}?", "answer": str(i)} for i in range(8)]
GRADED = """
def score(completion_ids):
    return [sum(ids) % 7 / 7 for ids in completion_ids]
"""
"""Rewards that differ from completion to completion, whatever they are."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices on a busy machine: threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def graded(tmp_path: Path) -> dict[str, str]:
    """A reward of a file."""
    (tmp_path / "graded.py").write_text(GRADED)
    return {"file": str(tmp_path / "graded.py"), "function": "score"}


@pytest.fixture
def make(tmp_path: Path, graded: dict[str, str]) -> Iterator[Callable[..., Run]]:
    """Make a run of a tiny model in float32, by default of 4 x 4 completions of 6 tokens; keywords stand under `train`.

    Its rewards' processes end with the test.
    """
    runs: list[Run] = []

    def made(
        stage: Any = "grpo",
        options: dict[str, Any] | None = None,
        rows: Any = ROWS,
        folder: str = "run",
        evaluation: Any = None,
        plugins: Any = (),
        max_length: int = 64,
        **train: Any,
    ) -> Run:
        usual = {"rewards": [graded], "num_generations": 4, "max_completion_length": 6}
        settings = {"bf16": False, "per_device_train_batch_size": 4, "logging_steps": 1, "warmup_steps": 0}
        runs.append(
            Run(
                stage,
                model={"from_config": TINY, "tokenizer": {"kind": "byte"}},
                data={"train": rows, "eval": evaluation, "max_length": max_length},
                train={**settings, "max_steps": 2, "learning_rate": 0.01, "save_strategy": "no", **train},
                plugins=plugins,
                output_dir=str(tmp_path / folder),
                **{stage if isinstance(stage, str) else stage.name: usual | (options or {})},
            )
        )
        return runs[-1]

    yield made
    for run in runs:
        run.stage.run_finished(run, None)


class Table:
    """A run whose policy is a table: completions are one token long, and are written in their exact proportions.

    A stage prepares its rounds and computes its loss on it as on any other; only scores and completions are the
    table's, and rewards (tokens,) are known.
    """

    rank, world_size, global_rows, max_length, step = 0, 1, 1, 8, 0
    device = torch.device("cpu")

    def __init__(self, stage: Any, reference: Tensor, rewards: Tensor) -> None:
        self.stage, self.reference = stage, reference.double().log_softmax(0)
        self.logits = torch.zeros_like(self.reference).requires_grad_()
        self.model = SimpleNamespace(training=True)
        self.tokenizer = SimpleNamespace(decode=lambda tokens, **_: str(tokens[0]))
        self._generator = torch.Generator().manual_seed(0)
        stage._rewards = _Known(rewards)

    @property
    def policy(self) -> Tensor:
        """(tokens,): the probability of each token."""
        return self.logits.detach().softmax(0)

    def train(self, steps: int, learning_rate: float) -> Tensor:
        """Take steps of plain gradient descent, and return the policy."""
        row = {"prompt": '"q"', "prompt_ids": [0], "columns": "{}", "place": "row 1"}
        for _ in range(steps):
            for window in self.stage.prepare_batch(self, [row]).windows:
                terms = self.stage.compute_loss(self, window).terms.values()
                loss = sum(term.coefficient * term.sum / window.weights[term.per].sum() for term in terms)
                (gradient,) = torch.autograd.grad(loss, self.logits)
                with torch.no_grad():
                    self.logits -= learning_rate * gradient
        return self.policy

    # What a stage asks of a run

    def generate(self, prompts: Any, sampling: Any, seeds: Any = None) -> list[list[Completion]]:
        """The i-th of n completions is the token at (i + 1/2) / n of the cumulative distribution."""
        at = (torch.arange(sampling.n) + 0.5) / sampling.n
        tokens = torch.searchsorted(self.policy.cumsum(0), at.double()).clamp(max=len(self.logits) - 1)
        logps = self.policy.log()[tokens]
        written = [
            Completion((Segment([token], [logp]),), "stop")
            for token, logp in zip(tokens.tolist(), logps.tolist(), strict=True)
        ]
        return [written for _ in prompts]

    def score(self, batch: Any, *, model: str | None = None, also: Any = (), temperature: float = 1.0) -> Scores:
        logps = self.logits.log_softmax(0) if model is None else self.reference
        found = logps[batch.target_tokens]
        return Scores(batch, found, entropy=-(logps.exp() * logps).sum().expand_as(found))

    def score_window(self, batch: Any, **given: Any) -> Scores:
        with torch.no_grad():
            return self.score(batch, **given)

    def sampling(self, **settings: Any) -> Any:
        return SimpleNamespace(stop_tokens=(), **settings)

    def generator(self, purpose: str) -> torch.Generator:
        return self._generator

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def sum_over_ranks(self, values: Any) -> Any:
        return values

    def log_samples(self, samples: Any, steps: int = 1) -> None:
        pass

    def notify(self, message: str) -> None:
        pass


class _Known:
    """Rewards of a table."""

    names, weights, left_out = ("known",), (1.0,), ()

    def __init__(self, table: Tensor) -> None:
        self.table = table.double()

    def __call__(self, samples: Sequence[Any]) -> Tensor:
        return self.table[[sample.completion_ids[0] for sample in samples]][:, None]


@pytest.fixture
def table() -> type[Table]:
    return Table
