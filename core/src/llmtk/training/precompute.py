"""The reference's log-probs, computed once: `train.precompute_reference`.

They are kept on disk under a hash of what they follow from, and found again by the content of a group, so that a stage
asks `run.score_window(batch, model="reference")` as ever and does not know.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmtk.cache import cache_folder, write_once
from llmtk.contract import REFERENCE
from llmtk.errors import ConfigurationError, LlmtkError
from llmtk.host import manager
from llmtk.scoring import Scores
from llmtk.training.evaluation import eval_mode
from llmtk.training.snapshot import environment

if TYPE_CHECKING:
    from pathlib import Path

    from llmtk.batch import Batch
    from llmtk.contract import Dataset
    from llmtk.run import Run

Known = dict[bytes, np.ndarray[Any, Any]]
"""A group's digest -> the log-probs of its targets, float32 (targets,)."""
DIGEST_BYTES = 16


@dataclass(frozen=True)
class Precomputed:
    """What the reference says of every group of the run's data."""

    known: Mapping[bytes, np.ndarray[Any, Any]]

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
                f"train.precompute_reference: the reference was not asked about {unknown} before training, and is "
                "gone. Rows that are not the run's are evaluated when it has finished, by llmtk evaluate; a stage that "
                "makes other sequences of a row each time needs precompute_reference: false"
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
    main = run.backend.is_main
    file = cache_folder("reference") / f"{run.backend.broadcast(_key(run) if main else None)}.safetensors"
    kept = run.backend.broadcast(_read(file, run.notify) if main else None)
    if kept is None:
        run.notify(f"The reference's log-probs are computed once, and kept in {file}")
        known = {digest: logps for part in run.gather(_packed(_compute(run))) for digest, logps in _unpacked(part)}
        with run.backend.together(f"writing {file}", LlmtkError):
            if main:
                _write(file, _packed(known))
        # Another run may have been first, and its last bits are then those that resuming will read.
        kept = run.backend.broadcast(_read(file, run.notify) if main else None)
    else:
        run.notify(f"The reference's log-probs are read from {file}")
    known = dict(_unpacked(kept))
    run.forward.views.pop(REFERENCE, None)
    run.frozen.pop(REFERENCE, None)
    return Precomputed(known)


def digests_of(batch: Batch) -> Iterator[bytes]:
    """Yield a digest of each group: its tokens, its targets, and how they are parted."""
    tokens, targets = batch.tokens.cpu().numpy(), batch.targets.cpu().numpy()
    lengths, prefixes = batch.segment_lengths.cpu().numpy(), batch.segment_prefix.cpu().numpy()
    segments = np.bincount(batch.segment_group.cpu().numpy(), minlength=len(batch))
    segment_ends, token_ends = np.cumsum(segments), np.concatenate([[0], np.cumsum(lengths)])
    for end, count in zip(segment_ends.tolist(), segments.tolist(), strict=True):
        begin = end - count
        part = slice(int(token_ends[begin]), int(token_ends[end]))
        inside = np.where(prefixes[begin:end] >= 0, prefixes[begin:end] - begin, prefixes[begin:end])
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for values in (tokens[part], targets[part], lengths[begin:end], inside):
            digest.update(np.ascontiguousarray(values).tobytes())
        yield digest.digest()


def _compute(run: Run) -> Known:
    """Ask about this rank's rows, through the stage's own `prepare_batch`, with nothing of the run changed by it."""
    recorder = _Recorder(run)
    with _answering(run, recorder), run.randomness.aside("precompute"), eval_mode(run.model), torch.no_grad():
        for rows in filter(None, (run.train_rows, run.eval_rows, run.test_rows)):
            for start in range(0, len(rows), run.global_rows):
                stop = min(start + run.global_rows, len(rows))
                mine = [rows[index] for index in range(start + run.rank, stop, run.world_size)]
                run.hooks.prepare_batch(mine)
    return dict(recorder.known)


@contextmanager
def _answering(run: Run, precomputed: Precomputed | None) -> Iterator[None]:
    """Let this answer for the reference for a while; None: the reference itself."""
    before, run.forward.precomputed = run.forward.precomputed, precomputed
    try:
        yield
    finally:
        run.forward.precomputed = before


def _key(run: Run) -> str:
    """Hash what the log-probs follow from: the model as it is now, its precision, the encoded rows, and the code."""
    digest = hashlib.blake2b(digest_size=20)
    model = run.frozen.get(REFERENCE, run.model)
    scorer = run.forward.scorers[REFERENCE]
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    facts = [run.backend.precision, scorer.packed, environment()["versions"], manager.plugin_versions(run.manager)]
    for fact in (*facts, _settings(run), _configuration(model)):
        digest.update(json.dumps(fact, sort_keys=True, default=sorted).encode())
    for rows in (run.train_rows, run.eval_rows, run.test_rows):
        for row in _rows(rows):
            digest.update(repr(sorted((key, value) for key, value in row.items() if key != "place")).encode())
    return digest.hexdigest()


def _settings(run: Run) -> dict[str, Any]:
    """Return what decides which sequences the stage makes of a row."""
    return run.config.options.model_dump(mode="json")


def _configuration(model: Any) -> list[Any]:
    """Return what a model computes by beside its weights: rotary base, windows, caps, an adapter's scale."""
    configs = [model.config, *getattr(model, "peft_config", {}).values()]
    settings = [json.loads(json.dumps(config.to_dict(), default=_plain)) for config in configs]
    # Where it was loaded from does not matter.
    return [{k: v for k, v in part.items() if not k.startswith("_") and "name_or_path" not in k} for part in settings]


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def _packed(known: Known) -> dict[str, np.ndarray[Any, Any]]:
    """Return everything as three arrays: digests (groups, DIGEST_BYTES), lengths (groups,), log-probs (targets,)."""
    return {
        "digests": np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, DIGEST_BYTES),
        "lengths": np.array([len(logps) for logps in known.values()], dtype=np.int64),
        "logps": np.concatenate([np.zeros(0, np.float32), *known.values()]),
    }


def _unpacked(kept: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[tuple[bytes, np.ndarray[Any, Any]]]:
    ends = np.cumsum(kept["lengths"])[:-1]
    parts = np.split(kept["logps"], ends) if len(kept["lengths"]) else []
    return ((digest.tobytes(), logps) for digest, logps in zip(kept["digests"], parts, strict=True))


def _rows(rows: Dataset | None) -> Iterator[Mapping[str, Any]]:
    return iter(()) if rows is None else (rows[index] for index in range(len(rows)))


def _read(file: Path, say: Any) -> dict[str, np.ndarray[Any, Any]] | None:
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


def _write(file: Path, kept: dict[str, np.ndarray[Any, Any]]) -> None:
    from safetensors.numpy import save_file

    write_once(
        file, lambda aside: save_file(kept, aside), is_good=lambda: _read(file, lambda message: None) is not None
    )
