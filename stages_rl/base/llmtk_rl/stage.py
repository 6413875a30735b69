"""What reinforcement stages share: a round is written, rewarded and scored, and cut into mini-batches and passes.

A stage says how advantages follow from rewards (`with_advantages`) and what the loss is (`compute_loss`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from llmtk import Batch, ConfigurationError, DatasetError, Mean, NothingLeft, Round, RunView, Stage, hookimpl
from llmtk.contract import Dataset, Row
from llmtk.data import Prompt, refuse_rows
from llmtk.data import Row as DataRow
from llmtk.scoring import Scores
from llmtk.training.randomness import derive
from llmtk_rl.offline import brings_rewards, check_offline, is_offline
from llmtk_rl.rewards import RewardOptions, Rewards, changed_files
from llmtk_rl.rollouts import Rollout, Writer, batch_of, rollout_metrics

SAMPLES = 4
"""Completions that are shown at a line of the log."""


class ReinforcementOptions(RewardOptions):
    """What every reinforcement stage can be told."""

    num_generations: int = Field(8, ge=1)
    """Completions of each prompt."""
    max_completion_length: int = Field(256, ge=1)
    """Tokens of a completion, at most. Prompts that leave no room for it within data.max_length are left out."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling; log-probs are taken at it too."""
    top_k: int = Field(0, ge=0)
    """Sample from this many likeliest tokens. 0: from all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample from the likeliest tokens that have this probability together."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Sample from tokens that are at least this times as likely as the likeliest."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Make tokens that were there before less likely by this factor."""
    stop: list[str] = Field(default_factory=list)
    """Texts that end a completion."""
    num_iterations: int = Field(1, ge=1)
    """Passes over a round before the next one is written."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps in each pass: the round's prompts are split into as many parts."""
    mask_truncated_completions: bool = False
    """Take no loss on completions that did not end by themselves. They still count in their group's mean."""
    reward_changed: bool = False
    """Go on from a checkpoint although a reward's file has changed since. Said to one resume, and not kept."""

    @property
    def kl_weight(self) -> float:
        """How strongly the policy is held to the reference, whatever option says so. 0: there is no reference."""
        return 0.0


class BetaOptions(ReinforcementOptions):
    """The same, of a stage whose `beta` is one number for the whole run."""

    beta: float = Field(0.0, ge=0)
    """How strongly the policy is held to the reference, by their KL. 0: not at all, and there is no reference."""

    @property
    def kl_weight(self) -> float:
        return self.beta


class ReinforcementStage(Stage):
    """A stage whose rows are prompts."""

    row_types = ("prompt",)
    needs = frozenset({"reward", "generation"})
    once = ("reward_changed",)
    # The loss says nothing of how good a policy is: its advantages are relative.
    defaults = {"train": {"learning_rate": 1e-6, "metric_for_best_model": "reward"}}
    section: ClassVar[str]
    """The name of its section of the configuration."""
    old_scores: ClassVar[tuple[str, ...]] = ()
    """What a round keeps of the policy that wrote it beside its log-probs, as `run.score(also=...)` names it: `values`
    become the column `old_values`."""

    class Options(ReinforcementOptions):
        """What every reinforcement stage can be told."""

    def __init__(self, options: Any = None) -> None:
        super().__init__(options)
        self._rewards: Rewards | None = None

    @property
    def windows_per_round(self) -> int:
        return int(self.options.num_iterations * self.options.mini_batches)

    @property
    def reference(self) -> Any:
        return "frozen" if self.options.kl_weight else "none"

    @property
    def rewards(self) -> Rewards:
        """The rewards, loaded when they are first asked for; none where every row brings its own."""
        if self._rewards is None:
            o = self.options
            self._rewards = Rewards(o.rewards, section=self.section, on_error=o.on_reward_error, may_be_none=True)
        return self._rewards

    # Hooks

    def check(self, run: RunView) -> None:
        room = run.max_length - self.options.max_completion_length
        if room < 1:
            raise ConfigurationError(
                f"{self.section}.max_completion_length: {self.options.max_completion_length} leaves no room for a "
                f"prompt within data.max_length, {run.max_length}. Lower the one or raise the other"
            )
        _ = self.rewards  # what cannot be loaded is refused before a model is

    def _problem(self, run: RunView, row: DataRow) -> str | None:
        """Return what is wrong with a row, if anything is, and where it stands."""
        assert isinstance(row, Prompt)
        try:
            if is_offline(row.columns):
                check_offline(run, row, self.options.max_completion_length)
            if not brings_rewards(row.columns):
                self.rewards.check_columns(row.columns, row.place)
        except DatasetError as error:
            return str(error)
        return None

    def encode_rows(self, run: RunView, rows: Sequence[DataRow]) -> Dataset:
        self._check_mini_batches(run)
        refuse_rows([problem for row in rows if (problem := self._problem(run, row))], len(rows))
        encoded: Any = super().encode_rows(run, rows)
        room = run.max_length - self.options.max_completion_length
        fitting = [index for index, length in enumerate(encoded["length"]) if length <= room]
        if len(fitting) < len(encoded):
            long = [place for place, n in zip(encoded["place"], encoded["length"], strict=True) if n > room]
            run.notify(
                f"Prompts left out, over {room} tokens (data.max_length less {self.section}.max_completion_length): "
                f"{len(long)} ({', '.join(long[:3])}{', ...' if len(long) > 3 else ''})."
            )
        if not fitting:
            shortest = min(encoded["length"])
            raise NothingLeft(
                f"None of the {len(rows)} prompts leaves room for a completion: the shortest has {shortest} tokens, "
                f"and data.max_length ({run.max_length}) less {self.section}.max_completion_length is {room}. "
                "Raise the one or lower the other"
            )
        return encoded.select(fitting)  # type: ignore[no-any-return]

    def prepare_batch(self, run: RunView, rows: list[Row]) -> Round:
        training = run.model.training
        seed = int(torch.randint(2**62, (), generator=run.generator("sampling")))
        write = Writer(run, self.rewards, self.options, seed, self.copies)
        rollouts = write(rows)
        metrics = rollout_metrics(run, rollouts, self.rewards)
        metrics["completions/left_out"] = Mean(write.left_out, write.left_out + sum(len(r.texts) for r in rollouts))
        if training:
            self._tell_of_stops(run, rollouts)
            run.log_samples(self._samples(rollouts), steps=self.windows_per_round)
            rollouts = self.choose(run, rollouts, write)
        rollouts = [rollout for rollout in rollouts if rollout.completions]
        batch = self._scored(run, batch_of(rollouts, self.options), metrics)
        batch = self.with_advantages(run, batch, metrics)
        if not training:
            return Round([batch], metrics)
        return Round(self._windows(run, batch, [rollout.key for rollout in rollouts], seed), metrics)

    @hookimpl
    def extra_run_info(self, run: RunView) -> Mapping[str, Any]:
        """Tell what completions are rewarded for."""
        named = zip(self.rewards.names, self.rewards.weights, strict=True)
        told = ", ".join(name if weight == 1 else f"{weight:g} x {name}" for name, weight in named)
        return {
            "rewards": told or "of the rows",
            **{f"sha256 of {path}": digest for path, digest in self.rewards.files().items()},
        }

    @hookimpl
    def extra_checkpoint_state(self, run: RunView) -> Mapping[str, Any]:
        """Keep which files rewarded the run."""
        return {"reward_files": self.rewards.files()}

    @hookimpl
    def restore_checkpoint_state(self, run: RunView, state: Mapping[str, Any]) -> None:
        """Refuse to go on under other rewards."""
        override = f"{self.section}.reward_changed=true"
        problem = changed_files(state.get("reward_files", {}), self.rewards.files(), override=override)
        if problem and not self.options.reward_changed:
            raise ConfigurationError(problem)

    @hookimpl
    def run_finished(self, run: RunView, error: BaseException | None) -> None:
        """End the rewards' processes."""
        if self._rewards is not None:
            self._rewards.close()
            self._rewards = None

    # What a stage says

    @property
    def copies(self) -> int:
        """Completions of each prompt."""
        return int(self.options.num_generations)

    def choose(self, run: RunView, rollouts: list[Rollout], write: Writer) -> list[Rollout]:
        """Return the rollouts to train on; more may be written. All ranks call it together."""
        return rollouts

    def with_advantages(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Batch:
        """Return the batch with its advantages as a column. `metrics` takes what there is to tell."""
        raise NotImplementedError

    # Parts

    def _check_mini_batches(self, run: RunView) -> None:
        rows, parts = run.global_rows, self.options.mini_batches
        if rows % parts:
            fitting = [n for n in range(1, rows + 1) if rows % n == 0]
            raise ConfigurationError(
                f"{self.section}.mini_batches: {parts} does not divide the round's {rows} prompts "
                f"(per_device_train_batch_size x gradient_accumulation_steps x ranks). {_listed(fitting)} do"
            )

    def _scored(self, run: RunView, batch: Batch, metrics: dict[str, Mean]) -> Batch:
        """Add log-probs of the policy as it is now and of the reference, where the loss will need them.

        `old_logps` of completions that were brought are those of who wrote them, where these were brought too.
        """
        temperature, columns = self.options.temperature, dict[str, Tensor]()
        sampled, brought = (batch.per_target.get(name, torch.zeros(0)) for name in ("sampled_logps", "brought_logps"))
        if any(run.gather(bool((~brought.isnan()).any()))) or self.needs_old_logps:
            scores = run.score_window(batch, also=self.old_scores, temperature=temperature)
            old = scores.logps.cpu()
            if self.is_whole:
                far = (old - sampled).abs().nan_to_num()
                metrics["sampling/logp_difference_max"] = Mean.largest(far.max() if len(far) else 0.0)
            columns["old_logps"] = torch.where(brought.isnan(), old, brought)
            columns |= {f"old_{name}": getattr(scores, name).cpu() for name in self.old_scores}
        if self.reference != "none":
            columns["reference_logps"] = run.score_window(batch, model="reference", temperature=temperature).logps.cpu()
        return batch.with_columns(per_target=columns)

    @property
    def needs_old_logps(self) -> bool:
        """Whether the policy will have moved by the time that a window is trained on."""
        return self.windows_per_round > 1

    @property
    def is_whole(self) -> bool:
        """Whether completions are drawn from the policy's whole distribution, at the temperature of scoring."""
        o = self.options
        return bool(o.top_k == 0 and o.top_p == 1 and o.min_p == 0 and o.repetition_penalty == 1)

    def _windows(self, run: RunView, batch: Batch, keys: Sequence[str], seed: int) -> list[Batch]:
        """Cut a round: each pass takes all its prompts in an order of its own, the same on any number of ranks."""
        o = self.options
        if o.mini_batches == 1:
            return [batch] * o.num_iterations
        everyone = [key for rank in run.gather(list(keys)) for key in rank]
        windows = []
        for number in range(o.num_iterations):
            shuffled = sorted(everyone, key=lambda key: derive(seed, f"{number} {key}"))
            part = {key: place * o.mini_batches // len(shuffled) for place, key in enumerate(shuffled)}
            mine = [part[key] for key in keys]
            windows += [
                batch.select([index for index, found in enumerate(mine) if found == wanted])
                for wanted in range(o.mini_batches)
            ]
        return windows

    def _tell_of_stops(self, run: RunView, rollouts: Sequence[Rollout]) -> None:
        """Say which stop strings are in no completion of the first round: they may be misspelt."""
        if run.step or not self.options.stop:
            return
        answers = [run.tokenizer.decode(c.tokens) for r in rollouts if not r.offline for c in r.completions]
        found = {stop: sum(stop in answer for answer in answers) for stop in self.options.stop}
        everywhere = run.sum_over_ranks({**found, "": len(answers)})
        count = int(everywhere[""])
        for stop in [stop for stop in self.options.stop if count and not everywhere[stop]]:
            run.notify(
                f"The stop string {stop!r} ({self.section}.stop) is in none of the first round's {count} completions: "
                "they end at the stop token or at max_completion_length"
            )

    def _samples(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """Return a few completions for a person to read: the first of the first prompts."""
        shown = []
        for rollout in [r for r in rollouts if r.texts][:SAMPLES]:
            named = dict(zip(self.rewards.names, rollout.rewards[0].tolist(), strict=False))
            prompt = json.loads(rollout.row["prompt"])
            text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
            reward = float(rollout.reward[0])
            line = {"prompt": text, "completion": rollout.texts[0], "reward": reward, "rewards": named}
            shown.append(line | {"stopped": rollout.completions[0].stopped})
        return shown


def policy_metrics(stage: ReinforcementStage, batch: Batch, scores: Scores, old_logps: Tensor) -> dict[str, Mean]:
    """Return what is reported of the policy on a micro-batch: its entropy, and how far scoring is from sampling."""
    assert scores.entropy is not None
    metrics = {"entropy": Mean(scores.entropy.detach().sum(), len(scores.entropy))}
    if stage.is_whole and not stage.needs_old_logps:
        far = (old_logps - batch.per_target["sampled_logps"]).abs().nan_to_num()
        metrics["sampling/logp_difference_max"] = Mean.largest(far.max() if len(far) else 0.0)
    return metrics


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" and {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
