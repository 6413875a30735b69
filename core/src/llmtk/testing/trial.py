"""A stage on trial: small runs of it on the model that the core carries, in float32 on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from llmtk.config.reading import merge
from llmtk.contract import Demo, Stage
from llmtk.host.checks import check_stage
from llmtk.host.discovery import get_stage
from llmtk.run import Run, demo_model
from llmtk.testing.conformance import Failure, NotApplicable
from llmtk.training.micro_batches import MicroBatch
from llmtk.training.tally import WindowTally, objective

if TYPE_CHECKING:
    from llmtk.batch import Batch, Round
    from llmtk.testing.two_ranks import TwoRanks

ROWS = 8
"""Rows of a global batch."""
TRAIN: dict[str, Any] = {
    "bf16": False,
    "max_steps": 3,
    "per_device_train_batch_size": ROWS,
    "per_device_eval_batch_size": ROWS,
    "gradient_accumulation_steps": 1,
    "optim": "sgd",  # Adam would blow the rounding of small gradients up
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "warmup_ratio": 0.0,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "disable_dropout": True,
    "seed": 7,
}

DIALOGUE = [
    {"messages": [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": f"{n + 1}"}]}
    for n in range(24)
]
SAMPLES: dict[str, list[dict[str, Any]]] = {
    "dialogue": DIALOGUE,
    "text": [{"text": f"{n} + 1 = {n + 1}, and that is all"} for n in range(24)],
    "prompt_completion": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(24)],
    "pair": [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n + 3}"} for n in range(24)],
    "labelled": [{"prompt": f"{n} + 1 =", "completion": f" {n + 1 + n % 2}", "label": n % 2 == 0} for n in range(24)],
    "prompt": [{"prompt": f"{n} + 1 =", "answer": f"{n + 1}"} for n in range(24)],
}
"""Rows of each type, for a stage without a demo."""


@dataclass(frozen=True)
class Measured:
    """What a window came to: its loss, the gradient by parameter name, and its metrics."""

    loss: float
    gradient: dict[str, torch.Tensor]
    metrics: dict[str, float]

    @property
    def whole(self) -> torch.Tensor:
        """The gradient as one vector, (trained numbers,)."""
        return torch.cat([part.flatten() for part in self.gradient.values()])


class Trial:
    """Makes small runs of a stage: its demo's settings, two dozen of its rows, and SGD."""

    def __init__(
        self,
        stage: str | type[Stage],
        folder: Path,
        *,
        options: Mapping[str, Any] | None = None,
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.given = stage
        self.folder = folder
        self.asked_options = dict(options or {})
        self.asked_rows = [dict(row) for row in rows] if rows is not None else None
        self.two_ranks: TwoRanks | None = None
        self._made = 0

    @cached_property
    def stage_class(self) -> type[Stage]:
        """The stage's class."""
        return get_stage(self.given) if isinstance(self.given, str) else self.given

    @property
    def is_usable(self) -> bool:
        """Whether there is a class, and one that a run would take."""
        try:
            check_stage(self.stage_class, f"stage {self.name!r}")
        except Exception:  # of a declaration that is not even of the right kind
            return False
        return True

    @cached_property
    def name(self) -> str:
        """The name of its section."""
        if isinstance(self.given, str):
            return self.given
        return str(getattr(self.given, "name", self.given.__name__.lower()))

    @cached_property
    def demo(self) -> Demo | None:
        """The stage's demo, if it has one."""
        try:
            return self.stage_class().demo()
        except NotImplementedError:
            return None

    @property
    def settings(self) -> dict[str, Any]:
        """The sections of a small run."""
        own = {key: value for key, value in (self.demo.config if self.demo else {}).items() if key != "train"}
        rows, held_out = self._data()
        ours = {"model": demo_model(own), "data": {"train": rows, "eval": held_out}, "train": TRAIN}
        return merge(own, ours, {self.name: self.asked_options})

    def _data(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        if self.asked_rows is not None:
            return self.asked_rows, self.asked_rows[: ROWS + 1]
        if self.demo is not None:
            if not (self.demo.train and self.demo.eval):
                raise Failure("its demo has no rows to train on, or none to evaluate on", "Give both in demo().")
            return self.demo.train[: 3 * ROWS], self.demo.eval[: ROWS + 1]
        for row_type in self.stage_class.row_types:
            if row_type in SAMPLES:
                return SAMPLES[row_type], SAMPLES[row_type][: ROWS + 1]
        raise Failure(
            f"it has no demo, and the kit no rows of its type ({', '.join(self.stage_class.row_types)})",
            "Write its demo(), or give rows in a test: check_stage(NAME, rows=[...]).",
        )

    def run(
        self,
        *,
        plugins: Sequence[object] = (),
        resume: str | None = None,
        folder: Path | None = None,
        options: Mapping[str, Any] | None = None,
        **train: Any,
    ) -> Run:
        """Make a run; keywords are keys under `train`."""
        sections = merge(self.settings, {"train": train}, {self.name: dict(options or {})})
        home = folder or self.new_folder()
        return Run(self.given, plugins=plugins, resume=resume, output_dir=str(home), **sections)

    def end(self) -> None:
        """End what is still running beside."""
        if self.two_ranks is not None:
            self.two_ranks.end()

    def new_folder(self) -> Path:
        """Return a folder for a run, which no other has."""
        self._made += 1
        return self.folder / f"run-{self._made}"

    def set_up(self, **given: Any) -> Run:
        """Make a run, and load everything."""
        return self.loaded(self.run(**given))

    def loaded(self, run: Run) -> Run:
        """Load everything of a run, and make its folder, into which samples may be written."""
        run._set_up()
        run.output_dir.mkdir(parents=True, exist_ok=True)
        return run

    def round_of(self, run: Run) -> Round:
        """Prepare a global batch, and leave the run's generators as they were."""
        row_types = self.stage_class.row_types

        class Row(dict[str, Any]):
            def __missing__(self, key: object) -> Any:
                raise Failure(
                    f"it asks a row for {key!r}, which it does not have",
                    f"A row has {', '.join(self)}, since row_types is {row_types}.",
                )

        rows: list[dict[str, Any]] = [Row(run.train_rows[index]) for index in range(min(ROWS, len(run.train_rows)))]
        with run.randomness.aside("check"):
            return run.hooks.prepare_batch(rows)


def measure(run: Run, window: Batch, parts: Sequence[Sequence[int]] | None = None) -> Measured:
    """Run a window forward and backward, in micro-batches of these groups; by default as one."""
    totals = {name: float(weight.sum()) for name, weight in window.weights.items()}
    tally = WindowTally(totals)
    run.model.zero_grad(set_to_none=True)
    loss = 0.0
    for groups in parts or [range(len(window))]:
        batch = window.select(groups).to(run.device)
        output = run.hooks.compute_loss(batch)
        share = objective(output.terms, totals, 1)
        if not share.requires_grad:
            raise Failure("the loss has no gradient: no term depends on the model")
        run.backend.backward(share)
        loss += float(share.detach())
        tally.add(MicroBatch(batch, list(groups)), output)
    gradient = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in run.model.named_parameters()
        if parameter.requires_grad
    }
    run.model.zero_grad(set_to_none=True)
    return Measured(loss, gradient, tally.finish(run.backend)[0].values())


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return how far two vectors are apart, relative to the second's norm."""
    size = float(wanted.double().norm())
    apart = float((found.double() - wanted.double()).norm())
    return apart / size if size else apart


def where(stage: type[Stage]) -> tuple[str, str, str]:
    """Return the file, the module and the name of a stage's class, by which another process finds it."""
    if "<locals>" in stage.__qualname__:
        raise NotApplicable("a class that stands in a function cannot be found by another process")
    try:
        file = inspect.getsourcefile(stage)
    except TypeError:  # typed in, not written
        file = None
    if file is None or not Path(file).is_file():
        raise NotApplicable("a class that stands in no file cannot be found by another process")
    return file, stage.__module__, stage.__qualname__


def find(file: str, module: str, name: str) -> type[Stage]:
    """Return the class that `where` told of: from its module, or from its file where that cannot be imported."""
    found: type[Stage] = attrgetter(name)(_by_name(file, module) or _by_file(file))
    return found


def _by_name(file: str, module: str) -> ModuleType | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return importlib.import_module(module) if spec is not None and spec.origin == file else None


def _by_file(file: str) -> ModuleType:
    module_name = f"_llmtk_checked_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
