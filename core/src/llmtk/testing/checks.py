"""Checks of what a stage is: how it is found, what it declares, and what its hooks give for one window."""

from __future__ import annotations

import itertools
import math
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin
from unittest.mock import patch

import numpy as np
import torch
from pydantic import ValidationError

from llmtk.batch import Batch
from llmtk.errors import LlmtkError
from llmtk.host import discovery
from llmtk.host.checks import check_stage as check_class
from llmtk.host.hookspecs import hookimpl
from llmtk.scoring import packed as scoring
from llmtk.testing.conformance import Failure, NotApplicable, check
from llmtk.testing.trial import Measured, Trial, distance, measure

if TYPE_CHECKING:
    from llmtk.batch import LossOutput
    from llmtk.config.sections import Section
    from llmtk.contract import RunView
    from llmtk.run import Run

NEAR = 1e-4
"""How far gradients may be apart, relative to their norm: float32 in another order of sums."""


def is_near(found: float, wanted: float, tolerance: float = NEAR, least: float = 1e-2) -> bool:
    """Say whether two numbers are equal but for rounding; below `least` it is absolute. NaN is near nothing."""
    return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance * least)


@check(
    "listed",
    "it is listed without being imported",
    'Put it into pyproject.toml: [project.entry-points."llmtk.stages"] NAME = "module:Class", with a summary as the '
    "distribution's description and llmtk-core among its dependencies.",
)
def listed(trial: Trial) -> None:
    if not isinstance(trial.given, str):
        raise NotApplicable("it was given as a class; a name is what can be listed")
    offer = discovery.find(discovery.STAGES, trial.given)
    if offer.problem:
        raise Failure(offer.problem)
    if not offer.summary:
        raise Failure(f"the distribution {offer.distribution} has no description, which is what the list shows")
    module = offer.value.partition(":")[0]
    lists = (
        f"from llmtk.host import discovery; discovery.list_stages(); import sys; sys.exit({module!r} in sys.modules)"
    )
    if subprocess.run([sys.executable, "-c", lists], check=False).returncode:
        raise Failure(f"listing the stages imports {module}")


DECLARED = {
    "summary": "one line that lists show",
    "paper": "the arXiv number or the title of where it comes from, or that it is your own",
}
"""What a class must say of itself."""


@check(
    "declared",
    "its class keeps the contract, and says what it does and where it comes from",
    "Subclass llmtk.Stage and name its methods as the hooks are named; set `summary` and `paper`; let `Options` "
    "subclass llmtk.Section, and write below each option what it does.",
)
def declared(trial: Trial) -> None:
    cls = check_class(trial.stage_class, f"stage {trial.name!r}")
    for name, meant in DECLARED.items():
        if not getattr(cls, name):
            raise Failure(f"it has no `{name}`", f'Write into the class: {name} = "...", {meant}.')
    for name, field in cls.Options.model_fields.items():
        if not field.description:
            raise Failure(
                f"the option {name!r} has no description",
                f'Write what it does as a string in the line below `{name}`: """What it does.""" It is the help that '
                f"`llmtk show` gives.",
            )


@check(
    "options",
    "no option is ignored",
    "Use the option, or remove it. One that is of no use beside another option is refused in `check`, with a "
    "ConfigurationError that names both.",
)
def options(trial: Trial) -> None:
    fields = trial.stage_class.Options.model_fields
    read = _read(trial, {})
    for name in fields:
        if name in read or name in (*trial.stage_class.may_change, *trial.stage_class.once):  # for a resumed run alone
            continue
        key = fields[name].alias or name
        heard = False
        for value in itertools.islice(_other_values(trial.stage_class.Options, name), 3):
            try:
                heard = name in _read(trial, {key: value})
            except LlmtkError as refusal:
                heard = re.search(rf"\b{re.escape(key)}\b", str(refusal)) is not None
            if heard:
                break
        if not heard and name not in (read := read | _read(trial, {}, trained=True)):  # by a hook of the loop, perhaps
            raise Failure(f"self.options.{name} is never read, whatever it is set to beside the others as they are")


def _read(trial: Trial, given: dict[str, Any], trained: bool = False) -> set[str]:
    """Return the options that a stage reads from its making to an evaluation, or to the end of a run of a step."""
    run = trial.run(options=given, max_steps=1, save_strategy="steps", save_steps=1)
    recorded, read = _recorded(run.config.options)
    trial.stage_class(recorded)  # what it reads as it is made
    run.stage.options = recorded
    if trained:
        run.train()
        return read
    window = trial.round_of(trial.loaded(run)).windows[0]
    measure(run, window)
    run.evaluate()
    return read


def _recorded(given: Section) -> tuple[Section, set[str]]:
    """Return options that note which of them are read, and the notes."""
    read: set[str] = set()
    fields = set(type(given).model_fields)

    class Recorded(type(given)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            if name in fields:
                read.add(name)
            if name.startswith("model_dump"):  # which does not ask for each by its name
                read.update(fields)
            return super().__getattribute__(name)

        def __iter__(self) -> Any:
            read.update(fields)
            return super().__iter__()

    recorded = given.model_copy()
    object.__setattr__(recorded, "__class__", Recorded)
    read.clear()
    return recorded, read


def _other_values(options: type[Section], name: str) -> Iterator[Any]:
    """Yield valid values of an option other than its default."""
    field = options.model_fields[name]
    default = field.default
    literals = [value for part in _parts(field.annotation) if get_origin(part) is Literal for value in get_args(part)]
    candidates = [*literals, *([not default] if isinstance(default, bool) else []), 0.5, 2, 1, 0.1, 3, True, "a"]
    for value in candidates:
        if value != default and _is_valid(options, name, value):
            yield value
        elif value != default and _is_valid(options, name, [value]):
            yield [value]


def _parts(annotation: Any) -> list[Any]:
    """Return an annotation and what it is made of."""
    if get_origin(annotation) is Literal:
        return [annotation]
    return [annotation, *(part for inner in get_args(annotation) for part in _parts(inner))]


def _is_valid(options: type[Section], name: str, value: Any) -> bool:
    try:
        options.model_validate({options.model_fields[name].alias or name: value})
    except ValidationError:
        return False
    return True


INFINITE = (
    "Look for a log of 0 or of less, a division by 0, or an exp of something large. Log-probs are 0 or negative, and 0 "
    "does occur. torch.where does not keep a branch that is not taken out of the gradient: clamp what goes into it."
)


@check(
    "loss",
    "its loss is finite, and its gradient reaches every trained parameter",
    "Return sums of what depends on run.score(batch); do not detach it, and do not compute it under torch.no_grad(). "
    "Divide by nothing: name the weight, which prepare_batch declares in Group(weights=...).",
)
def loss(trial: Trial) -> None:
    run = trial.set_up()
    windows = trial.round_of(run).windows
    if len(windows) != run.stage.windows_per_round:
        raise Failure(
            f"prepare_batch made {len(windows)} windows; windows_per_round says {run.stage.windows_per_round}",
            "Let the property windows_per_round say how many windows each round has: so many optimizer steps it takes.",
        )
    found = _any_gradient(run, windows)
    if not torch.isfinite(torch.tensor(found.loss)):
        raise Failure(f"the loss of its own rows is {found.loss}", INFINITE)
    if not bool(torch.isfinite(found.whole).all()):
        raise Failure("the loss is finite, its gradient is not", INFINITE)
    without = [name for name, part in found.gradient.items() if not part.any()]
    if len(without) == len(found.gradient):
        raise Failure("the gradient is zero everywhere: whatever the model says, the loss is the same")
    if without:
        raise Failure(f"no gradient reaches {len(without)} of {len(found.gradient)} parameters, such as {without[0]}")


def _any_gradient(run: Run, windows: list[Batch]) -> Measured:
    """Return what the first window comes to that has a gradient: a group of equal rewards has none."""
    found = [measure(run, window) for window in windows]
    return next((one for one in found if one.whole.any()), found[0])


@check(
    "pure",
    "compute_loss is a pure function of the model and the batch",
    "Put all that it needs into columns of the batch (per_group, per_sequence, per_target), never on `self`; draw "
    "random numbers in prepare_batch, from run.generator(purpose); change no tensor of the batch in place.",
)
def pure(trial: Trial) -> None:
    run = trial.set_up()
    generators = _global_generators()
    window = trial.round_of(run).windows[0]
    before = {name: tensor.clone() for name, tensor in window.to_state("")[0].items()}
    first, second = measure(run, window), measure(run, window)
    if not all(module.training for module in run.model.modules()):
        raise Failure(
            "compute_loss or prepare_batch leaves the model in eval mode, so that whatever follows trains without "
            "dropout",
            "Leave the mode to the core: run.score_window scores in eval mode, and evaluations are in it.",
        )
    with torch.no_grad():
        run.hooks.evaluate_batch(window)
    if drawn := [name for name, state in _global_generators().items() if state != generators[name]]:
        raise Failure(
            f"compute_loss, evaluate_batch or prepare_batch draws from the global random generator of {drawn[0]}",
            "Draw in prepare_batch, with generator=run.generator(purpose), and put what was drawn into columns of the "
            "batch. That generator is kept in checkpoints; the global one is not, and belongs to dropout.",
        )
    after = window.to_state("")[0]
    changed = [name for name in before if not torch.allclose(after[name], before[name], rtol=0, atol=0, equal_nan=True)]
    if changed:
        raise Failure(
            f"compute_loss changes the batch in place: {', '.join(changed)}",
            "Make a new tensor: x * 2 instead of x.mul_(2) or x *= 2.",
        )
    if first.loss != second.loss or not torch.equal(first.whole, second.whole):
        raise Failure(f"the same batch gives a loss of {first.loss} and then one of {second.loss}")
    saved = window.to_state("")
    again = Batch.from_state("", {name: tensor.clone() for name, tensor in saved[0].items()}, saved[1])
    other = _measured_elsewhere(trial, again)
    if other.loss != first.loss or not torch.equal(other.whole, first.whole):
        raise Failure(
            f"a batch that went through a checkpoint gives another run of the same weights a loss of {other.loss}, "
            f"instead of {first.loss}"
        )


def _global_generators() -> dict[str, Any]:
    """Return the state of each generator that everybody shares."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [str(part) for part in np.random.get_state(legacy=True)],
        "python": random.getstate(),
    }


def _measured_elsewhere(trial: Trial, window: Batch) -> Measured:
    """Return what a window comes to in another run of the same weights, which has not prepared it."""
    run = trial.set_up()
    try:
        return measure(run, window)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise Failure(
            f"compute_loss needs what prepare_batch has left somewhere else than in the batch, so that a resumed run, "
            f"which begins with the saved batch, lacks it: {type(error).__name__}: {error}"
        ) from error


@check(
    "cut",
    "a window is the same however it is cut into micro-batches and shuffled",
    "A term is a SUM over the micro-batch, never a mean, and `per` names the weight that divides it. What needs the "
    "whole window (a mean, a sort, a baseline) is made in prepare_batch.",
)
def cut(trial: Trial) -> None:
    (_, whole), *others = _cuts(trial)
    for how, found in others:
        _compare(found, whole, how, "as one micro-batch")


@check(
    "metrics",
    "its metrics are exact means, however a window is cut",
    "A metric is Mean(sum, count): the sum and the count of what it is a mean of, over the micro-batch. The core adds "
    "both up over micro-batches, ranks and steps, and then divides.",
)
def metrics(trial: Trial) -> None:
    (_, whole), *others = _cuts(trial)
    for how, found in others:
        if found.metrics.keys() != whole.metrics.keys():
            names = sorted(found.metrics.keys() ^ whole.metrics.keys())
            raise Failure(
                f"with the window {how}, {names[0]} is among the metrics; as a whole it is not, or the other way round",
                "Answer with the same metrics for every micro-batch. One that it has nothing of is Mean(0.0, 0).",
            )
        for name, value in whole.metrics.items():
            if name != "loss" and not is_near(found.metrics[name], value):
                raise Failure(f"{name} is {value:.6g} of the window as a whole, and {found.metrics[name]:.6g} {how}")


def _cuts(trial: Trial) -> list[tuple[str, Measured]]:
    run = trial.set_up()
    windows = trial.round_of(run).windows
    window = next((window for window in windows if measure(run, window).whole.any()), windows[0])
    groups = len(window)
    if groups < 2:
        raise NotApplicable("its window has one group, which is never cut")
    parted = [range(start, min(start + 3, groups)) for start in range(0, groups, 3)]
    shuffled = list(reversed(range(groups)))
    shuffled = shuffled[::2] + shuffled[1::2]
    return [
        ("as one", measure(run, window)),
        ("one group at a time", measure(run, window, [[group] for group in range(groups)])),
        ("three groups at a time", measure(run, window, parted)),
        ("shuffled and cut in two", measure(run, window, [shuffled[: groups // 2], shuffled[groups // 2 :]])),
    ]


@check(
    "packed",
    "packed and padded rows give the same",
    "Let run.score(batch) compute every log-prob, and place values by the batch's own columns and indices "
    "(sum_by_sequence, target_sequence), not by positions in a row.",
)
def packed(trial: Trial) -> None:
    run, padded = trial.set_up(), trial.set_up(scoring="padded")
    if not run.forward.scorers[None].packed:
        raise NotApplicable("the model is not scored packed here")
    window = trial.round_of(run).windows[0]
    whole = measure(run, window)
    _compare(whole, measure(padded, window), "with packed rows", "with padded rows")
    _compare(_in_tiles(run, window), whole, "a target at a time", "with the logits of all targets at once", TILES)


TILES = (
    "The function given to run.map_logits sees the logits of some targets at a time: a large vocabulary has many such "
    "tiles. Hand in what belongs to the targets as a column, run.map_logits(batch, fn, [column]), of which it gets the "
    "same rows; it gives one row for each, and mixes none of them."
)


def _in_tiles(run: Run, window: Batch) -> Measured:
    """Return what a window comes to where `map_logits` takes one target at a time: the demo's vocabulary is small."""
    try:
        with patch.object(scoring, "TILE_ELEMENTS", 1):
            return measure(run, window)
    except (RuntimeError, IndexError, ValueError) as error:
        raise Failure(
            f"compute_loss fails where logits come a target at a time, and not where they come all at once: {error}",
            TILES,
        ) from error


def _compare(found: Measured, wanted: Measured, how: str, otherwise: str, mend: str = "") -> None:
    """Fail where losses or gradients of one window are apart."""
    apart = distance(found.whole, wanted.whole)
    if not (is_near(found.loss, wanted.loss, least=1e-3) and apart <= NEAR):
        raise Failure(
            f"{otherwise} the loss is {wanted.loss:.6g}, {how} it is {found.loss:.6g}; the gradients differ by "
            f"{apart:.2g} of their norm",
            mend,
        )


class Doubled:
    """Doubles every term of a loss."""

    name = "llmtk-check-doubled"

    @hookimpl
    def around_compute_loss(self, run: RunView, batch: Batch, inner: Callable[[Batch], LossOutput]) -> LossOutput:
        from dataclasses import replace

        output = inner(batch)
        terms = {name: replace(term, coefficient=2 * term.coefficient) for name, term in output.terms.items()}
        return replace(output, terms=terms)


@check(
    "around",
    "a plugin around compute_loss is felt, in training and evaluation",
    "Call run.hooks.compute_loss(batch), not self.compute_loss(run, batch), wherever the stage needs its own loss; "
    "return a LossOutput from every hook, also from one that wraps another.",
)
def around(trial: Trial) -> None:
    plain, doubled = trial.set_up(), trial.set_up(plugins=[Doubled()])
    window = trial.round_of(plain).windows[0]
    one, two = measure(plain, window), measure(doubled, window)
    if not distance(two.whole, 2 * one.whole) <= NEAR:
        raise Failure(
            f"a plugin around compute_loss that doubles the loss is not felt in training: it is {one.loss:.6g} without "
            f"the plugin, and {two.loss:.6g} with it"
        )
    once, twice = plain.evaluate()["loss"], doubled.evaluate()["loss"]
    if not is_near(twice, 2 * once, least=1e-3):
        raise Failure(
            f"a plugin around compute_loss that doubles the loss is not felt in evaluation: it is {once:.6g} without "
            f"the plugin, and {twice:.6g} with it"
        )


@check(
    "stop",
    "the stop token behind an answer is a target",
    "Use the row's own targets, of which the stop token is one: a model that never learns to stop never stops.",
)
def stop(trial: Trial) -> None:
    if trial.stage_class.head == "value":
        raise NotApplicable("its model writes no text")
    run = trial.set_up()
    rows = [run.train_rows[index] for index in range(min(8, len(run.train_rows)))]
    stops = set(run.sampling().stop_tokens)
    if "generation" in trial.stage_class.needs:
        _check_written(trial.round_of(run).windows, torch.tensor(sorted(stops)))
        return
    if not any(_targets(row) & stops for row in rows):
        raise NotApplicable("its rows hold no stop token as a target")
    batch = trial.round_of(run).windows[0]
    if not set(batch.target_tokens.tolist()) & stops:
        raise Failure("in the rows a stop token is a target, in the batch that prepare_batch makes of them none is")


def _check_written(windows: list[Batch], stops: torch.Tensor) -> None:
    """Look for a stop token at the end of a sequence, where the policy has written one, that is a target."""
    ends = [(batch, (batch.segment_starts + batch.segment_lengths - 1)[batch.is_sequence]) for batch in windows]
    wanted = [batch.targets[at][torch.isin(batch.tokens[at], stops)] for batch, at in ends]
    if not sum(map(len, wanted)):
        raise NotApplicable("none of the completions in the batch ends with a stop token")
    if not any(bool(targets.any()) for targets in wanted):
        raise Failure("the batch's completions end with stop tokens, none of which is a target")


def _targets(row: dict[str, Any]) -> set[int]:
    """Return the tokens that an encoded row declares as targets."""
    pairs = [("input_ids", "targets"), *((f"{n}_ids", f"{n}_targets") for n in ("chosen", "rejected", "completion"))]
    return {
        int(token)
        for ids, targets in pairs
        if row.get(targets) is not None
        for token, wanted in zip(row[ids], row[targets], strict=True)
        if wanted
    }
