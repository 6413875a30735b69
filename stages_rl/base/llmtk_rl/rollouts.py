"""Rollouts: prompts, the completions that the policy wrote for them (or that their rows brought), and rewards.

A prompt's random numbers follow from the round's seed and from where the prompt stands in the data, not from the rank
that holds it nor from its neighbours: a round comes out the same on any number of ranks.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtk import Batch, Completion, Group, LlmtkError, Mean, RunView, TrainingError
from llmtk import Sequence as Tokens
from llmtk.contract import Row
from llmtk.training.randomness import derive
from llmtk_rl.advantages import is_flat
from llmtk_rl.offline import brings_rewards, brought_completions, is_offline
from llmtk_rl.rewards import Rewards, Sample

if TYPE_CHECKING:
    from llmtk_rl.stage import ReinforcementOptions


@dataclass(frozen=True, eq=False)
class Rollout:
    """A prompt with its completions. `key` names it among all of a round, on all ranks."""

    key: str
    row: Row
    completions: list[Completion]
    texts: list[str]
    rewards: Tensor
    """(completions, functions), float64; (completions, 0) where its row brought the reward."""
    reward: Tensor
    """(completions,), float64: the weighted sum, or what the row brought."""
    offline: bool = False
    """Whether its row brought the completions."""

    @property
    def is_flat(self) -> bool:
        """Whether all completions have the same reward, so that none is better than another."""
        return bool(is_flat(self.reward, torch.zeros(len(self.reward), dtype=torch.int64), 1))


class Writer:
    """Makes a round's rollouts, of one draw of rows or of several."""

    def __init__(self, run: RunView, rewards: Rewards, options: ReinforcementOptions, seed: int, copies: int) -> None:
        self.run, self.rewards, self.options, self.seed, self.copies = run, rewards, options, seed, copies
        self._seen: Counter[str] = Counter()
        self.left_out = 0
        """Completions that were left out since a reward failed."""

    def __call__(self, rows: Sequence[Row]) -> list[Rollout]:
        """Write and reward completions for this rank's rows. All ranks must call it together."""
        keys = self._keys(rows)
        columns = [json.loads(row["columns"]) for row in rows]
        asked = [index for index, given in enumerate(columns) if not is_offline(given)]
        written = dict(zip(asked, self._write([rows[i] for i in asked], [keys[i] for i in asked]), strict=True))
        brought = {
            index: brought_completions(self.run, json.loads(row["prompt"]), columns[index])
            for index, row in enumerate(rows)
            if index not in written
        }
        completions = [written.get(i) or brought[i] for i in range(len(rows))]
        texts = [
            [self.run.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in answers] for answers in completions
        ]
        rewards = self._reward(rows, columns, completions, texts)
        weights = torch.tensor(self.rewards.weights, dtype=torch.float64)
        rollouts = []
        for index, row in enumerate(rows):
            found, total = rewards[index], rewards[index] @ weights
            if brings_rewards(columns[index]):
                total = torch.tensor(columns[index]["rewards"], dtype=torch.float64)
                found = total.new_zeros(len(total), 0)
            kept = [n for n, value in enumerate(total.tolist()) if not math.isnan(value)]
            self.left_out += len(total) - len(kept)
            rollouts.append(
                Rollout(
                    keys[index],
                    row,
                    [completions[index][n] for n in kept],
                    [texts[index][n] for n in kept],
                    found[kept],
                    total[kept],
                    index not in written,
                )
            )
        return rollouts

    def _keys(self, rows: Sequence[Row]) -> list[str]:
        """Return what names each row among all that are drawn for the round: its place, and which time it is."""
        mine: list[str] = []
        for rank, places in enumerate(self.run.gather([row["place"] for row in rows])):
            for place in places:
                if rank == self.run.rank:
                    mine.append(f"{place} {self._seen[place]}")
                self._seen[place] += 1
        return mine

    def _write(self, rows: Sequence[Row], keys: Sequence[str]) -> list[list[Completion]]:
        o = self.options
        sampling = self.run.sampling(
            n=self.copies,
            max_new_tokens=o.max_completion_length,
            temperature=o.temperature,
            top_k=o.top_k,
            top_p=o.top_p,
            min_p=o.min_p,
            repetition_penalty=o.repetition_penalty,
            stop_strings=tuple(o.stop),
        )
        seeds = [derive(self.seed, key) for key in keys]
        try:
            return self.run.generate([row["prompt_ids"] for row in rows], sampling, seeds)
        except ValueError as error:
            longest = max(rows, key=lambda row: len(row["prompt_ids"]))
            raise TrainingError(
                f"a prompt cannot be answered: {error}. The longest of this round is {longest['place']}. Lower "
                f"data.max_length ({self.run.max_length}) to what the model has positions for"
            ) from error

    def _reward(
        self,
        rows: Sequence[Row],
        columns: Sequence[Mapping[str, Any]],
        completions: Sequence[Sequence[Completion]],
        texts: Sequence[Sequence[str]],
    ) -> list[Tensor]:
        """Return each row's rewards (completions, functions); of one that brings its own, none are asked for."""
        counts = [0 if brings_rewards(columns[i]) else len(completions[i]) for i in range(len(rows))]
        samples = [
            Sample(
                prompt=json.loads(row["prompt"]),
                completion=text,
                prompt_ids=list(row["prompt_ids"]),
                completion_ids=answer.tokens,
                columns=columns[index],
                place=row["place"],
            )
            for index, row in enumerate(rows)
            if counts[index]
            for answer, text in zip(completions[index], texts[index], strict=True)
        ]
        return list(torch.split(self._together(samples), counts))

    def _together(self, samples: Sequence[Sample]) -> Tensor:
        """Return rewards (samples, functions). What fails on one rank ends them all: the others would wait for it."""
        failure: LlmtkError | None = None
        found = torch.zeros(0, len(self.rewards.names), dtype=torch.float64)
        try:
            found = self.rewards(samples) if samples else found
        except LlmtkError as error:
            failure = error
        told = self.run.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, problem in enumerate(told):
            if problem is not None:
                raise TrainingError(f"rank {rank}: {problem}")
        for why in self.rewards.left_out:
            self.run.notify(why)
        return found


def batch_of(rollouts: Sequence[Rollout], options: ReinforcementOptions) -> Batch:
    """Lay rollouts out: a group a prompt, which is its completions' shared prefix.

    Weights: `sequences` and `tokens` that count in the loss, and `room`, the tokens that the sequences might have had.
    Columns: per sequence `rewards` and `truncated`; per target `sampled_logps`, those of this policy as it sampled, and
    `brought_logps`, those of whatever policy wrote what rows brought. Where one is not known, it is NaN.
    """
    return Batch.collate([_group(rollout, options) for rollout in rollouts])


def _group(rollout: Rollout, options: ReinforcementOptions) -> Group:
    sequences, logps, truncated = [], [], []
    for completion in rollout.completions:
        truncated.append(completion.stopped == "length")
        counts = not (options.mask_truncated_completions and truncated[-1])
        mask = [sampled and counts for sampled in completion.mask]
        sequences.append(Tokens(completion.tokens, mask, 0))
        known = completion.logps or [math.nan] * sum(completion.mask)
        logps += known if counts else []
    counted = sum(any(sequence.targets) for sequence in sequences)
    weights = {
        "sequences": counted,
        "tokens": sum(sum(sequence.targets) for sequence in sequences),
        "room": counted * options.max_completion_length,
    }
    known_logps = torch.tensor(logps, dtype=torch.float32)
    unknown = torch.full_like(known_logps, math.nan)
    sampled, brought = (unknown, known_logps) if rollout.offline else (known_logps, unknown)
    return Group(
        sequences,
        weights,
        [rollout.row["prompt_ids"]],
        per_sequence={"rewards": rollout.reward.float(), "truncated": truncated},
        per_target={"sampled_logps": sampled, "brought_logps": brought},
        place=rollout.row["place"],
    )


def rollout_metrics(run: RunView, rollouts: Sequence[Rollout], rewards: Rewards) -> dict[str, Mean]:
    """Return what the field reports of rollouts, each exact over all ranks. All ranks must call it together."""
    metrics: dict[str, Mean] = {}
    every = torch.cat([torch.zeros(0, dtype=torch.float64), *(rollout.reward for rollout in rollouts)])
    metrics["reward"] = Mean(every.sum(), len(every))
    spread = [float(rollout.reward.std()) for rollout in rollouts if len(rollout.reward) > 1]
    metrics["reward_std"] = Mean(sum(spread), len(spread))
    metrics["frac_reward_zero_std"] = Mean(sum(rollout.is_flat for rollout in rollouts), len(rollouts))
    own = [rollout.rewards for rollout in rollouts if rollout.rewards.shape[1] == len(rewards.names)]
    for index, name in enumerate(rewards.names):
        values = torch.cat([torch.zeros(0, dtype=torch.float64), *(found[:, index] for found in own)])
        metrics[f"rewards/{name}/mean"] = Mean(values.sum(), len(values))
        metrics[f"rewards/{name}/std"] = Mean(mean_and_std(run, values)[1], 1)
    answers = [answer for rollout in rollouts for answer in rollout.completions]
    lengths = torch.tensor([len(answer.tokens) for answer in answers], dtype=torch.float64)
    ended = torch.tensor([answer.stopped == "stop" for answer in answers], dtype=torch.bool)
    metrics["completions/mean_length"] = Mean(lengths.sum(), len(lengths))
    metrics["completions/max_length"] = Mean.largest(lengths.max() if len(lengths) else 0.0)
    metrics["completions/mean_terminated_length"] = Mean(lengths[ended].sum(), int(ended.sum()))
    metrics["completions/clipped_ratio"] = Mean(len(ended) - int(ended.sum()), len(ended))
    return metrics


def mean_and_std(run: RunView, values: Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation (n - 1 below) of all ranks' values (n,); 0 where there are too few.

    All ranks must call it together.
    """
    values = values.double()
    total = run.sum_over_ranks({"sum": float(values.sum()), "count": len(values)})
    mean = total["sum"] / max(total["count"], 1)
    squares = run.sum_over_ranks({"squares": float((values - mean).square().sum())})["squares"]
    return mean, math.sqrt(squares / max(total["count"] - 1, 1))
