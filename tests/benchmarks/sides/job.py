"""What the sides of a comparison share: the job as a file, and what each side writes down when it has done it.

Imported in every environment, so it needs Python alone. A job's folder has:

    job.json      how to train
    model/        weights and tokenizer
    rows.json     prompt-completion rows, pairs or labelled rows, as llmtk reads them
    ordered.json  the same rows in the order in which llmtk trains on them
    result.json   what the side that ran last wrote down
    output/       where it trains
"""

from __future__ import annotations

import json
import resource
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MAX_LENGTH = 512
ROWS = {"sft": 8, "dpo": 4, "kto": 4}
"""Rows (or pairs) of a step, by stage."""


@dataclass(frozen=True)
class Job:
    """How to train: `steps` optimizer steps of `stage`, in bfloat16 unless `float32`."""

    stage: str
    steps: int
    float32: bool = False
    checkpointing: bool = False
    best: bool = False
    """Whether the side takes the settings that suit it best, rather than its defaults."""

    @property
    def rows(self) -> int:
        """Rows (or pairs) of a step."""
        return ROWS[self.stage]

    @property
    def setting(self) -> str:
        """How it computes, in a few words."""
        named = {"checkpointing": self.checkpointing, "best settings": self.best}
        return ", ".join(["float32" if self.float32 else "bf16", *(name for name, on in named.items() if on)])

    def write(self, folder: Path) -> None:
        """Write it where a side reads it."""
        (folder / "job.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Job:
        """Read what `write` wrote."""
        return cls(**json.loads((folder / "job.json").read_text()))


@dataclass
class Result:
    """What came of a job: of each step its seconds, loss and gradient norm before clipping; memory; what was read."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gib: float = 0.0
    """The process's largest resident memory until the end of the last step."""
    read: list[list[int]] = field(default_factory=list)
    """The tokens of every sequence, sorted."""

    def stepped(self) -> None:
        """Note the memory at the end of a step: what comes behind the last one, saving the model, is not training."""
        self.gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    def write(self, folder: Path) -> None:
        """Write it where the comparison reads it."""
        (folder / "result.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Read what `write` wrote."""
        return cls(**json.loads((folder / "result.json").read_text()))


def sequences(rows: Iterable[dict[str, Any]]) -> list[list[int]]:
    """Return the tokens of every sequence of encoded rows, prompt and answer together, sorted; of all three toolkits.

    A pair has two sequences. What is encoded for kto's mismatched answers is left out.
    """
    found: list[list[int]] = []
    for row in rows:
        if "prompt_ids" in row:  # llmtk and TRL keep prompts and answers apart
            answers: Sequence[str] = [f"{name}_ids" for name in ("completion", "chosen", "rejected")]
            found += [[*row["prompt_ids"], *row[name]] for name in answers if name in row]
        elif "chosen_input_ids" in row:
            found += [[*row["chosen_input_ids"]], [*row["rejected_input_ids"]]]
        else:
            found.append([*row["input_ids"]])
    return sorted(found)
