"""A run on disk: its folder, who may write to it, and how it is found again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from llmtk.config.reading import merge, read_file
from llmtk.config.secrets import concealed
from llmtk.errors import CheckpointError, ConfigurationError

if TYPE_CHECKING:
    from llmtk.run import Result, Run
    from llmtk.training.backend import Backend

CONFIG, INFO, RESULTS, LOCK = "config.yaml", "run.json", "results.json", ".lock"
PREDICTIONS = "predictions.jsonl"
MAY_CHANGE = (
    "output_dir",
    "data.cache",
    "data.num_proc",
    "deepspeed",
    "fsdp",
    "samples",
    "predict.",
    "train.num_train_epochs",
    "train.max_steps",
    "train.per_device_eval_batch_size",
    "train.micro_batch_tokens",
    "train.dataloader_",
    "train.logging_steps",
    "train.log_level",
    "train.do_eval",
    "train.do_predict",
    "train.eval_",
    "train.save_",
    "train.load_best_model_at_end",
    "train.metric_for_best_model",
    "train.greater_is_better",
    "train.max_nonfinite_steps",
    "train.report_to",
    "train.run_name",
    "train.resume_from_checkpoint",
)
"""Settings that a resumed run may change: how long and how it is watched, not what it computes."""
CHOOSES = ("train.load_best_model_at_end", "train.metric_for_best_model", "train.greater_is_better")
"""Those of them that choose the exported model. What another one has predicted is not gone on with."""
MEASURES = ("predict.metrics", "predict.reference")
"""Those that say what predictions are worth, and not what they are."""


class RunFolder:
    """A run's folder. Nothing is written to it before `begin`."""

    def __init__(self, path: Path, resume: str | None = None) -> None:
        self.path = path
        self._resume = resume
        self._lock: TextIO | None = None

    @classmethod
    def find(cls, stage: str, layer: Mapping[str, Any], resume: str | None) -> tuple[RunFolder, dict[str, Any]]:
        """Return the folder of a run, and its configuration: of a resumed run, the one it has, under the one given.

        ConfigurationError where a run to resume cannot be told.
        """
        resume = resume or _path_in(layer.get("train"), "resume_from_checkpoint")
        output_dir = _path_in(layer, "output_dir")
        if resume is None:
            return cls(Path(output_dir or _new_name(stage))), dict(layer)
        if resume == "auto":
            if output_dir is None:
                raise ConfigurationError("--resume auto needs output_dir: the folder of the run to go on with")
            path = Path(output_dir)
        else:
            path = _folder_of_checkpoint(Path(resume), output_dir)
        folder = cls(path, resume)
        return folder, merge(folder._stored(stage), layer, {"output_dir": str(path)})

    def finished(self) -> dict[str, Any]:
        """Return the configuration of a finished run. ConfigurationError where there is none."""
        if not (self.path / CONFIG).is_file():
            raise ConfigurationError(f"{self.path} holds no run: there is no {CONFIG} in it")
        if not (self.path / RESULTS).is_file():
            raise ConfigurationError(
                f"the run in {self.path} is not finished: there is no {RESULTS}. Go on with --resume"
            )
        stored = read_file(self.path / CONFIG)
        stage, train = stored.get("stage"), stored.get("train")
        if not isinstance(stage, str):
            raise ConfigurationError(f"{self.path / CONFIG} is damaged: it names no stage. Put `stage: NAME` back")
        if isinstance(train, Mapping) and not train.get("do_train", True):
            raise ConfigurationError(f"the run in {self.path} evaluated and trained nothing: there is no model in it")
        return {**self._stored(stage), "stage": stage, "output_dir": None}

    @property
    def is_resumed(self) -> bool:
        """Whether the run is to go on from a checkpoint."""
        return self._resume is not None

    @property
    def checkpoints(self) -> Path:
        """The folder of the run's checkpoints."""
        return self.path / "checkpoints"

    def settle(self, backend: Backend) -> None:
        """Agree on the path over all ranks (its name may hold the time), and check that it may be written to."""
        self.path = Path(backend.broadcast(str(self.path)))
        with backend.together("checking output_dir", ConfigurationError):
            if backend.is_main:
                self._check_free()

    def begin(self, run: Run) -> None:
        """Take the folder, and write the configuration and what the run consists of."""
        with run.backend.together("opening output_dir", ConfigurationError):
            if run.backend.is_main:
                self._take()
                self.check_same_run(run)
                self._drop_other_predictions(run)
                self._write_facts(run)
        with run.backend.together("looking into output_dir", ConfigurationError):
            if not (self.path / CONFIG).is_file():  # every rank writes to the run's checkpoints
                raise ConfigurationError(
                    f"output_dir {self.path} is not on the machine of rank {run.backend.rank}. Give a folder on a file "
                    "system that all machines share, by its whole path"
                )

    def check_same_run(self, run: Run) -> None:
        """Refuse to go on with other settings or other data. ConfigurationError lists what differs."""
        if self._resume is None or not (self.path / INFO).exists():
            return
        stored = flat(read_file(self.path / CONFIG))
        given = flat(settings_of(run))
        keys = sorted(stored.keys() | given.keys())
        changed = [
            f"  {key}: {stored.get(key)!r} -> {given.get(key)!r}"
            for key, following in zip(keys, [*keys[1:], ""], strict=True)
            if stored.get(key) != given.get(key)
            and (key in stored or key in run.config.given)  # not what an older version had no key for
            and not may_change(run, key)
            and not following.startswith(f"{key}.")  # an empty section, and what stands in it now
        ]
        if (was := self.info().get("data")) and was != _data_hashes(run):
            changed.append("  the rows themselves: the data has changed since the checkpoint was written")
        if changed:
            listed = "\n".join(changed)
            raise ConfigurationError(
                f"the run in {self.path} cannot go on with other settings:\n{listed}\n"
                "Take them back to go on, or give another output_dir to begin anew"
            )

    def checkpoint_to_resume(self, backend: Backend, say: Callable[[str], None]) -> Path | None:
        """Return the checkpoint to go on from, or None for a fresh start. CheckpointError for a damaged one."""
        from llmtk.training import checkpoints

        found: str | None = None
        with backend.together("looking for a checkpoint", CheckpointError):
            if backend.is_main and self._resume == "auto":
                newest = checkpoints.newest_sound(self.checkpoints, say)
                found = str(newest) if newest else None
                if newest is None:
                    say(f"{self.checkpoints} holds no sound checkpoint: the run starts from the beginning")
            elif backend.is_main and self._resume is not None:
                found = self._resume
                if problem := checkpoints.verify(Path(found)):
                    raise CheckpointError(f"{found}: {problem}. Resume with --resume auto to take the newest sound one")
        found = backend.broadcast(found)
        return None if found is None else Path(found)

    def finish(self, run: Run, result: Result) -> None:
        """Export the model, and write its card, the plot and the results; after a mere evaluation, the results."""
        from llmtk.reporting.card import card
        from llmtk.reporting.plot import plot_losses

        if run.config.train.do_train:
            run.hooks.export_model(self.path)
            replace_file(self.path / "README.md", card(run, result))
            plot_losses(run.records.read("metrics"), self.path.name, self.path / "loss.png")
        write_json(self.path / RESULTS, {**result.__dict__, "stopped_by": run.state.stopped_by})

    def release(self) -> None:
        """Let others write to the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _stored(self, stage: str) -> dict[str, Any]:
        """Return the configuration that the folder holds; of a demo, without the input that the stage makes anew."""
        if not (self.path / CONFIG).exists():
            return {}
        stored = read_file(self.path / CONFIG)
        if stored.pop("stage", stage) != stage:
            was = read_file(self.path / CONFIG)["stage"]
            raise ConfigurationError(f"{self.path} holds a run of stage {was}, which {stage} cannot go on with")
        if self.info().get("demo"):
            stored.pop("model", None)
            stored.pop("data", None)
        return stored

    def info(self) -> dict[str, Any]:
        """Return run.json, or nothing."""
        try:
            info = json.loads((self.path / INFO).read_text())
        except (OSError, ValueError):
            return {}
        return info if isinstance(info, dict) else {}

    def _check_free(self) -> None:
        for parent in self.path.parents:
            if parent.is_file():
                raise ConfigurationError(f"output_dir {self.path}: {parent} is a file, not a folder. Choose another")
        if self.path.is_file():
            raise ConfigurationError(f"output_dir {self.path} is a file, not a folder. Choose another")
        # A lock alone is what a process leaves that was ended right after it had taken the folder.
        if self._resume is None and self.path.is_dir() and any(file.name != LOCK for file in self.path.iterdir()):
            info = self.info()
            what = f"a run of stage {info['stage']}" if "stage" in info else "files"
            raise ConfigurationError(
                f"output_dir {self.path} holds {what}. Give another output_dir, or go on with that run: --resume auto"
            )

    def _take(self) -> None:
        """Lock the folder. The lock ends with the process, however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / LOCK).open("a+")
        except OSError as error:
            raise ConfigurationError(f"output_dir {self.path} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self.release()
            raise ConfigurationError(f"output_dir {self.path} is in use by process {owner}; choose another") from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def _drop_other_predictions(self, run: Run) -> None:
        """Take predictions away where the run is gone on with, and told to choose its model or to answer otherwise."""
        if not (self.path / PREDICTIONS).exists() or not (self.path / CONFIG).exists():
            return
        stored, given = flat(read_file(self.path / CONFIG)), flat(settings_of(run))
        changed = [key for key in stored.keys() | given.keys() if stored.get(key) != given.get(key)]
        if any(key.startswith((*CHOOSES, "predict.")) and not key.startswith(MEASURES) for key in changed):
            (self.path / PREDICTIONS).unlink()

    def _write_facts(self, run: Run) -> None:
        from llmtk.config.reading import to_yaml
        from llmtk.training.snapshot import environment

        replace_file(self.path / CONFIG, to_yaml(settings_of(run)))
        facts = {
            "stage": run.stage_name,
            "demo": run.demo is not None,
            "plugins": [list(entry) for entry in run.plan.plugins],
            "environment": environment() | {"ranks": run.world_size, "device": run.plan.device},
            "precision": run.plan.precision,
            "data": _data_hashes(run),
            "facts": dict(run.plan.facts),
        }
        write_json(self.path / INFO, facts)


def _path_in(section: Any, key: str) -> str | None:
    """Return a path that a configuration gives. What is none is refused later, with all else that is wrong in it."""
    value = section.get(key) if isinstance(section, Mapping) else None
    return str(value) if isinstance(value, str | Path) else None


def _new_name(stage: str) -> str:
    return f"runs/{stage}-{datetime.now():%Y%m%d-%H%M%S}"


def _folder_of_checkpoint(checkpoint: Path, output_dir: str | None) -> Path:
    if not checkpoint.is_dir():
        raise ConfigurationError(f"--resume {checkpoint}: there is no such checkpoint. Give its folder, or auto")
    folder = checkpoint.absolute().parent.parent
    if output_dir is not None and Path(output_dir).absolute() != folder:
        raise ConfigurationError(
            f"--resume {checkpoint} belongs to the run in {folder}, but output_dir is {output_dir}. Leave it out"
        )
    return folder if output_dir is None else Path(output_dir)


def may_change(run: Run, key: str) -> bool:
    """Say whether a setting may have another value when the run is gone on with."""
    return key.startswith((*MAY_CHANGE, *(f"{run.stage_name}.{name}" for name in run.stage.may_change)))


def settings_of(run: Run) -> dict[str, Any]:
    """Return the resolved configuration as a mapping, rows given in Python replaced by their number.

    What the stage is told but once stands not in it.
    """
    from llmtk.config.run_config import spelt_out
    from llmtk.config.sections import HELD_OUT

    settings = spelt_out(run.config)
    for split in ("train", *HELD_OUT):
        rows = getattr(run.config.data, split)
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            settings["data"][split] = f"({len(rows)} rows given in Python)"
    for name in run.stage.once:
        settings.get(run.stage_name, {}).pop(name, None)
    return settings


def _data_hashes(run: Run) -> dict[str, Any]:
    """Return the number and SHA-256 of the rows of each split, as read; of a stream, the sizes of its files."""
    splits = {"train": run.splits.train, "eval": run.splits.eval or []}
    if run.splits.test is not None:
        splits["test"] = run.splits.test
    hashes: dict[str, Any] = {}
    for name, rows in splits.items():
        digest = hashlib.sha256()
        for row in rows:
            digest.update(repr(row).encode("utf-8", "surrogatepass"))
        hashes[name] = {"rows": len(rows), "sha256": digest.hexdigest()}
    if run.config.data.streaming:
        from llmtk.data.stream import sizes

        hashes["train"] = {"bytes": sizes(run.config.data)}
    return hashes


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings as one mapping, by `train.learning_rate` and the like."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= {f"{key}.{inner}": v for inner, v in flat(value).items()}
        else:
            found[key] = value
    return found


def sha256_of(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write JSON as `replace_file` writes text."""
    replace_file(file, json.dumps(value, indent=1, default=str) + "\n")


def replace_file(file: Path, text: str) -> None:
    """Write a file so that whoever dies meanwhile leaves the old one or the new one, and nothing between.

    Secrets of the environment stay out of it.
    """
    aside = file.with_name(f".{file.name}.new")
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(concealed(text))
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
