"""What a stage is, and what a run offers to it. Third parties build on this file, so it changes with `API` alone.

A stage subclasses `Stage` and overrides the hooks that it needs; none of them takes a decorator. The defaults stand in
`llmtk.training.defaults`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from llmtk.config.sections import Section

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

    from llmtk.batch import Batch, LossOutput, Round
    from llmtk.data import Row as DataRow
    from llmtk.generation import Completion, Sampling
    from llmtk.host.hooks import Hooks
    from llmtk.scoring import Memory, Scores

API = 1
"""The contract's version. A stage that declares another one is refused."""

Row = dict[str, Any]
"""An encoded row: `input_ids`, `targets` and whatever else its row type has, `length` in tokens, and `place`."""

Need = Literal["reference", "reward", "generation"]
RowType = Literal["text", "dialogue", "prompt_completion", "pair", "labelled", "prompt"]
"""What a row may be: `llmtk.data.rows` has a class for each."""
Head = Literal["language", "value"]
"""What a model's head gives: logits over the vocabulary, or one value (transformers' sequence classification)."""

REFERENCE = "reference"
"""The name of the model that a run keeps for stages that need a reference."""


class Dataset(Protocol):
    """Rows by index: a `datasets.Dataset`, or anything like it.

    Where it has a column `length`, the tokens of each row, the rows of a global batch are dealt to the ranks by it, so
    that all have about equally much to compute; else they are dealt in turns. A rank has as many rows either way.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Row: ...


@dataclass(frozen=True)
class Data:
    """The encoded rows of a run."""

    train: Dataset
    """What is trained on."""
    eval: Dataset | None = None
    """What is evaluated on as the run goes, and at its end."""
    test: Dataset | None = None
    """What the finished model is evaluated on, once."""
    mixture: Sequence[tuple[int, float]] = ()
    """(rows, weight) of each part of the training rows, in their order: how often each row comes in an epoch. Empty:
    each once."""


@dataclass(frozen=True)
class Models:
    """The one trainable root module, which may hold several, and frozen ones by name: `run.score(…, model=name)`."""

    root: nn.Module
    """What is trained, and exported."""
    frozen: Mapping[str, nn.Module] = field(default_factory=dict)
    """What is not trained."""
    views: Mapping[str, Callable[[], AbstractContextManager[None]]] = field(default_factory=dict)
    """Frozen models that are the root itself, seen in another way (its adapter off): what it computes in a context."""
    changing: frozenset[str] = frozenset()
    """Frozen models that the stage changes as it trains. They are saved in checkpoints."""


@dataclass(frozen=True)
class Demo:
    """What `llmtk run STAGE` does with no configuration: rows, settings, and the figure that should improve."""

    train: list[dict[str, Any]]
    """Rows to train on, as a user's file has them."""
    eval: list[dict[str, Any]]
    """Rows to evaluate on."""
    config: Mapping[str, Any]
    """The settings, in sections, as in a configuration file."""
    figure: str
    """Name of the figure, for example "exact match"."""
    measure: Callable[[RunView], float]
    """Measures the figure on held-out rows."""
    higher_is_better: bool = True
    also: Mapping[str, Callable[[RunView], float]] = field(default_factory=dict)
    """Further figures by name, measured and shown beside."""


class RunView(Protocol):
    """A run as stages and plugins see it."""

    stage: Stage
    """What trains: its declarations (`needs`, `head`, ...) and its options."""
    stage_name: str
    """What the stage is called, as its section of the configuration is."""
    hooks: Hooks
    """Every hook of this run. Call these, not `self.compute_loss`, so that plugins are felt."""
    model: nn.Module
    """The trainable root, not wrapped. To compute with it, use `score`, which enters through the wrapped one."""
    frozen: dict[str, nn.Module]
    """The models that are not trained, by the names that `score` takes."""
    tokenizer: PreTrainedTokenizerBase
    """The model's tokenizer."""
    train_rows: Dataset
    """The rows to train on, encoded."""
    eval_rows: Dataset | None
    """The rows to evaluate on, encoded, if there are any."""

    @property
    def data_seed(self) -> int:
        """The seed of the data order."""

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""

    @property
    def rank(self) -> int:
        """This process among all."""

    @property
    def world_size(self) -> int:
        """How many processes train together."""

    @property
    def step(self) -> int:
        """Optimizer steps taken."""

    @property
    def global_rows(self) -> int:
        """Rows of a global batch, over all ranks."""

    @property
    def windows_per_round(self) -> int:
        """Optimizer steps that are made of a global batch."""

    @property
    def max_length(self) -> int:
        """Tokens of a sequence, at most."""

    def score(
        self, batch: Batch, *, model: str | None = None, also: Iterable[str] = (), temperature: float = 1.0
    ) -> Scores:
        """Return the log-prob of every target token; `model` names a frozen one. See `llmtk.scoring`.

        Logits are divided by `temperature`, as when tokens are sampled at it.
        """

    def scoring_also(self, *names: str) -> AbstractContextManager[None]:
        """Have the policy's scores hold more within a context than the stage asks for, from the same pass.

        For `around_compute_loss`: what `inner` hands on as its scores then has these too. Names as in `score`.
        """

    def remembering(self) -> AbstractContextManager[Memory]:
        """Take down within a context what models are asked about a micro-batch, so that `compute_loss` can be asked
        about some of its groups again without a forward pass: see `llmtk.scoring.Memory`."""

    def score_window(
        self, batch: Batch, *, model: str | None = None, also: Iterable[str] = (), temperature: float = 1.0
    ) -> Scores:
        """Score a whole window without gradient, in micro-batches, in eval mode. All ranks must call it together."""

    def values(self, batch: Batch, *, model: str | None = None) -> Tensor:
        """Return the value (targets,) at the position that predicts each target, by a head of one value a token."""

    def values_window(self, batch: Batch, *, model: str | None = None) -> Tensor:
        """Return a whole window's values (targets,), as `score_window` scores it. All ranks must call it together."""

    def map_logits(
        self, batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor] = (), *, model: str | None = None
    ) -> Tensor:
        """Return `fn(logits, *columns)` of all targets, (targets, ...), with the exact gradient.

        `fn` is called once a tile of targets, and again for each in the backward pass: with their logits
        (tile, vocabulary) in float32 and their part (tile, ...) of each column (targets, ...). It gives (tile, ...).
        What belongs to targets therefore comes in as a column, never from around `fn`; ValueError for a column or an
        answer of another length.

        `model` names a frozen one, or a view of the policy, whose logits have no gradient. Two models meet by a column,
        which holds the teacher's logits of the whole micro-batch, (targets, vocabulary) in float32:

            teacher = run.map_logits(batch, lambda logits: logits, model="teacher")
            kl = run.map_logits(batch, kl_of_logits, [teacher])     # kl_of_logits(student, teacher) -> (tile,)
        """

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Sample `sampling.n` completions of tokenised prompts with the current policy, without gradient.

        `seeds` (prompts,) give each prompt random numbers of its own, whatever prompts stand beside it or on other
        ranks; without them, prompts are numbered under `sampling.seed`, and every call and every rank draws the same
        numbers. In `prepare_batch`, make seeds of a number that `run.generator` draws once a round and of each row's
        `place`: no rank, cut or resume changes them (docs/generation.md). All ranks must call it together.
        """

    def generator(self, purpose: str) -> torch.Generator:
        """Return this purpose's own random generator, on the CPU and equal on all ranks, which checkpoints keep.

        Draw as often on every rank, or what is drawn for rows will follow from the rank that has them.
        """

    def encode(self, data: Any, row_types: Sequence[str]) -> Dataset:
        """Read rows of these types from a source, several, or a list of them, and encode them as the run's own are.

        For plugins that bring data of their own, in `build_data`. DatasetError as for the run's.
        """

    def draw(self, rows: int) -> list[Row]:
        """Take this rank's share of `rows` more rows of the training data. All ranks must call it together."""

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up named numbers over all ranks, in float64; a rank may lack a name. All ranks must call it."""

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON-like value, by rank. All ranks must call it together."""

    def setting(self, key: str) -> Any:
        """Return one of the core's optional keys that the stage declares in `honours`."""

    def sampling(self, **settings: Any) -> Sampling:
        """Return how to sample from this run's model: its stop tokens, and these settings."""

    def prompt_tokens(self, text: str) -> list[int]:
        """Return the tokens of a question: through the chat template where there is one, else as plain text."""

    def evaluate(self) -> dict[str, float]:
        """Return the exact means over the run's evaluation rows. All ranks must call it together."""

    def log_samples(self, samples: Sequence[Mapping[str, Any]], steps: int = 1) -> None:
        """Write the main rank's samples to samples.jsonl and show them, if a line of the log is due within `steps`.

        A sample is a mapping with `prompt`, `completion`, `reward` and whatever else there is to tell.
        """

    def notify(self, message: str) -> None:
        """Say something to the user, once."""


class Stage:
    """A training method. Subclass it, declare what it needs, and override `prepare_batch` and `compute_loss`."""

    api: ClassVar[int] = API
    """The contract's version that it is written for."""

    class Options(Section):
        """The stage's own section of the configuration."""

    summary: ClassVar[str] = ""
    """One line: what the method does."""
    paper: ClassVar[str] = ""
    """Where it comes from: arXiv number or title."""
    citation: ClassVar[str] = ""
    """The same as BibTeX, for the cards of models; it may be indented as code is."""
    row_types: ClassVar[tuple[RowType, ...]] = ("dialogue",)
    """Row types that it takes. Rows of other types are converted to the first that can be reached."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """What it needs beside the model: a reference, rewards, or completions that the policy writes."""
    honours: ClassVar[frozenset[str]] = frozenset()
    """Which of the core's optional keys it honours: `label_smoothing_factor`, ..."""
    head: ClassVar[Head] = "language"
    """The head of the model that is trained: a language model's, or one of one value a token (transformers'
    sequence classification with one label), which `run.values` asks."""
    may_change: ClassVar[tuple[str, ...]] = ()
    """Which of its own options a resumed run may change; of the others it refuses any change."""
    once: ClassVar[tuple[str, ...]] = ()
    """Which of its own options are said to one start of a run alone, as what overrides a refusal to go on is: the run's
    folder does not keep them, and the next resume begins without."""
    dropout: ClassVar[bool] = False
    """Whether the model's dropout stays on unless the user says otherwise."""
    defaults: ClassVar[Mapping[str, Any]] = {}
    """Its defaults for the shared sections, for example {"train": {"learning_rate": 2e-5}}."""

    def __init__(self, options: Section | None = None) -> None:
        """Keep the options, of which the stage reads nothing else of the configuration."""
        self.options: Any = options if options is not None else self.Options()

    @property
    def windows_per_round(self) -> int:
        """How many windows, and so optimizer steps, each of its rounds has."""
        return 1

    @property
    def reference(self) -> Literal["none", "frozen", "changing"]:
        """What `model="reference"` is with these options: the policy as it is when the run starts, or model.reference.

        `changing`: a model of its own, in the policy's dtype, which the stage moves as it trains.
        """
        return "frozen" if "reference" in self.needs else "none"

    def demo(self) -> Demo:
        """Return demo data and settings for a run without configuration."""
        raise NotImplementedError

    def check(self, run: RunView) -> None:
        """Refuse settings that do not go together, with a ConfigurationError, before anything is loaded."""

    def encode_rows(self, run: RunView, rows: Sequence[DataRow]) -> Dataset:
        """Turn checked rows into encoded ones: through the chat template and the tokenizer."""
        from llmtk.training import defaults

        return defaults.encode_rows(run, rows)

    # The stage hooks: each has exactly one answer, the stage's. See llmtk.host.hookspecs.

    def build_models(self, run: RunView) -> Models:
        """Return the trainable root and the frozen models."""
        from llmtk.training import defaults

        return defaults.build_models(run)

    def build_data(self, run: RunView) -> Data:
        """Return the encoded rows."""
        from llmtk.training import defaults

        return defaults.build_data(run)

    def parameter_groups(self, run: RunView) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups."""
        from llmtk.training import defaults

        return defaults.parameter_groups(run)

    def build_optimizer(self, run: RunView) -> torch.optim.Optimizer:
        """Return the run's one optimizer, over `run.hooks.parameter_groups()`."""
        from llmtk.training import defaults

        return defaults.build_optimizer(run)

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        """Turn this rank's rows of a global batch (perhaps none) into a round: all that needs no gradient."""
        raise NotImplementedError

    def compute_loss(self, run: RunView, batch: Batch) -> LossOutput:
        """Return the loss of one micro-batch: a pure function of the model and the batch."""
        raise NotImplementedError

    def evaluate_batch(self, run: RunView, batch: Batch) -> LossOutput:
        """Return the loss and metrics of one evaluation batch; eval mode, no gradient."""
        return run.hooks.compute_loss(batch)

    def export_model(self, run: RunView, path: Path) -> None:
        """Write what users of the trained model load."""
        from llmtk.training import defaults

        defaults.export_model(run, path)
