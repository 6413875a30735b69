"""`llmtk tune`: runs that differ in a few settings. Optuna chooses these, and each trial is an ordinary run's folder.

A trial is a process of its own, `llmtk run`, of which nothing is known but its folder: so memory is freed between
trials, one that fails ends alone, and one that was killed goes on by `--resume`. What Optuna knows of the trials is
kept in a journal beside them, in JSON.
"""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from llmtk_tune_space import Choice, Space, read_space

from llmtk.errors import ConfigurationError, LlmtkError
from llmtk.folder import LOCK
from llmtk.pipeline.record import held

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

    from llmtk.run import Run

_EXAMPLES = """\b
Examples:
  llmtk tune sft config.yaml --over train.learning_rate=1e-5..1e-3:log --trials 20
  llmtk tune dpo config.yaml --over dpo.beta=0.05,0.1,0.3 --over peft.r=8,32       all six
  llmtk tune sft config.yaml --over ... --trials 40                                go on with that sweep
"""
_USUAL_TRIALS = 20
RUN = [sys.executable, "-P", "-m", "llmtk.pipeline.step"]
"""A trial's command, `llmtk run` that ends with a checkpoint where the sweep is killed. With -P, since a file of the
working directory may be named like a module."""


class TuneError(LlmtkError):
    """No trial came to an end, or the sweep was stopped."""


@dataclass(frozen=True)
class Sweep:
    """What is swept, and where it is kept."""

    folder: Path
    words: tuple[str, ...]
    """Those of `llmtk run` that all trials share."""
    space: Space
    metric: str
    maximize: bool
    best_counts: bool
    """Whether a trial is judged by its best evaluation, which is the model that it keeps, or by its last."""
    sampler: str
    seed: int
    prune: bool

    def facts(self) -> dict[str, Any]:
        """Return what must be the same when a sweep goes on, as JSON."""
        over = {key: json.loads(json.dumps(vars(values))) for key, values in self.space.items()}
        return {"run": list(self.words), "over": over, "metric": self.metric, "maximize": self.maximize}

    def settings(self, trial: Trial | FrozenTrial) -> dict[str, Any]:
        """Return the settings of a trial."""
        return {key: values.value(trial.params[key]) for key, values in self.space.items()}

    def run_folder(self, number: int) -> Path:
        """Return the folder of a trial's run."""
        return self.folder / f"trial-{number + 1:03}"


@click.command("tune", epilog=_EXAMPLES)
@click.argument("words", nargs=-1, required=True, metavar="[STAGE] [CONFIG.yaml] [KEY=VALUE]...")
@click.option(
    "--over",
    multiple=True,
    required=True,
    metavar="KEY=VALUES",
    help="A setting to vary: `a,b,c`, `low..high` or `low..high:log`. May be repeated.",
)
@click.option(
    "--trials",
    type=click.IntRange(1),
    help=f"Runs in all. By default every combination of listed values, or {_USUAL_TRIALS} where there is a range.",
)
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random", "grid"]),
    help="How settings are chosen: by what did well so far, at random, or all combinations in turn.",
)
@click.option("--metric", help="What to judge by. By default train.metric_for_best_model: eval_loss.")
@click.option("--direction", type=click.Choice(["minimize", "maximize"]), help="By default as the metric's name says.")
@click.option("--prune", is_flag=True, help="Stop a trial whose evaluations are worse than the median trial's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Decides what is drawn.")
@click.option("--output-dir", metavar="FOLDER", help="Where trials go. By default runs/tune-STAGE.")
def command(
    words: tuple[str, ...],
    over: tuple[str, ...],
    trials: int | None,
    sampler: str | None,
    metric: str | None,
    direction: str | None,
    prune: bool,
    seed: int,
    output_dir: str | None,
) -> None:
    """Train with several settings, and say which did best. The words are those of `llmtk run`.

    Given again, the same command goes on with the sweep: trials that were stopped are resumed, and with more --trials
    there are more.
    """
    space = read_space(over)
    listed = all(isinstance(values, Choice) for values in space.values())
    sampler = sampler or ("grid" if listed and trials is None else "tpe")
    if sampler == "grid" and not listed:
        raise ConfigurationError("--sampler grid takes listed values alone: give --over KEY=a,b,c, or another sampler")
    run = _checked(words, space)
    name = (metric or run.config.train.metric_for_best_model).removeprefix("eval_")
    sweep = Sweep(
        folder=Path(output_dir or f"runs/tune-{run.stage_name}"),
        words=words,
        space=space,
        metric=f"eval_{name}",
        maximize=direction == "maximize" if direction else _is_better_high(run, name),
        best_counts=run.config.train.load_best_model_at_end,
        sampler=sampler,
        seed=seed,
        prune=prune,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a sweep as Ctrl-C does
    with held(sweep.folder, click.echo):
        _check_same(sweep)
        study = _study(sweep)
        _train_trials(sweep, study, trials or _count(space, listed))
        _tell(sweep, study)


def _checked(words: Sequence[str], space: Space) -> Run:
    """Return the run that all trials vary. ConfigurationError for what any of the listed values would meet."""
    from llmtk.cli.run import asked_for
    from llmtk.config.reading import parse_overrides
    from llmtk.run import Run

    stage, layers = asked_for(words)
    if any("output_dir" in layer for layer in layers):
        raise ConfigurationError("output_dir: each trial has a folder of its own; give --output-dir for all of them")
    for key, values in space.items():
        for value in values.ends:
            try:
                Run.from_layers(stage, *layers, parse_overrides([f"{key}={json.dumps(value)}"]))
            except ConfigurationError as error:
                raise ConfigurationError(f"--over {key}, value {json.dumps(value)}: {error}") from error
    run = Run.from_layers(stage, *layers)
    if run.config.data.eval is None or not run.config.train.do_eval:
        raise ConfigurationError(
            "there is nothing to judge trials by: give data.eval, a share (0.1) or a file, and leave train.do_eval on"
        )
    return run


def _is_better_high(run: Run, name: str) -> bool:
    stated = run.config.train.greater_is_better
    return not name.endswith(("loss", "perplexity")) if stated is None else stated


def _count(space: Space, listed: bool) -> int:
    count = 1
    for values in space.values():
        count *= len(values.ends)
    return count if listed else _USUAL_TRIALS


def _check_same(sweep: Sweep) -> None:
    """Refuse a folder that holds something else. ConfigurationError lists what differs."""
    file, facts = sweep.folder / "sweep.json", sweep.facts()
    if not file.exists():
        if strangers := sorted(path.name for path in sweep.folder.iterdir() if path.name != LOCK):
            raise ConfigurationError(f"--output-dir {sweep.folder} holds other files ({strangers[0]}). Choose another")
        file.write_text(json.dumps(facts, indent=2) + "\n")
        return
    stored = json.loads(file.read_text())
    if changed := [f"  {key}: {stored.get(key)} -> {facts[key]}" for key in facts if stored.get(key) != facts[key]]:
        listed = "\n".join(changed)
        raise ConfigurationError(
            f"the sweep in {sweep.folder} cannot go on with other settings; give another --output-dir:\n{listed}"
        )


def _study(sweep: Sweep) -> Study:
    """Open the sweep's study, or begin it."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(sweep.folder / "journal.jsonl")))
    study = optuna.create_study(
        study_name="sweep",
        storage=storage,
        direction="maximize" if sweep.maximize else "minimize",
        pruner=optuna.pruners.MedianPruner() if sweep.prune else optuna.pruners.NopPruner(),
        load_if_exists=True,
    )
    # A sampler's generator is not kept: one that goes on must not draw again what it drew at first.
    seed = sweep.seed + len(study.trials)
    samplers = optuna.samplers
    study.sampler = samplers.RandomSampler(seed) if sweep.sampler == "random" else samplers.TPESampler(seed=seed)
    if sweep.sampler == "grid":
        drawn = {key: values.distribution().choices for key, values in sweep.space.items()}  # type: ignore[attr-defined]
        for combination in product(*drawn.values()):
            study.enqueue_trial(dict(zip(drawn, combination, strict=True)), skip_if_exists=True)
    return study


def _train_trials(sweep: Sweep, study: Study, count: int) -> None:
    """Finish the trials that were stopped, and begin others until there are as many as asked for."""
    from optuna.trial import TrialState

    for stopped in study.get_trials(states=[TrialState.RUNNING]):
        if stopped.params.keys() == sweep.space.keys():
            _train(sweep, study, stopped, count)
        else:  # killed while its settings were drawn
            study.tell(stopped.number, state=TrialState.FAIL)
    distributions = {key: values.distribution() for key, values in sweep.space.items()}
    while _begun(study) < count:
        _train(sweep, study, study.ask(distributions), count)


def _begun(study: Study) -> int:
    from optuna.trial import TrialState

    return sum(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))


def _train(sweep: Sweep, study: Study, trial: Trial | FrozenTrial, count: int) -> None:
    """Run a trial to its end, and tell the study what came of it."""
    from optuna.trial import TrialState

    began, settings = time.monotonic(), sweep.settings(trial)
    folder, log = sweep.run_folder(trial.number), sweep.run_folder(trial.number).with_suffix(".log")
    click.echo(f"trial {trial.number + 1}/{count}  {_spelt(settings)}", nl=False)
    sys.stdout.flush()
    # A run that has no configuration yet has nothing to resume.
    resume = ["--resume", "auto"] if (folder / "config.yaml").exists() else []
    words = [*sweep.words, *(f"{key}={json.dumps(value)}" for key, value in settings.items()), f"output_dir={folder}"]
    with log.open("a") as said:
        # In a session of its own: a Ctrl-C in the terminal reaches it once, from here. It stops when the lock is free,
        # and so when the sweep was killed.
        command = [*RUN, str(sweep.folder / LOCK), *words, *resume]
        child = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            pruned = _watch(sweep, trial, child, folder)
        except KeyboardInterrupt:
            _stop(child)
            click.echo("  stopped")
            raise TuneError(f"the sweep was stopped in trial {trial.number + 1}. The same command goes on") from None
    value = None if pruned or child.returncode else _value(sweep, folder)
    what = "pruned" if pruned else "failed" if value is None else f"{sweep.metric} {value:.6g}"
    click.echo(f"  {what}  ({time.monotonic() - began:.0f} s)")
    if pruned:
        study.tell(trial.number, state=TrialState.PRUNED)
    elif value is None:
        _say_why(child.returncode, log, alone=bool(resume) or trial.number == 0)
        study.tell(trial.number, state=TrialState.FAIL)
    else:
        study.tell(trial.number, value)


def _watch(sweep: Sweep, trial: Trial | FrozenTrial, child: subprocess.Popen[bytes], folder: Path) -> bool:
    """Wait for a trial's process; say whether it was stopped since it did worse than others."""
    from optuna import Trial

    told = 0
    while child.poll() is None:
        time.sleep(0.1)
        if not sweep.prune or not isinstance(trial, Trial):
            continue
        points = _curve(sweep, folder)
        for step, value in points[told:]:
            trial.report(value, step)
        if len(points) > told and trial.should_prune() and child.poll() is None:
            _stop(child)
            return True
        told = len(points)
    return False


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Let a run write its checkpoint, and end."""
    child.send_signal(signal.SIGTERM)
    child.wait()


def _curve(sweep: Sweep, folder: Path) -> list[tuple[int, float]]:
    from llmtk.reporting.stored import StoredRun

    return StoredRun.read(folder).curve(sweep.metric) if (folder / "config.yaml").exists() else []


def _value(sweep: Sweep, folder: Path) -> float | None:
    """Return what a finished trial is judged by. ConfigurationError where it has not measured that."""
    from llmtk.reporting.stored import StoredRun

    values = [value for _, value in _curve(sweep, folder)]
    if values:
        return (max if sweep.maximize else min)(values) if sweep.best_counts else values[-1]
    names = [name for name in StoredRun.read(folder).metric_names if name.startswith("eval_")]
    raise ConfigurationError(f"--metric {sweep.metric}: the run measures {', '.join(names) or 'nothing'}")


def _say_why(status: int, log: Path, alone: bool) -> None:
    """Say why a trial failed. ConfigurationError where its settings are not to blame: it is the first, or goes on."""
    told = log.read_text(errors="replace").strip().splitlines()
    because = next((line for line in reversed(told) if line.startswith("error:")), told[-1] if told else "no word")
    if alone and status == 2:
        raise ConfigurationError(f"the trial cannot begin. {because.removeprefix('error: ')}")
    click.echo(f"    {because}  ({log})", err=True)


def _tell(sweep: Sweep, study: Study) -> None:
    """Print the table, write results and plot, and say which settings did best."""
    from llmtk_tune_results import plot, table, write
    from optuna.trial import TrialState

    trials = study.get_trials()
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not finished:
        raise TuneError(f"no trial came to an end. What each said stands in {sweep.folder}/trial-001.log and so on")
    click.echo("\n" + "\n".join(table(sweep, study)))
    write(sweep, study)
    plot(sweep, study)
    best = sweep.settings(study.best_trial)
    words = [*sweep.words, *(f"{key}={json.dumps(value)}" for key, value in best.items())]
    click.echo(f"\nBest: {sweep.metric} {study.best_value:.6g} in {sweep.run_folder(study.best_trial.number)}")
    click.echo(f"Plot: {sweep.folder / 'sweep.png'}")
    click.echo(f"With these settings: {shlex.join(['llmtk', 'run', *words])}")


def _spelt(settings: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )
