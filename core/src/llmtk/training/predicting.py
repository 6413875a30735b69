"""Predictions at the end of a run (train.do_predict): the finished model answers the test rows, or those of a file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llmtk.errors import ConfigurationError, LlmtkError
from llmtk.folder import PREDICTIONS, RESULTS
from llmtk.generation import positions_of
from llmtk.inference.model import TextModel
from llmtk.inference.predictions import (
    NO_METRICS,
    STDOUT,
    Line,
    Output,
    beginning_of,
    measured,
    open_output,
    predict,
    reference_column,
)
from llmtk.inference.prompts import prompts_of, read_prompts
from llmtk.metrics import compute_metrics, resolve
from llmtk.training.loop import Interrupted
from llmtk.training.signals import first_signal

if TYPE_CHECKING:
    from llmtk.data.rows import Prompt
    from llmtk.generation import Completion, Sampling
    from llmtk.run import Run

SECONDS = 30
"""Between two lines about how far it is."""


def check_predictions(run: Run) -> None:
    """Refuse predictions that cannot be made, and settings of none. Raises before anything is loaded."""
    config, wanted = run.config.predict, run.config.train.do_predict
    if not wanted and config != type(config).model_validate({}):
        raise ConfigurationError("predict is for train.do_predict: true; set it, or take the section out")
    if not wanted:
        return
    if run.stage.head != "language":
        raise ConfigurationError(
            f"train.do_predict: a model of stage {run.stage_name} has a head of one value, and writes no text; leave "
            "it out"
        )
    if config.data is None and run.config.data.test is None:
        raise ConfigurationError(
            "train.do_predict needs rows to answer: give data.test, a share (0.1) or a file, or a file as predict.data"
        )
    resolve(config.metrics)


def read_questions(run: Run) -> list[Prompt]:
    """Return the rows that the finished model is to answer. Needs the run's splits and its tokenizer.

    DatasetError names rows that cannot be asked, ConfigurationError a column that none has.
    """
    config, model = run.config.predict, Policy(run)
    if config.data is None:
        rows, are_questions = prompts_of(run.splits.test or []), False
    else:
        rows, are_questions = read_prompts(config.data, run.config.data)
    if are_questions:
        rows = [model.row(str(row.prompt), row.place) for row in rows]
    _reference(run, [beginning_of(row) for row in rows])
    return rows


def check_room(run: Run) -> None:
    """Refuse questions that leave the model no room to answer, by a DatasetError, before it is trained."""
    notices: list[str] = []
    Policy(run).tokens(run.questions, notices)
    for notice in notices:
        run.notify(f"to predict: {notice}")


def write_predictions(run: Run) -> dict[str, float]:
    """Answer the rows, and return what the answers are worth, by `predict_bleu` and the like.

    What a run that was killed meanwhile has written stays, as long as the model is the same. All ranks call it
    together. Interrupted where a signal comes in between.
    """
    sampling = run.sampling(**run.config.predict.sampling)
    stop = partial(run.ask_to_stop, first="writing the answers that are under way")
    with run.randomness.aside("predictions"), first_signal(stop), _opened(run) as output:
        lines = predict(Policy(run), run.questions, sampling, output, _progress(run))
    with run.backend.together("measuring the predictions", LlmtkError):
        worth = _worth(run, lines) if run.backend.is_main else {}
    values = {f"predict_{name}": value for name, value in run.backend.broadcast(worth).items()}
    told = "".join(f"  {name} {value:.4f}" for name, value in values.items())
    run.console.say(f"{len(lines):,} predictions in {run.output_dir / PREDICTIONS}{told}")
    return values


class Policy(TextModel):
    """A run's model as what answers prompts: each rank answers a share of them, and has all answers."""

    def __init__(self, run: Run) -> None:
        self.run, self.tokenizer = run, run.tokenizer

    @property
    def positions(self) -> float:
        """Tokens that a prompt and its answer may have together."""
        return positions_of(self.run.model)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return completions of tokenised prompts, (prompts, n). All ranks call it together, with the same prompts."""
        run, seeds = self.run, seeds or range(len(prompts))
        mine = range(run.rank, len(prompts), run.world_size)
        answers = run.generate([prompts[index] for index in mine], sampling, [seeds[index] for index in mine])
        by_rank = run.gather(answers)
        return [by_rank[index % run.world_size][index // run.world_size] for index in range(len(prompts))]


class _SharedOutput(Output):
    """A file that the main rank writes to. What fails there fails on all ranks."""

    def __init__(self, run: Run, mine: Output) -> None:
        super().__init__(mine.name, mine.stream, run.backend.broadcast(mine.lines))
        self._run = run

    def write(self, lines: Sequence[Line]) -> None:
        """Append lines, on all ranks together."""
        with self._run.backend.together("writing predictions", LlmtkError):
            super().write(lines)


@contextmanager
def _opened(run: Run) -> Iterator[Output]:
    with ExitStack() as stack:
        with run.backend.together("opening the predictions", LlmtkError):
            if run.backend.is_main:
                path = run.output_dir / PREDICTIONS
                if not _goes_on(run):
                    path.unlink(missing_ok=True)
                mine = stack.enter_context(open_output(str(path), resume=True))
            else:
                mine = Output(STDOUT, stack.enter_context(Path(os.devnull).open("w")))
        try:
            yield _SharedOutput(run, mine)
        except ConfigurationError as error:
            mend = str(error).replace("Give another --output", "Remove it, and go on with --resume auto")
            raise ConfigurationError(mend) from error


def _goes_on(run: Run) -> bool:
    """Whether answers that are there are those of this very model: no step was taken since, and nothing finished."""
    return run.state.step == run.resumed_at and not (run.output_dir / RESULTS).exists()


def _progress(run: Run) -> Callable[[int], None]:
    """Return what says now and then how far it is, and ends it where a signal has come."""
    said, rows = time.monotonic(), len(run.questions)

    def done(count: int) -> None:
        nonlocal said
        if run.interrupted():
            raise Interrupted(
                f"{run.signal_name()} stopped the predictions after {count:,} of {rows:,} rows. Go on with: "
                f"llmtk run {run.stage_name} output_dir={run.output_dir} --resume auto"
            )
        if time.monotonic() - said > SECONDS:
            said = time.monotonic()
            run.console.say(f"predictions  {count:,}/{rows:,} rows")

    return done


def _worth(run: Run, lines: Sequence[Line]) -> dict[str, float]:
    """Return the metrics of text of predictions; none where there is no reference, or no metric is installed."""
    wanted, column = run.config.predict.metrics, _reference(run, lines)
    predictions, references = measured(lines, column) if column is not None else ([], [])
    if not predictions:
        return {}
    if not resolve(wanted):
        if wanted is None:
            run.notify(NO_METRICS.format(column))
        return {}
    return compute_metrics(predictions, references, wanted)


def _reference(run: Run, lines: Sequence[Line]) -> str | None:
    """Return the column that answers are measured against. ConfigurationError where one is needed that no row has."""
    config = run.config.predict
    column = reference_column(lines, config.reference, "predict.reference")
    if config.metrics and column is None:
        raise ConfigurationError(
            "predict.metrics: no row has a column `reference` or `answer`; name another as predict.reference"
        )
    return column
