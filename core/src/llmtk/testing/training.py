"""Checks of how a stage trains: on two ranks, resumed, evaluated on the way, and as its demo."""

from __future__ import annotations

import json
import pickle
import pickletools
import zipfile
from collections.abc import Iterable
from io import BytesIO, StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtk.errors import CheckpointError
from llmtk.models import load
from llmtk.testing.checks import NEAR, is_near
from llmtk.testing.conformance import Failure, NotApplicable, check
from llmtk.testing.trial import ROWS, Trial, distance, where
from llmtk.testing.two_ranks import TwoRanks
from llmtk.training import checkpoints

if TYPE_CHECKING:
    from llmtk.run import Run

STEPS = 3
SAVED: dict[str, Any] = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS}
EVALUATED: dict[str, Any] = SAVED | {"eval_strategy": "steps", "eval_steps": STEPS}
"""With an evaluation, in whose last window one of two ranks has no row."""
TWO = "two-ranks"
"""The folder of the run on two ranks."""
PROTOCOLS = tuple(bytes([0x80, version]) for version in range(2, pickle.HIGHEST_PROTOCOL + 1))
"""How a pickle of protocol 2 or later begins. Older ones have no mark, and are known by being nothing else."""
NUMPY = b"\x93NUMPY"


def weights(run: Run) -> dict[str, torch.Tensor]:
    """Return copies of what is trained, by name."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return tensors as one vector, by name."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@check(
    "evaluation",
    "an evaluation changes nothing, and gives the same again",
    "Draw from run.generator(purpose), never from a global generator; keep no count or cache on `self` that "
    "evaluate_batch or prepare_batch moves; leave the model in the mode in which it was.",
)
def evaluation(trial: Trial) -> None:
    alone = trial.run(max_steps=STEPS)
    alone.train()
    between = trial.run(max_steps=STEPS, eval_strategy="steps", eval_steps=1)
    between.train()
    apart = distance(flat(weights(between)), flat(weights(alone)))
    if apart:
        raise Failure(
            f"evaluations between the steps change what is learnt: after {STEPS} steps, the weights with them and "
            f"without differ by {apart:.1g} of their norm"
        )
    first, second = between.evaluate(), between.evaluate()
    different = [name for name, value in first.items() if second.get(name) != value]
    if different:
        name = different[0]
        raise Failure(
            f"evaluated twice in a row, {name} is {first[name]:.6g} the first time, and {second.get(name)} the second"
        )


@check(
    "resume",
    "a run that is resumed ends bit by bit as one that never stopped",
    "Whatever the next step depends on belongs into the batch, into a generator of run.generator(purpose), or into "
    "extra_checkpoint_state and restore_checkpoint_state, as tensors and JSON by name.",
)
def resume(trial: Trial) -> None:
    steps = max(STEPS, trial.run().stage.windows_per_round + 1)
    saved: dict[str, Any] = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}
    whole = trial.run(folder=trial.folder / "resumed", **saved)
    whole.train()
    steps = whole.state.step  # fewer, if the stage stops its runs
    if steps < 2:
        raise NotApplicable("it stops after the first step")
    wanted, lines = weights(whole), (whole.output_dir / "metrics.jsonl").read_text()
    for step in sorted({steps - 1, 1}, reverse=True):
        from_step = checkpoints.path_of(whole.checkpoints, step)
        again = trial.run(folder=whole.output_dir, resume=str(from_step), **saved)
        again.train()
        apart = distance(flat(weights(again)), flat(wanted))
        if apart:
            raise Failure(
                f"resumed after step {step} of {steps}, the run ends with weights that differ from those of the run "
                f"that never stopped by {apart:.1g} of their norm"
            )
        if (again.output_dir / "metrics.jsonl").read_text() != lines:
            raise Failure(f"resumed after step {step} of {steps}, the weights are the same and the metrics are not")


@check(
    "files",
    "no file of a run is a pickle, and the model loads",
    "Write tensors with safetensors.torch.save_file and the rest as JSON, in export_model and wherever else: whoever "
    "loads a pickle runs what stands in it.",
)
def files(trial: Trial) -> None:
    run = trial.run(max_steps=1, save_strategy="steps", save_steps=1)
    run.train()
    for file in sorted(run.output_dir.rglob("*")):
        if file.is_file() and _is_pickle(file):
            raise Failure(f"the run's file {file.relative_to(run.output_dir)} is a pickle")
    if not any(run.output_dir.glob("*.safetensors")):
        raise Failure(
            "export_model writes no safetensors file", "Let it call super().export_model(run, path), and add to that."
        )
    load(run.output_dir)
    for _, path in checkpoints.list_checkpoints(run.checkpoints):
        if problem := checkpoints.verify(path):
            raise CheckpointError(f"{path.name}: {problem}")


def _is_pickle(file: Path) -> bool:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as parts:
            return any(name.endswith(".pkl") or _has_pickle(parts.read(name)) for name in parts.namelist())
    return _has_pickle(file.read_bytes())


def _has_pickle(content: bytes) -> bool:
    if content.startswith(NUMPY):
        return _holds_objects(content)
    marked = content[:2] in PROTOCOLS
    if marked and content[8:9] != b"{":  # as a safetensors file may begin, by the length of its header
        return True
    stream = BytesIO(content)
    try:
        pickletools.dis(stream, StringIO())
    except ValueError:
        return False
    return marked or not stream.read()


def _holds_objects(content: bytes) -> bool:
    try:
        np.load(BytesIO(content), allow_pickle=False)
    except ValueError:
        return True
    return False


def two_ranks(trial: Trial) -> TwoRanks:
    """Return the two ranks, which train beside whatever else is checked, from the first call on."""
    if not torch.distributed.is_gloo_available():
        raise NotApplicable("torch has no gloo here")
    given = trial.given if isinstance(trial.given, str) else where(trial.given)
    if trial.two_ranks is None:
        asked = {"stage": given, "options": trial.asked_options, "rows": trial.asked_rows}
        train = EVALUATED | {"per_device_train_batch_size": ROWS // 2}
        spec = trial.folder / "two-ranks.json"
        try:
            spec.write_text(json.dumps(asked | {"folder": str(trial.folder / TWO), "train": train}))
        except TypeError as error:
            raise Failure(
                f"two processes read rows and options from a file, and these cannot be written: {error}",
                "Give rows and options of texts, numbers, lists and mappings.",
            ) from error
        trial.two_ranks = TwoRanks(spec)
    return trial.two_ranks


@check(
    "ranks",
    "two ranks learn what one does",
    "Score through run.score, never by calling run.model; give as many windows on every rank, also without rows; let "
    "terms name weights, whose totals are of all ranks; add up what a whole window needs with run.sum_over_ranks; give "
    "metrics as the sum and the count of this rank's own rows. Draw by the row, not by the rank: pass seeds to "
    "run.generate, of a number that run.generator draws once a round and of each row's place.",
    begin=two_ranks,
)
def ranks(trial: Trial) -> None:
    others = two_ranks(trial)
    one, two = trial.folder / "one-rank", trial.folder / TWO
    start = weights(trial.set_up(**EVALUATED))
    trial.run(folder=one, **EVALUATED).train()
    others.wait()
    learnt = [flat(_trained(folder, start)) - flat(start) for folder in (one, two)]
    apart = distance(learnt[1], learnt[0])
    if not apart <= NEAR:
        raise Failure(
            f"after {STEPS} steps, what two ranks have learnt differs by {apart:.2g} of its norm from what one has"
        )
    _compare_lines(*[[json.loads(n) for n in (f / "metrics.jsonl").read_text().splitlines()] for f in (one, two)])


def _trained(folder: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Return these weights as the last checkpoint has them."""
    from safetensors.torch import load_file

    _, path = checkpoints.list_checkpoints(folder / "checkpoints")[-1]
    found = load_file(path / "weights.safetensors")
    return {name: found[name] for name in names}


def _compare_lines(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for wanted, found in zip(one, two, strict=True):
        for name in wanted | found:
            value, other = wanted.get(name), found.get(name)
            if value is None or other is None or not is_near(other, value, 10 * NEAR):
                raise Failure(f"in step {wanted['step']}, {name} is {value} on one rank and {other} on two")


DEMO = (
    "Its figure, measured on held-out rows, should get better in a minute on two cores: `llmtk run STAGE` with nothing "
    "given is what people try first."
)


BRIEF = 80
"""Steps of a longer demo that are tried first: enough to tell a loss that teaches, and the kit has a minute."""


@check("demo", "its demo improves", DEMO)
def demo(trial: Trial) -> None:
    if trial.demo is None:
        raise Failure(
            "it has no demo()", "Write one: demo(self) returns a Demo of rows, settings and a figure. " + DEMO
        )
    brief = BRIEF // 4 if "generation" in trial.stage_class.needs else BRIEF  # whose steps take several times as long
    steps = trial.demo.config.get("train", {}).get("max_steps", 0)
    lengths: list[dict[str, int]] = [{"max_steps": brief}, {}] if steps > brief else [{}]
    for given in lengths:
        before, after = _figures(trial, given)
        if after > before if trial.demo.higher_is_better else after < before:
            return
    wanted = "higher" if trial.demo.higher_is_better else "lower"
    raise Failure(
        f"{trial.demo.figure} went from {before:.4g} to {after:.4g}, and {wanted} is better",
        "Does the loss have the right sign? Then try more steps, another learning rate, or more telling rows. " + DEMO,
    )


def _figures(trial: Trial, train: dict[str, int]) -> tuple[float, float]:
    """Run the demo, and return its figure before and after."""
    from llmtk.run import Run

    own: dict[str, Any] = {trial.name: trial.asked_options} if trial.asked_options else {}
    result = Run(trial.given, output_dir=str(trial.new_folder()), train=train, **own).train()
    return result.metrics["figure_before"], result.metrics["figure_after"]
