"""A run: a stage, its plugins and a configuration, from files to a trained model.

`Run` is what Python users and the CLI drive, and what stages see as `RunView`. The training itself is
`llmtk.training.loop`.
"""

from __future__ import annotations

import contextlib
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmtk.batch import Batch, Mean
from llmtk.config.problems import shown
from llmtk.config.reading import merge, without_shorthands
from llmtk.config.run_config import SWITCHES, RunConfig, resolve
from llmtk.contract import Data, Dataset, Demo, Row, Stage
from llmtk.errors import ConfigurationError, DatasetError, LlmtkError, PluginError
from llmtk.folder import RunFolder
from llmtk.generation import Completion, Engine, Sampling
from llmtk.generation.engines import engine_of
from llmtk.host import discovery, manager
from llmtk.host.hooks import Hooks
from llmtk.reporting import summary
from llmtk.reporting.console import Console
from llmtk.reporting.logs import RunLog
from llmtk.reporting.records import Records
from llmtk.reporting.speed import Speed
from llmtk.scoring import Memory, Scores
from llmtk.training import checkpoints, loop, optimizers, setup, snapshot
from llmtk.training.backend import Backend
from llmtk.training.evaluation import eval_mode, evaluate
from llmtk.training.events import Evaluation, Plan
from llmtk.training.fetching import Fetcher
from llmtk.training.loop import Interrupted
from llmtk.training.order import share
from llmtk.training.precompute import precompute
from llmtk.training.predicting import write_predictions
from llmtk.training.randomness import Randomness
from llmtk.training.signals import first_signal
from llmtk.training.state import TrainState
from llmtk.training.tally import Tally

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedTokenizerBase

    from llmtk.data import Splits
    from llmtk.data.rows import Message, Prompt
    from llmtk.training.forward import Forward
    from llmtk.training.order import Lengths, RowOrder
    from llmtk.training.stream import StreamedRows

__all__ = ["Interrupted", "Result", "Run", "evaluate_run"]


@dataclass(frozen=True)
class Result:
    """What a finished run came to."""

    final_loss: float | None
    """The loss of the last line of the log, if there was one."""
    best_metric: float | None
    """The best value of train.metric_for_best_model, where the best checkpoint was looked for."""
    best_model_path: str | None
    """That checkpoint's folder, if it is kept."""
    steps: int
    """Optimizer steps taken, with those of the runs that this one resumed."""
    metrics: Mapping[str, float]
    """The last evaluation's metrics; for a demo also its figure before and after."""
    output_dir: str
    """The run's folder, which holds the model."""


class Run:
    """One run. Making it checks configuration and plugins; `train` does the rest.

    `stage` is an installed stage's name, or a `Stage` class or instance. The sections are mappings, as in a
    configuration file; `model` may be a name, `data` a file or rows. The stage's options stand under its name. None is
    as a section not given; for `peft`, `fsdp` and `deepspeed` it takes away a default, or what a resumed run had.
    `plugins` are names with their options, or instances.

        run = Run(stage="sft", model="path", data="rows.jsonl", train={"max_steps": 100}, output_dir="runs/a")
        result = run.train()
    """

    # What setting up loads: llmtk.training.setup
    backend: Backend
    randomness: Randomness
    splits: Splits
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    eval_rows: Dataset | None
    test_rows: Dataset | None
    questions: list[Prompt]
    """What the finished model is to answer."""
    train_lengths: Lengths | None
    """The tokens of each training row, if they are known."""
    fetcher: Fetcher
    model: nn.Module
    frozen: dict[str, nn.Module]
    changing: frozenset[str]
    """Frozen models that the stage moves, which checkpoints keep."""
    forward: Forward
    optimizer: torch.optim.Optimizer
    order: RowOrder | StreamedRows
    plan: Plan
    scheduler: Any
    schedule_waits: bool
    """Whether the schedule moves on with evaluations."""

    def __init__(
        self,
        stage: str | Stage | type[Stage],
        *,
        plugins: Mapping[str, Mapping[str, Any]] | Sequence[object] = (),
        resume: str | None = None,
        **sections: Any,
    ) -> None:
        self.stage_name, stage_class = _stage_class(stage)
        if isinstance(stage, Stage) and self.stage_name not in sections:
            sections[self.stage_name] = stage.options.model_dump(exclude_unset=True)
        _refuse_plain(plugins)
        named = plugins if isinstance(plugins, Mapping) else {}
        instances = () if isinstance(plugins, Mapping) else plugins
        given = {name: value for name, value in sections.items() if value is not None or name in SWITCHES}
        layer = given | ({"plugins": named} if named else {})
        self.folder, layer = RunFolder.find(self.stage_name, without_shorthands(layer), resume)
        self.demo = None if _names_input(layer) else _demo_of(stage_class, self.stage_name)
        layers = [layer] if self.demo is None else [_demo_layer(self.demo), layer]
        self.config: RunConfig = resolve(self.stage_name, stage_class, *layers)
        optimizers.check_optimizer(self.config.train)
        if self.folder.is_resumed and not self.config.train.do_train:
            raise ConfigurationError(
                "train.do_train: false evaluates the model that is named. A run's own: llmtk evaluate RUN"
            )

        self.stage = stage if isinstance(stage, Stage) else stage_class(self.config.options)
        self.stage.options = self.config.options
        loaded = [*manager.load_plugins(self.config.plugins), *((_plugin_name(p), p) for p in instances)]
        self.manager = manager.build_manager(self.stage, self.stage_name, loaded)
        self.hooks = Hooks(self.manager, self)
        self.console = Console()
        self.records = Records(self.folder)
        self.state = TrainState()
        self.saved_step = -1
        self.resumed_at = 0
        self.exported: Path | None = None
        self.opened: nn.Module | None = None
        self._signal: int | None = None
        self._said: set[str] = set()
        self._subject = ""
        self._speed = Speed()
        self.whole_weights: dict[str, Tensor] | None = None
        self.engine: Engine | None = None
        self._is_set_up = False

    @classmethod
    def from_layers(cls, stage: str | None, *layers: Mapping[str, Any], resume: str | None = None) -> Run:
        """Make a run from configuration layers, the later over the earlier: what the CLI does."""
        merged = merge(*layers)
        name = stage or merged.get("stage")
        if not isinstance(name, str):
            raise ConfigurationError("no stage: name one (llmtk run STAGE), or give `stage:` in the configuration file")
        if merged.pop("stage", name) != name:
            raise ConfigurationError(f"the configuration is for another stage than {name}; name the same one, or none")
        plugins = merged.pop("plugins", None) or {}
        return cls(name, plugins=plugins, resume=resume, **merged)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open a finished run, to evaluate its model or to predict with it."""
        folder = RunFolder(Path(path))
        run = cls.from_layers(None, folder.finished())
        run.folder, run.records, run.exported = folder, Records(folder), folder.path
        return run

    # What users call

    def train(self) -> Result:
        """Train, and export the model. Raises an LlmtkError with what to do for whatever the user can mend."""
        error: BaseException | None = None
        self.log = RunLog(self.config.train.log_level)
        try:
            self._set_up()
            return self._train()
        except BaseException as caught:
            error = caught
            self.log.failed(caught)
            self._say_what_stands(caught)
            raise
        finally:
            try:
                self._close(error)
            finally:
                self.log.close()

    def _close(self, error: BaseException | None) -> None:
        """Let go of what training held, and tell the plugins how it ended."""
        if not self._is_set_up:
            return
        self.console.end(self.state.step)
        self.fetcher.close()
        self.backend.close_trackers()
        try:
            self.hooks.run_finished(error)
        finally:
            self.folder.release()

    def prepare(self) -> Plan:
        """Load data and model, and return what `train` would do. Nothing is trained, and nothing written."""
        self._set_up(only_to_plan=True)
        self.folder.check_same_run(self)
        return self.plan

    def evaluate(self, data: str | list[str] | list[dict[str, Any]] | None = None) -> dict[str, float]:
        """Return loss and the stage's metrics on other data, or on the run's evaluation rows."""
        self._open_or_set_up(data is None)
        rows = self.eval_rows if data is None else self._encode(data)
        if rows is None:
            raise ConfigurationError("there is no evaluation data: give some, or data.eval")
        values = evaluate(self, rows)
        if values is None:
            raise Interrupted(f"{self.signal_name()} stopped the evaluation")
        return values

    def predict(self, prompts: str | Sequence[str | list[Message]], **sampling: Any) -> Any:
        """Answer a question, or each of several, through the chat template where there is one, else as plain text.

        One of several may be a dialogue, a list of messages. An answer is text; with `n` over 1, a list of n texts.
        """
        self._open_or_set_up()
        settings = self.sampling(**sampling)
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        answers = self.generate([self.prompt_tokens(prompt) for prompt in asked], settings)
        texts = [[self.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in copies] for copies in answers]
        found = texts if settings.n > 1 else [copies[0] for copies in texts]
        return found[0] if isinstance(prompts, str) else found

    def load_data(self) -> Data:
        """Read and encode the rows as a run does before it trains, without a model, and without writing anything."""
        return setup.load_data(self)

    def save(self, path: str | Path) -> None:
        """Write the model as it is now, loadable with from_pretrained."""
        self._set_up()
        self.whole_weights = self.backend.whole_weights()
        if self.backend.is_main:
            self.hooks.export_model(Path(path))

    # What stages and plugins see: llmtk.contract.RunView

    @property
    def rank(self) -> int:
        """This process among all."""
        return self.backend.rank

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return self.backend.world_size

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.backend.device

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return self.state.step

    @property
    def max_length(self) -> int:
        """Tokens of a sequence, at most."""
        return self.config.data.max_length

    @property
    def data_seed(self) -> int:
        """The seed of the data order and of what is held out."""
        train = self.config.train
        return train.seed if train.data_seed is None else train.data_seed

    @property
    def global_rows(self) -> int:
        """Rows of a global batch, over all ranks."""
        train = self.config.train
        return train.per_device_train_batch_size * train.gradient_accumulation_steps * self.world_size

    @property
    def windows_per_round(self) -> int:
        """Optimizer steps that are made of a global batch."""
        return self.stage.windows_per_round

    def score(
        self, batch: Batch, *, model: str | None = None, also: Iterable[str] = (), temperature: float = 1.0
    ) -> Scores:
        """Return the log-prob of every target token."""
        return self.forward.score(batch, model, also, temperature)

    def score_window(
        self, batch: Batch, *, model: str | None = None, also: Iterable[str] = (), temperature: float = 1.0
    ) -> Scores:
        """Score a whole window without gradient, in micro-batches, in eval mode. All ranks must call it together."""
        return self.forward.score_window(batch, model, also, temperature)

    def values(self, batch: Batch, *, model: str | None = None) -> Tensor:
        """Return the value (targets,) at the position that predicts each target, by a head of one value a token."""
        return self.forward.values(batch, model)

    def values_window(self, batch: Batch, *, model: str | None = None) -> Tensor:
        """Return a whole window's values (targets,), as `score_window` scores it. All ranks must call it together."""
        return self.forward.values_window(batch, model)

    def map_logits(
        self, batch: Batch, fn: Callable[..., Tensor], columns: Sequence[Tensor] = (), *, model: str | None = None
    ) -> Tensor:
        """Apply `fn(logits, *columns)` to the logits at target positions, with the exact gradient."""
        return self.forward.map_logits(batch, fn, columns, model)

    def scoring_also(self, *names: str) -> AbstractContextManager[None]:
        """Have the policy's scores hold more within a context than the stage asks for."""
        return self.forward.scoring_also(names)

    def remembering(self) -> AbstractContextManager[Memory]:
        """Take down within a context what models are asked about a micro-batch."""
        return self.forward.remembering()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Sample completions of tokenised prompts with the current policy, without gradient."""
        if not self.forward.scorers[None].has_logits:
            raise ConfigurationError(f"a model of stage {self.stage_name} has a head of one value, and writes no text")
        if self.engine is None:
            self.engine = engine_of(self)
        return self.engine.generate(prompts, sampling, seeds)

    def sampling(self, **settings: Any) -> Sampling:
        """Return how to sample from this run's model: its stop tokens, and these settings."""
        from llmtk.models.tokenizers import stop_token_ids

        try:
            return Sampling(
                **{
                    "stop_tokens": tuple(stop_token_ids(self.tokenizer)),
                    "batch_size": self.config.generation.batch_size,
                    **settings,
                }
            )
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"sampling settings: {error}") from error

    def prompt_tokens(self, text: str | list[Message]) -> list[int]:
        """Return the tokens of a question: through the chat template where there is one, else as plain text.

        ConfigurationError for a dialogue where there is no chat template.
        """
        tokenizer: Any = self.tokenizer
        if not isinstance(text, str) and not tokenizer.chat_template:
            raise ConfigurationError("the prompt is a dialogue, and the tokenizer has no chat template; give text")
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        return list(tokenizer(text)["input_ids"])

    def generator(self, purpose: str) -> torch.Generator:
        """Return this purpose's own random generator, which checkpoints keep."""
        return self.randomness.generator(purpose)

    def encode(self, data: Any, row_types: Sequence[str]) -> Dataset:
        """Read rows of these types, and encode them as the run's own are."""
        from llmtk.data import read_rows
        from llmtk.training import defaults

        return defaults.encode_rows(self, read_rows(data, row_types, self.config.data))

    def draw(self, rows: int) -> list[Row]:
        """Take this rank's share of `rows` more rows of the training data. All ranks must call it together."""
        assert self.model.training, "run.draw takes training rows: an evaluation must leave them where they are"
        return self.fetcher.fetch(self.mine(self.order.take(rows, cross=True)))

    def sum_over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        """Add up named numbers over all ranks."""
        return self.backend.sum(values)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        return self.backend.gather(value)

    def setting(self, key: str) -> Any:
        """Return one of the core's optional keys that the stage declares in `honours`."""
        assert key in self.stage.honours, f"stage {self.stage_name} does not declare {key!r} in `honours`"
        return getattr(self.config.train, key)

    def notify(self, message: str) -> None:
        """Say something to the user, once."""
        message = f"{self._subject}{message}"
        if message not in self._said:
            self._said.add(message)
            self.console.say(message)

    @contextlib.contextmanager
    def speaking_of(self, subject: str) -> Iterator[None]:
        """Put a subject before all that is said meanwhile, and before the error of data that cannot be used."""
        before, self._subject = self._subject, f"{subject}: "
        try:
            yield
        except DatasetError as error:
            error.args = (f"{subject}: {error}",)
            raise
        finally:
            self._subject = before

    # What the loop needs

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints."""
        return self.folder.checkpoints

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.folder.path

    def next_rows(self) -> list[Row]:
        """Take this rank's share of the next global batch, and begin with those that come."""
        indices = self.order.take(self.global_rows)
        coming = self.order.ahead(self.global_rows, self.fetcher.batches) if self.fetcher.batches else []
        return self.fetcher.fetch(self.mine(indices), [self.mine(batch) for batch in coming])

    def mine(self, indices: list[int]) -> list[int]:
        """Return this rank's part of a global batch."""
        return share(indices, self.train_lengths, self.rank, self.world_size)

    def reduce_means(self, means: Mapping[str, Mean]) -> dict[str, Mean]:
        """Add metrics up over all ranks; one may be there on some ranks only."""
        whole = Tally()
        for rank in self.gather({name: [float(m.sum), float(m.count), m.then] for name, m in means.items()}):
            whole.add(Tally(metrics=rank))
        return {name: Mean(*entry) for name, entry in whole.metrics.items()}

    def first_of_ranks(self, value: str | None) -> str | None:
        """Return the first rank's value that is not None, on all ranks."""
        return next((answer for answer in self.gather(value) if answer is not None), None)

    def interrupted(self) -> bool:
        """Say whether any rank was asked to stop. All ranks must call it together."""
        signals = [number for number in self.gather(self._signal) if number is not None]
        self._signal = signals[0] if signals else None
        return bool(signals)

    def signal_name(self) -> str:
        """Return the name of the signal that asked to stop."""
        return signal.Signals(self._signal).name if self._signal is not None else "nobody"

    def schedule_step(self, refused: bool = False) -> None:
        """Move the learning rate on, after a refused step too, unless the schedule waits for evaluations."""
        if self.schedule_waits:
            return
        with warnings.catch_warnings() if refused else contextlib.nullcontext():
            if refused:
                # Where the first step is, torch takes it for a loop that has the order of the two wrong.
                warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
            self.scheduler.step()

    def schedule_evaluated(self, metrics: Mapping[str, float]) -> None:
        """Give an evaluation to a schedule that waits for it."""
        if self.schedule_waits:
            self.scheduler.step(metrics["eval_loss"])

    def count_speed(self, seconds: float, tokens: int, rows: int) -> float:
        """Count a step, and return the tokens a second since the last line of the log."""
        self._speed.add(seconds, tokens, rows)
        return self._speed.tokens_per_second

    def record(self, values: Mapping[str, float]) -> None:
        """Write a line of metrics, to the file and to the trackers."""
        line = {"step": self.state.step, "epoch": round(self.order.epochs, 6), **values}
        if self.backend.is_main:
            self.records.write("metrics", line)
        self._track(values)

    def record_timings(self, values: Mapping[str, float], extra: Mapping[str, float]) -> None:
        """Write a line of timings, to the file and the trackers, and print the line of metrics that belongs to it."""
        speed = self._speed.tokens_per_second
        timings = {**self._speed.take(), **extra}
        if self.backend.is_main:
            self.records.write("timings", {"step": self.state.step, **timings})
        self._track({name: value for name, value in timings.items() if name != "time" and value is not None})
        line = {"step": self.state.step, "epoch": self.order.epochs, **values}
        self.console.log(line, self.plan.max_steps, speed)

    def _track(self, values: Mapping[str, float]) -> None:
        if self.config.train.report_to:
            self.backend.accelerator.log(dict(values), step=self.state.step)

    def log_samples(self, samples: Sequence[Mapping[str, Any]], steps: int = 1) -> None:
        """Write samples, and show them, if a line of the log is due within the next steps."""
        from llmtk.reporting.samples import show_samples

        every, step = self.config.train.logging_steps, self.state.step
        if samples and self.backend.is_main and (step + steps) // every > step // every:
            for sample in samples:
                self.records.write("samples", {"step": step, **sample})
            with self.randomness.aside("samples"):  # rich draws a number from Python's generator when it is imported
                show_samples(self.console, samples, step)

    def write_samples(self) -> None:
        """Answer a few evaluation prompts, if the configuration asks for it. All ranks must call it together."""
        from llmtk.reporting.samples import write_samples

        if self.config.samples.count and self.eval_rows is not None:
            with self.randomness.aside("samples"):
                write_samples(self)

    # Setting up: llmtk.training.setup

    def _open_or_set_up(self, with_data: bool = False) -> None:
        if self.exported is None:
            self._set_up()
        else:
            setup.open_finished(self, self.exported, with_data=with_data)

    def _set_up(self, only_to_plan: bool = False) -> None:
        """Load everything, and compute what is wanted of it before training."""
        if not self._is_set_up:
            setup.load(self)
        if self.config.train.precompute_reference and self.forward.precomputed is None and not only_to_plan:
            self.forward.precomputed = precompute(self)
        self._is_set_up = True

    # Training

    def _say_what_stands(self, error: BaseException) -> None:
        """Say how to go on after a failure in training, not of a run that was refused. A signal's error says it."""
        if not self.log.is_open or isinstance(error, Interrupted):
            return
        if found := checkpoints.list_checkpoints(self.checkpoints):
            self.notify(
                f"The checkpoint of step {found[-1][0]} stands. Go on from it, once the cause is mended: "
                f"llmtk run {self.stage_name} output_dir={self.output_dir} --resume auto"
            )

    def _train(self) -> Result:
        config = self.config.train
        self.folder.begin(self)
        if self.backend.is_main:
            self.log.open(self.folder.path)
        checkpoint = self.folder.checkpoint_to_resume(self.backend, self.notify)
        summary.say_plan(self, checkpoint)
        if self.config.train.report_to:
            self.backend.accelerator.init_trackers(config.run_name or self.output_dir.name)
        if not config.do_train:
            return self._evaluate_alone()
        if self.demo and checkpoint is None:
            self.state.before = self._measure()
        if checkpoint is not None:
            snapshot.restore(self, checkpoint)
            self.saved_step = self.resumed_at = self.state.step
        elif self.backend.is_main:
            self.records.clear()
            checkpoints.remove_later(self.checkpoints, 0)  # damaged ones, or it would not start afresh
        self.hooks.run_started(self.plan)
        self.console.begin(self.plan.max_steps, self.state.step)
        with first_signal(self.ask_to_stop):
            loop.train(self)
            if self.saved_step != self.state.step:
                loop.save_checkpoint(self)
        self.console.end(self.state.step)
        return self._finish()

    def _evaluate_alone(self) -> Result:
        """Evaluate the model as it is, and write what came of it."""
        self.hooks.run_started(self.plan)
        metrics = {f"eval_{name}": value for name, value in self.evaluate().items()}
        evaluation = Evaluation(self.state.step, metrics)
        self.record(metrics)
        self.console.evaluation(evaluation)
        self.hooks.evaluation_finished(evaluation)
        result = Result(None, None, None, self.state.step, metrics, str(self.output_dir))
        self._write(result)
        self.console.say(f"Done: {self.plan.eval_rows:,} rows evaluated. The metrics are in {result.output_dir}")
        return result

    def _finish(self) -> Result:
        """Export the model, write results, and say what came of it."""
        best = self.state.best
        path = checkpoints.path_of(self.checkpoints, best.step) if best else None
        if self.config.train.load_best_model_at_end and path is not None and best is not None:
            if best.step != self.state.step:
                snapshot.restore_best(self, path)
            self.notify(f"The exported model is the best one, of step {best.step}")
        metrics = {**self.state.last_evaluation, **self._test()}
        if self.config.train.do_predict:
            metrics |= write_predictions(self)
        if self.demo:
            metrics |= {f"{name}_before": value for name, value in self.state.before.items()}
            metrics |= {f"{name}_after": value for name, value in self._measure().items()}
        result = Result(
            final_loss=self.state.last_loss,
            best_metric=best.value if best else None,
            best_model_path=str(path) if path and path.is_dir() else None,
            steps=self.state.step,
            metrics=metrics,
            output_dir=str(self.output_dir),
        )
        self._write(result)
        summary.say_result(self, result)
        return result

    def _write(self, result: Result) -> None:
        self.whole_weights = self.backend.whole_weights()
        with self.backend.together("exporting the model", LlmtkError):
            if self.backend.is_main:
                self.folder.finish(self, result)

    def _test(self) -> dict[str, float]:
        """Evaluate the model that is exported on the test rows, unless a signal has stopped the run."""
        values = None if self.test_rows is None else evaluate(self, self.test_rows)
        return {f"test_{name}": value for name, value in (values or {}).items()}

    def _measure(self) -> dict[str, float]:
        assert self.demo is not None
        with self.randomness.aside("demo"), eval_mode(self.model), torch.no_grad():
            figures = {"figure": self.demo.measure(self)} | {name: fn(self) for name, fn in self.demo.also.items()}
        for name, value in figures.items():
            if not isinstance(value, (int, float)):
                raise PluginError(
                    f"The stage {self.stage_name!r}: the demo's {name} is measured as {value!r:.60}, not as a number."
                )
        return figures

    # Small things

    def _encode(self, data: Any) -> Dataset:
        from llmtk.data import read_rows

        return self.stage.encode_rows(self, read_rows(data, self.stage.row_types, self.config.data))

    def ask_to_stop(self, number: int, first: str = "finishing the step, then a checkpoint") -> None:
        """Stop after what is under way, which `first` tells: by default a step, with a checkpoint."""
        self._signal = number
        self.console.say(
            f"{signal.Signals(number).name}: {first}. Once more to stop at once (the last checkpoint stands)"
        )


def evaluate_run(path: str, data: str | None = None) -> dict[str, float]:
    """Evaluate a finished run's model on its evaluation rows, or on other data: what the CLI does."""
    from llmtk.training.language import evaluate_all

    return evaluate_all(Run.open(path), data)


def _stage_class(stage: str | Stage | type[Stage]) -> tuple[str, type[Stage]]:
    """Return the stage's name and class. A class or an instance is named by its `name`, or after its class."""
    if isinstance(stage, str):
        return stage, discovery.get_stage(stage)
    stage_class = stage if isinstance(stage, type) else type(stage)
    return getattr(stage_class, "name", stage_class.__name__.lower()), stage_class


def _refuse_plain(plugins: object) -> None:
    """Refuse plugins that are named in a list: as instances they would be texts without hooks."""
    listed = plugins if isinstance(plugins, Sequence) and not isinstance(plugins, str) else [plugins]
    if any(isinstance(item, str | int | float) for item in listed):
        raise ConfigurationError(
            f"plugins: expected keys and values, got {shown(plugins)}. A name is a key, and its options are the value: "
            "plugins: {NAME: {}}"
        )


def _plugin_name(plugin: object) -> str:
    return str(getattr(plugin, "name", type(plugin).__name__.lower()))


def _names_input(layer: Mapping[str, Any]) -> bool:
    """Say whether a configuration names a model or data; without both, a run is a demo."""
    model, data = layer.get("model") or {}, layer.get("data") or {}
    if not (isinstance(model, Mapping) and isinstance(data, Mapping)):
        return True  # they are refused with all else that is wrong in the configuration
    return bool(model.get("name_or_path") or model.get("from_config") or data.get("train"))


def _demo_of(stage_class: type[Stage], name: str) -> Demo:
    demo = stage_class().demo()
    if not isinstance(demo, Demo):
        raise PluginError(
            f"The stage {name!r}: demo returned {type(demo).__name__}, not a Demo; did you forget `return`?"
        )
    return demo


def demo_model(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `model` section under a demo's own: the built-in model, where the demo names none."""
    own = without_shorthands(config).get("model") or {}
    return {} if own.get("name_or_path") or own.get("from_config") else {"name_or_path": "builtin"}


def _demo_layer(demo: Demo) -> dict[str, Any]:
    beneath = {"model": demo_model(demo.config), "data": {"train": demo.train, "eval": demo.eval}}
    return merge(beneath, demo.config)
