"""The reference's log-probs, computed once: `train.precompute_reference`.

They are kept on disk under a hash of what they follow from, and found again by the content of a group, so that a stage
asks `run.score_window(batch, model="reference")` as ever and does not know.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtk.contract import REFERENCE
from llmtk.errors import ConfigurationError, LlmtkError
from llmtk.scoring import Scores
from llmtk.training.evaluation import eval_mode

if TYPE_CHECKING:
    from llmtk.batch import Batch
    from llmtk.contract import Dataset
    from llmtk.run import Run

Known = dict[str, np.ndarray[Any, Any]]
"""A group's digest -> the log-probs of its targets, float32 (targets,)."""


@dataclass(frozen=True)
class Precomputed:
    """What the reference says of every group of the run's data."""

    known: Mapping[str, np.ndarray[Any, Any]]

    def scores(self, batch: Batch, also: Iterable[str] = ()) -> Scores:
        """Return the scores of a batch of known groups. ConfigurationError for another, or for more than log-probs."""
        if wanted := sorted(also):
            raise ConfigurationError(
                f"train.precompute_reference keeps log-probs alone, and the stage asks the reference for {wanted[0]}; "
                "set it to false"
            )
        digests = list(digests_of(batch))
        known = [digest in self.known for digest in digests]
        if not all(known):
            unknown = batch.places[known.index(False)] or "a row"
            raise ConfigurationError(
                f"train.precompute_reference: the reference was not asked about {unknown} before training. The stage "
                "makes other sequences of a row each time; set it to false"
            )
        parts = [self.known[digest] for digest in digests]
        logps = np.concatenate(parts) if parts else np.zeros(0, np.float32)
        return Scores(batch, torch.from_numpy(logps).to(batch.tokens.device))


class _Recorder(Precomputed):
    """Answers from the model, and takes down what it says."""

    def __init__(self, run: Run) -> None:
        known: Known = {}
        super().__init__(known)
        self._run, self._known = run, known

    def scores(self, batch: Batch, also: Iterable[str] = ()) -> Scores:
        with _answering(self._run, None):
            scores = self._run.score_window(batch, model=REFERENCE, also=also)
        counts = torch.bincount(batch.sequence_group[batch.target_sequence], minlength=len(batch)).tolist()
        logps = torch.split(scores.logps.cpu(), counts)
        self._known.update(zip(digests_of(batch), (part.numpy() for part in logps), strict=True))
        return scores


def precompute(run: Run) -> Precomputed:
    """Ask the reference about all rows of the run, or read what it said before. All ranks must call it together."""
    file = cache_folder() / f"{_key(run)}.safetensors"
    known = run.backend.broadcast(_read(file, run.notify) if run.backend.is_main else None)
    if known is None:
        run.notify(f"The reference's log-probs are computed once, and kept in {file}")
        known = {}
        for part in run.gather(_compute(run)):
            known |= part
        with run.backend.together(f"writing {file}", LlmtkError):
            if run.backend.is_main:
                _write(file, known)
    else:
        run.notify(f"The reference's log-probs are read from {file}")
    run.views.pop(REFERENCE, None)
    run.frozen.pop(REFERENCE, None)
    return Precomputed(known)


def digests_of(batch: Batch) -> Iterator[str]:
    """Yield a digest of each group: its tokens, its targets, and how they are parted."""
    tokens, targets = batch.tokens.cpu().numpy(), batch.targets.cpu().numpy()
    lengths, prefixes = batch.segment_lengths.cpu().numpy(), batch.segment_prefix.cpu().numpy()
    segments = np.bincount(batch.segment_group.cpu().numpy(), minlength=len(batch))
    segment_ends, token_ends = np.cumsum(segments), np.concatenate([[0], np.cumsum(lengths)])
    for end, count in zip(segment_ends.tolist(), segments.tolist(), strict=True):
        begin = end - count
        part = slice(int(token_ends[begin]), int(token_ends[end]))
        inside = np.where(prefixes[begin:end] >= 0, prefixes[begin:end] - begin, prefixes[begin:end])
        digest = hashlib.blake2b(digest_size=16)
        for values in (tokens[part], targets[part], lengths[begin:end], inside):
            digest.update(np.ascontiguousarray(values).tobytes())
        yield digest.hexdigest()


def cache_folder() -> Path:
    """Return where log-probs are kept: `$LLMTK_CACHE`, or llmtk's folder in the user's cache."""
    own = os.environ.get("LLMTK_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(base) / "llmtk").expanduser() / "reference"


def _compute(run: Run) -> Known:
    """Ask about this rank's rows, through the stage's own `prepare_batch`, with nothing of the run changed by it."""
    recorder = _Recorder(run)
    with _answering(run, recorder), run.randomness.aside("precompute"), eval_mode(run.model), torch.no_grad():
        for rows in filter(None, (run.train_rows, run.eval_rows)):
            for start in range(0, len(rows), run.global_rows):
                stop = min(start + run.global_rows, len(rows))
                mine = [rows[index] for index in range(start + run.rank, stop, run.world_size)]
                run.hooks.prepare_batch(mine)
    return dict(recorder.known)


@contextmanager
def _answering(run: Run, precomputed: Precomputed | None) -> Iterator[None]:
    """Let this answer for the reference for a while; None: the reference itself."""
    before, run.precomputed = run.precomputed, precomputed
    try:
        yield
    finally:
        run.precomputed = before


def _key(run: Run) -> str:
    """Hash what the log-probs follow from: the model as it is now, its precision, and the encoded rows."""
    digest = hashlib.blake2b(digest_size=20)
    model = run.frozen.get(REFERENCE, run.model)
    scorer = run.scorers[REFERENCE]
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for fact in (run.backend.precision, scorer.packed, torch.__version__, run.stage_name, _settings(run)):
        digest.update(str(fact).encode())
    for rows in (run.train_rows, run.eval_rows):
        for row in _rows(rows):
            digest.update(repr(sorted((key, value) for key, value in row.items() if key != "place")).encode())
    return digest.hexdigest()


def _settings(run: Run) -> dict[str, Any]:
    """Return what decides which sequences the stage makes of a row."""
    return run.config.options.model_dump(mode="json")


def _rows(rows: Dataset | None) -> Iterator[Mapping[str, Any]]:
    return iter(()) if rows is None else (rows[index] for index in range(len(rows)))


def _read(file: Path, say: Any) -> Known | None:
    """Return what stands in a file, or None where there is none; one that cannot be read is told, and made anew."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.is_file():
        return None
    try:
        return dict(load_file(file))
    except (OSError, SafetensorError) as error:
        say(f"{file} cannot be read ({error}); the reference's log-probs are computed anew")
        return None


def _write(file: Path, known: Known) -> None:
    """Write aside, then rename: a file under its name is whole."""
    from safetensors.numpy import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    save_file(known, aside)
    aside.replace(file)
