"""Forward passes of a run's models: what a stage asks of the policy, of frozen models, and of views of the policy."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from llmtk.contract import REFERENCE
from llmtk.errors import PluginError
from llmtk.scoring import Memory, Scorer, Scores
from llmtk.scoring.kept import keep_less
from llmtk.training.evaluation import eval_mode
from llmtk.training.micro_batches import cut_window

if TYPE_CHECKING:
    from torch import nn

    from llmtk.batch import Batch
    from llmtk.run import Run
    from llmtk.training.neftune import EmbeddingNoise
    from llmtk.training.precompute import Precomputed
    from llmtk.training.router import RouterLoss

Answer = TypeVar("Answer")
Told = TypeVar("Told", Scores, Tensor)
View = Callable[[], AbstractContextManager[None]]


class Forward:
    """The models of a run, by name; the policy is None. `run.score` and the like say what the methods return."""

    def __init__(
        self,
        run: Run,
        scorers: Mapping[str | None, Scorer],
        views: Mapping[str, View],
        router: RouterLoss,
        noise: EmbeddingNoise | None = None,
    ) -> None:
        self.scorers = dict(scorers)
        self.views = dict(views)
        """Ways to see the policy as it was, such as without its adapter."""
        self.router = router
        self.compiled = False
        self.precomputed: Precomputed | None = None
        """What answers for the reference in its place."""
        self._run = run
        self._width = _width(run.model)
        self._noise = noise
        self._also: frozenset[str] = frozenset()
        self._memory: Memory | None = None

    def score(self, batch: Batch, model: str | None, also: Iterable[str], temperature: float) -> Scores:
        """Score a micro-batch."""
        return self._asked(("score", model, temperature), batch, lambda: self._score(batch, model, also, temperature))

    def _score(self, batch: Batch, model: str | None, also: Iterable[str], temperature: float) -> Scores:
        if self.precomputed is not None and model == REFERENCE:
            assert temperature == 1, "a stage that honours precompute_reference scores at temperature 1"
            return self.precomputed.scores(batch, also)
        wanted = frozenset(also) | (self._also if model is None else frozenset())
        return self._scorer(model).score(self._pass(model, batch), batch, wanted, temperature)

    def score_window(self, batch: Batch, model: str | None, also: Iterable[str], temperature: float) -> Scores:
        """Score a whole window."""
        wanted, device = frozenset(also), self._run.device
        if self.precomputed is not None and model == REFERENCE:
            return self.precomputed.scores(batch.to(device), wanted)
        parts, targets = self._over_window(batch, model, lambda part: self.score(part, model, wanted, temperature))
        return Scores.join(parts, targets, batch.to(device), wanted)

    def values(self, batch: Batch, model: str | None) -> Tensor:
        """Return a micro-batch's values (targets,)."""
        scorer, forward = self._scorer(model), self._pass(model, batch)
        return self._asked(("values", model), batch, lambda: scorer.values(forward, batch))

    def values_window(self, batch: Batch, model: str | None) -> Tensor:
        """Return a whole window's values (targets,)."""
        parts, targets = self._over_window(batch, model, lambda part: self.values(part, model))
        values = torch.zeros(len(targets), device=self._run.device)
        values[targets.to(values.device)] = torch.cat([values[:0], *parts])
        return values

    def map_logits(
        self, batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor], model: str | None
    ) -> Tensor:
        """Apply a function to a model's logits at target positions."""
        if self.precomputed is not None and model == REFERENCE:
            raise PluginError(
                "run.map_logits asks the reference for logits, and train.precompute_reference keeps its log-probs "
                "alone. A stage that maps the reference's logits does not honour that key"
            )
        scorer, forward = self._scorer(model), self._pass(model, batch)

        def compute() -> Tensor:
            # What another model says is a constant, whatever the columns are.
            with nullcontext() if model is None else torch.no_grad():
                return scorer.map_logits(forward, batch, fn, columns)

        return self._asked(("map_logits", model), batch, compute)

    @contextmanager
    def scoring_also(self, names: Iterable[str]) -> Iterator[None]:
        """Have the policy's scores hold more within a context than is asked for."""
        before = self._also
        self._also = before | frozenset(names)
        try:
            yield
        finally:
            self._also = before

    @contextmanager
    def remembering(self) -> Iterator[Memory]:
        """Take down within a context what models are asked about a micro-batch."""
        before = self._memory
        self._memory = Memory(before)
        try:
            yield self._memory
        finally:
            self._memory = before

    def _scorer(self, model: str | None) -> Scorer:
        if model not in self.scorers:
            known = ", ".join(sorted(name for name in self.scorers if name)) or "none"
            raise PluginError(
                f"The stage {self._run.config.stage!r} asks for the model {model!r}, and the run's frozen models are: "
                f'{known}. A reference is declared in the stage, needs = frozenset({{"reference"}}); others are made '
                "in build_models."
            )
        return self.scorers[model]

    def _asked(self, question: Hashable, batch: Batch, compute: Callable[[], Told]) -> Told:
        return compute() if self._memory is None else self._memory.asked(batch, compute, question)

    def _over_window(
        self, batch: Batch, model: str | None, fn: Callable[[Batch], Answer]
    ) -> tuple[list[Answer], Tensor]:
        """Apply `fn` to the micro-batches of a window without gradient, in eval mode.

        Return the answers that count, and which of the window's targets (targets,) they are about, one after the other.
        """
        run, train = self._run, self._run.config.train
        cut = cut_window(batch, run.backend, rows=train.per_device_train_batch_size, tokens=train.micro_batch_tokens)
        with torch.no_grad(), eval_mode(run.frozen.get(model or "", run.model)):
            answers = [fn(part.batch) for part in cut.parts]
        counting = [part for part in cut.parts if part.counts]
        return answers[: len(counting)], batch.targets_of([group for part in counting for group in part.groups])

    def _pass(self, model: str | None, batch: Batch) -> Callable[..., Any]:
        """Return a model's forward pass, as a scorer calls it for the batch."""
        backend = self._run.backend
        if model is None:

            def policy(**inputs: Any) -> Any:
                # What is compiled chooses itself what to keep.
                size = 0 if self.compiled else len(batch.tokens) * self._width
                with keep_less(backend.device, size), self._noisy(batch, inputs):
                    output = backend.wrapped(**inputs)
                self.router.hear(output, batch)
                return output

            return policy
        if model in self.views:
            view = self.views[model]

            def seen(**inputs: Any) -> Any:
                with torch.no_grad(), view():
                    return backend.wrapped(**inputs)

            return seen
        frozen = self._run.frozen[model]

        def forward(**inputs: Any) -> Any:
            with torch.no_grad(), backend.autocast():
                return frozen(**inputs)

        return forward

    def _noisy(self, batch: Batch, inputs: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Put noise on the embeddings of what the policy is trained on, and of nothing else."""
        if self._noise is None or not (self._run.model.training and torch.is_grad_enabled()):
            return nullcontext()
        return self._noise.on(batch, inputs)


def _width(root: nn.Module) -> int:
    """Return how many numbers a token's hidden state has; 0 where the root's configuration does not say."""
    config: Any = getattr(root, "config", None)
    return getattr(config.get_text_config(), "hidden_size", 0) if hasattr(config, "get_text_config") else 0
